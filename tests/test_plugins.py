"""Kinds of one's own, by `module:Name`: the examples, and what is refused."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import arithmetic, save_model, write_rows

from alphaspin import Config, InputError, play
from alphaspin.cli import parse
from alphaspin.commands.played import Played
from alphaspin.data.settings import LIMITS
from alphaspin.losses.dpo import dpo
from alphaspin.report.page import describe
from alphaspin.schema import explain

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the examples in it."""
    shutil.copytree(EXAMPLES, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plugins")
    save_model(folder / "model")
    write_rows(folder / "data.jsonl", arithmetic(14))
    return {
        "model": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "selfplay": {"iterations": 2, "prompts": 8},
        "text": {"max_response_tokens": 6, "overlong": "cut"},
        "lora": {"r": 2},
        "train": {"batch_size": 4, "lr": 1e-2},
        "evaluate": {"prompts": 0},
    }


CHOSEN: list[dict[str, Any]] = [
    {"loss": {"kind": "losses:robust", "epsilon": 0.2}},
    {"loss": {"kind": "losses:Symmetric", "beta": [1.0, 2.0], "nll_weight": 0.1}},
    {"selfplay": {"opponent": "opponents:league", "rounds": 1, "iterations": 3}},
    {"method": "methods:BestOfK", "preference": {"responses": 2}},
]


def name_of(chosen: dict[str, Any]) -> str:
    return re.findall(r"\w+:\w+", str(chosen))[0]


@pytest.mark.parametrize("chosen", CHOSEN, ids=name_of)
def test_an_example_trains_and_its_folder_tells_how_to_go_on(
    base: dict[str, Any],
    chosen: dict[str, Any],
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = list(sys.path)
    merged = {
        k: {**base[k], **v} if k in base and isinstance(v, dict) else v for k, v in chosen.items()
    }
    config = Config.model_validate({**base, **merged, "output": str(tmp_path / "run")})
    run = play(config)
    assert len(run.adapters) == config.selfplay.iterations and sys.path == path
    assert any(r.get("grad_norm", 0) > 0 for r in run.metrics)
    monkeypatch.chdir(tmp_path)
    again = Played.open(tmp_path / "run").config
    limits = {key: getattr(again.text, key) for key in LIMITS}
    assert again == config.sized(limits) and describe(again) == describe(config)
    assert play(again).summary["adapters"] == run.summary["adapters"]
    file = here / f"{name_of(chosen).partition(':')[0]}.py"
    file.write_text(file.read_text() + "# edited\n")
    with pytest.raises(InputError, match="holds another run: its plugins"):
        play(Played.open(tmp_path / "run").config)


def test_the_example_of_a_loss_is_the_published_one() -> None:
    loss = Config.model_validate({"loss": {"kind": "losses:robust", "beta": 0.5}}).loss
    policy, reference = torch.tensor([[-3.0, -7.0]]), torch.tensor([[-4.0, -6.0]])
    right, wrong = (
        dpo(*p, *r, beta=0.5)
        for p, r in (
            (policy.unbind(1), reference.unbind(1)),
            (policy.flip(1).unbind(1), reference.flip(1).unbind(1)),
        )
    )
    torch.testing.assert_close(
        loss(policy, reference, torch.ones(1, 2), 0), (0.9 * right - 0.1 * wrong) / 0.8
    )
    assert not loss.ignores_equal_pairs(), "nothing tells whether its gradient vanishes there"


def test_settings_are_on_the_command_line_and_in_its_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, _ = parse(["--loss.kind", "losses:robust", "--loss.epsilon=.3"])
    assert config.loss.model_dump()["epsilon"] == 0.3
    with pytest.raises(SystemExit):
        parse(["--loss.kind=losses:Symmetric", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--loss.beta" in printed and "--loss.label_smoothing" not in printed
    config, _ = parse(["--method", "methods:BestOfK", "--preference.responses", "3"])
    assert config.preference.answers_per_prompt() == 3
    config, _ = parse(["--selfplay.opponent=opponents:league", "--selfplay.rounds=4"])
    names = [player.name for player in config.selfplay.players(6, config.reference)]
    assert names == ["base", "iterate-1", "iterate-5"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loss": {"kind": "losses:robust", "epsilon": 0.7}}, "loss.epsilon = 0.7"),
        ({"loss": {"kind": "losses:robust", "tau": 0.1}}, "unknown key 'loss.tau'"),
        ({"loss": {"kind": "losses:robust", "ipo_tau": 0.2}}, "only with ipo"),
        ({"loss": {"kind": "losses:absent"}}, "has no absent"),
        ({"loss": {"kind": "nowhere:loss"}}, "No module named 'nowhere'"),
        ({"loss": {"kind": "methods:BestOfK"}}, "is no subclass of Loss"),
        ({"loss": {"kind": "dop"}}, "did you mean 'dpo'"),
        ({"method": "opponents:league"}, "a subclass of Method is needed"),
        ({"method": "spinn"}, "did you mean 'spin'"),
        ({"loss": {"folder": "/"}}, "unknown key 'loss.folder'"),
        ({"method": "methods:BestOfK", "loss": {"beta": 2}}, "has no effect with method"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as error:
        Config.model_validate(settings)
    assert says in explain(error.value, Config), explain(error.value, Config)  # pyright: ignore[reportArgumentType]


def test_a_module_that_fails_is_named(here: Path) -> None:
    (here / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match="broken: ZeroDivisionError"):
        Config.model_validate({"loss": {"kind": "broken:loss"}})
    assert str(here) not in sys.path
