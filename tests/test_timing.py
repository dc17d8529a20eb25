"""The plan's hours by hand, on which machine, and what is refused."""

from typing import Any

import pytest

from alphaspin import cli
from alphaspin.cli import parse
from alphaspin.commands import timing
from alphaspin.errors import EXIT_INPUT
from alphaspin.foundation.gpus import GPUS, HERE, Gpu

SEVEN = ["mistral-7b-ultrachat", "--train.epochs", "1"]
KEPT = "--train.no_activation_checkpointing"


@pytest.fixture
def alphaspin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `alphaspin …`; returns the exit code and all that was printed, in one line."""

    def call(*words: str) -> tuple[int | str | None, str]:
        monkeypatch.setattr("sys.argv", ["alphaspin", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, " ".join("".join(capsys.readouterr()).split())

    return call


def hours(
    *words: str, kept: str = KEPT, gpu: Gpu = GPUS["h100"], t: int = 0, **options: Any
) -> timing.Times:
    config = parse([*SEVEN, kept, *words])[0]
    assert config.hints
    base = 2 * config.hints.parameters
    found = timing.times(config, config.hints, t, gpu, base=base, **options)
    return timing.Times(*(value / 3600 for value in vars(found).values()))


def test_hours_by_hand() -> None:
    gpu = Gpu(1e15, 1e13, "")
    found = hours(gpu=gpu)
    # 50k pairs of 700 + 2·250 tokens, 4 operations a parameter, at 4e14; scored once by the base.
    training = 4 * 7.242e9 * 1200 * 50_000 / 4e14 / 3600
    assert found.training == pytest.approx(training)
    assert found.scoring == pytest.approx(training / 2)
    # Prompts as passes; then 250 steps of 50,000 / 64 batches, 32 layers of 1.25 ms each.
    prompts = 2 * 7.242e9 * 700 * 50_000 / 4e14
    assert found.sampling == pytest.approx((prompts + 250 * 50_000 / 64 * 0.04) / 3600)
    # vLLM: weights, and 256 answers' keys and values (2·32·1024 numbers a token) at 6e12 bytes.
    step = (2 * 7.242e9 + 256 * 4 * 32 * 1024 * (700 + 125)) / 6e12
    served = hours(gpu=gpu, engine=True)
    assert served.sampling == pytest.approx((prompts + 250 * 50_000 / 256 * step) / 3600)
    # t = 1: two references would be α < 1's; with mixing, the pairs of t = 0 once more.
    assert hours(gpu=gpu, t=1).training == pytest.approx(2 * training)
    mixed = hours("--reference.alpha", "0.9", gpu=gpu, t=1)
    assert mixed.scoring == pytest.approx(2 * training)
    recomputed = hours(kept="--train.activation_checkpointing", gpu=gpu)
    assert recomputed.training == pytest.approx(1.5 * training)
    assert hours(gpu=gpu, count=8).all == pytest.approx(found.all / 8)
    assert hours("--loss.kind", "slic", gpu=gpu).scoring == 0


def test_beside_other_estimates_of_a_7b_on_an_h100() -> None:
    """1.2 h to train on 50,000 pairs, 20 minutes for vLLM's tokens; 5.4 h at 100 ms a step."""
    found, served = hours(), hours(engine=True)
    assert found.training == pytest.approx(1.2, rel=0.05)
    prompts = 2 * 7.242e9 * 700 * 50_000 / (0.4 * 989e12) / 3600
    assert served.sampling - prompts == pytest.approx(1 / 3, rel=0.2)
    assert found.sampling - prompts == pytest.approx(5.4 * 40 / 100, rel=0.05)


def test_the_plan_is_for_the_machine_that_is_named(alphaspin: Any) -> None:
    assert parse(["tiny", "--plan"])[1] is HERE and parse(["tiny"])[1] is None
    code, printed = alphaspin(
        "plan", "mistral-7b-ultrachat", "--gpu", "H100", "--gpus", "8", "--train.sharding", "fsdp"
    )
    assert code == 0 and "hours on 8 × h100" in printed
    assert "GiB on h100 = base 1.90 (16 bit)" in printed and "sampling: REFUSED" in printed
    for words in (["--gpus=1"], ["--gpus=8", "--sampling.engine=vllm"]):
        sharded = ("--gpu=h100", "--train.sharding=fsdp", *words)
        code, printed = alphaspin("plan", "mistral-7b-ultrachat", *sharded)
        assert code == 0 and "memory, sampling: about" in printed
    code, printed = alphaspin("plan", "mistral-7b-ultrachat", "--hints.parameters", "70e9")
    assert code == 0 and "time: not known" in printed
    code, printed = alphaspin(
        "plan", "mistral-7b-ultrachat", "--hints.parameters=70e9", "--gpu=h100"
    )
    assert code == 0 and "does NOT fit" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--plan", "--gpu", "h300"], "known are a100, h100, h200, b200"),
        (["--plan", "--gpus", "8"], "--gpus has no effect without --gpu"),
        (["--gpu", "h100"], "--gpu has no effect without --plan"),
        (["--plan", "--gpu", "h100", "--gpus", "0"], "is no number of GPUs"),
    ],
)
def test_what_is_refused(alphaspin: Any, words: list[str], said: str) -> None:
    code, printed = alphaspin("train", "tiny", *words)
    assert code == EXIT_INPUT and said in printed
