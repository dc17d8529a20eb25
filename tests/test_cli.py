"""The command as a person uses it: whole runs on small models, and what bad input is told."""

import importlib.metadata
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import (
    arithmetic,
    make_model,
    make_tokenizer,
    overridden,
    save_model,
    write_rows,
)
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from alphaspin import cli
from alphaspin.config import Config, load_config, recipe_names
from alphaspin.data.chat import ChatFormat
from alphaspin.data.demonstrations import load_demonstrations
from alphaspin.errors import EXIT_INPUT, EXIT_STOPPED, InputError
from alphaspin.foundation.runs import Metrics
from alphaspin.training.loop import learning_rate
from alphaspin.training.watch import Watch

SMALL = [
    "--text.max_response_tokens=10",
    "--selfplay.iterations=2",
    "--selfplay.prompts=12",
    "--lora.r=2",
    "--train.batch_size=6",
    "--train.accumulation=2",
    "--train.lr=1e-3",
    "--sampling.shard_size=8",
    "--evaluate.prompts=6",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs")
    save_model(path / "model")
    write_rows(path / "data.jsonl", arithmetic(30))
    return path


@pytest.fixture
def alphaspin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `alphaspin …`; returns (exit code, all that was printed, in one line)."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["alphaspin", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        code = stop.value.code
        assert isinstance(code, int)
        return code, " ".join((printed.out + printed.err).split())

    return call


def own(folder: Path, run: Path, *options: str) -> list[str]:
    paths = [f"--model={folder / 'model'}", f"--data={folder / 'data.jsonl'}", f"--output={run}"]
    return ["train", *overridden([*paths, *SMALL], options)]


def records(run: Path, stage: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["stage"] == stage and "alarm" not in r]


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """A finished run, which tests that change it copy."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        options = ["--train.lr=1e-2", "--log.trackers", "tensorboard"]
        patch.setattr(sys, "argv", ["alphaspin", *own(folder, folder / "finished", *options)])
        cli.main()
    assert stop.value.code == 0
    return folder / "finished"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


VARIANTS: dict[str, list[str]] = {
    "spin": ["--reference.alpha=1", "--loss.beta=1"],
    "alpha": ["--reference.alpha=0.7", "--selfplay.history=2", "--loss.label_smoothing=0.1"],
    "base-dpo": ["--reference.alpha=0", "--selfplay.history=inf", "--train.schedule=cosine"],
    "arithmetic": ["--reference.kind=arithmetic", "--loss.kind=hinge", "--train.layout=padded"],
    "ema": ["--reference.kind=ema", "--loss.kind=ipo", "--train.optimizer=rmsprop"],
    "ipo-mean": ["--loss.kind=ipo", "--loss.ipo_length=mean", "--train.activation_checkpointing"],
    "slic": ["--loss.kind=slic", "--loss.slic_lambda=0.1", "--selfplay.no_warm_start"],
    "nll": ["--loss.nll_weight=1", "--selfplay.mixing", "--train.schedule=constant"],
    "bf16": ["--train.dtype=bf16", "--lora.targets", "q_proj", "v_proj"],
    "filters": ["--sampling.top_p=0.9", "--sampling.top_k=20", "--sampling.temperature=0.8"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_runs(folder: Path, tmp_path: Path, alphaspin: Any, variant: str) -> None:
    run = tmp_path / "run"
    code, printed = alphaspin(*own(folder, run, *VARIANTS[variant]))
    assert code == 0, printed
    summary = json.loads((run / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["base", "0", "1"]
    numbers = [v for row in summary["rows"] for key, v in row.items() if key != "name"]
    assert numbers and all(map(math.isfinite, numbers))
    hashes = set(summary["adapters"].values())
    assert len(hashes) == 2, "each iterate is a new adapter"
    pairs = 24 if variant == "nll" else 12
    for t, expected in ((0, 12), (1, pairs)):
        found = records(run, f"train/{t}")
        assert len(found) == expected // 6
        for key in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm"):
            assert all(math.isfinite(record[key]) for record in found), key
    first = records(run, "train/0")[0]
    # At t = 0 policy, previous iterate and base are one, and a fresh adapter changes nothing.
    tolerance = 0.05 if variant == "bf16" else 1e-5
    assert abs(first["rewards/margins"]) < tolerance
    if variant in {"spin", "alpha", "base-dpo", "filters"}:
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert {"nll", "sampled", "greedy", "preferred"} < {*summary["paired"]["covariance"]}
    for measure, covariance in summary["paired"]["covariance"].items():  # by prompt, as the rows
        errors = [row[f"{measure}_se"] for row in summary["rows"]]
        assert [covariance[k][k] ** 0.5 for k in range(3)] == pytest.approx(errors, abs=1e-9)
    assert all(("entropy" in row) == (variant != "filters") for row in summary["rows"])
    assert sum(summary["became"].values()) == summary["paired"]["prompts"]
    assert "Better than the base?" in (run / "report.html").read_text()


def test_adapters_load_in_peft_alone(folder: Path, finished: Path) -> None:
    """The evaluation's log-probs, from PEFT and transformers without a line of this project."""
    evaluation = json.loads((finished / "iterations/1/evaluation/evaluation.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(base, finished / "iterations/1/adapter").eval()
    chat = ChatFormat.create(make_tokenizer())
    config = Config()
    demos, _ = load_demonstrations(str(folder / "data.jsonl"), chat, config.text)
    by_answer = {tuple(d.prompt): d for d in demos}
    found: list[float] = []
    for demo in by_answer.values():
        ids = torch.tensor(np.concatenate([demo.prompt, demo.response])).long()[None]
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(demo.prompt)
        found.append(sum(logp[start - 1 + k, y].item() for k, y in enumerate(demo.response)))
    for value in evaluation["demonstration_logps"]:
        nearest = min(found, key=lambda other: abs(other - value))
        assert value == pytest.approx(nearest, rel=1e-5, abs=1e-5)
    assert len({round(v, 2) for v in evaluation["demonstration_logps"]}) > 3


def test_the_control_has_the_same_steps_and_tokens(
    folder: Path, tmp_path: Path, alphaspin: Any
) -> None:
    run = tmp_path / "run"
    assert alphaspin(*own(folder, run, "--control=sft", "--train.epochs=2"))[0] == 0
    for t in (0, 1):
        play, control = records(run, f"train/{t}"), records(run, f"control/{t}")
        assert len(play) == len(control) == 4
        # as many trained sequences; their lengths differ as rejected and chosen do
        assert sum(r["tokens"] for r in control) > 0.3 * sum(r["tokens"] for r in play)
        losses = [r["loss"] for r in control]
        assert losses[-1] < losses[0], "further SFT lowers the likelihood loss"
    summary = json.loads((run / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["base", "0", "1", "sft 0", "sft 1"]


def test_the_plan_says_what_the_run_does(folder: Path, tmp_path: Path, alphaspin: Any) -> None:
    run = tmp_path / "run"
    options = own(folder, run, "--selfplay.mixing", "--train.epochs=2")
    code, printed = alphaspin(*options, "--plan")
    assert code == 0 and not run.exists()
    assert "memory" in printed and "disk" in printed
    assert alphaspin(*options)[0] == 0
    for t, pairs, steps in ((0, 12, 4), (1, 24, 8)):
        assert len(records(run, f"train/{t}")) == steps
        row = next(line for line in printed.split("│ │") if f" {t} │" in f" {line}")
        assert f"│ {pairs} │ {steps} │" in row


@pytest.mark.parametrize(
    "name",
    ["gemma-2b-ultrachat", "mistral-7b-ultrachat", "mistral-7b-space", "mistral-7b-t-spin"],
)
def test_hub_recipes_plan_without_a_download(alphaspin: Any, name: str) -> None:
    code, printed = alphaspin("plan", name)
    assert code == 0 and "memory" in printed
    assert "50,000" in printed


def test_hints_are_not_passed_off_as_facts_about_something_else(
    folder: Path, alphaspin: Any
) -> None:
    code, printed = alphaspin("plan", "gemma-2b-ultrachat", "--data", folder / "data.jsonl")
    assert code == EXIT_INPUT and "207,865" not in printed and "hints" in printed
    code, printed = alphaspin(*own(folder, folder / "run", "--lora.targets", "q_prj"), "--plan")
    assert code == EXIT_INPUT and "q_prj" in printed


def test_plan_without_facts_is_an_error(alphaspin: Any) -> None:
    code, printed = alphaspin("plan", "--model=someone/model", "--data=someone/data")
    assert code == EXIT_INPUT and "someone/model" in printed and "hints" in printed


def test_recipes(alphaspin: Any, tmp_path: Path) -> None:
    code, printed = alphaspin("recipes")
    assert code == 0 and all(name in printed for name in recipe_names())
    copy = tmp_path / "mine.yaml"
    assert alphaspin("recipes", "copy", "tiny", copy)[0] == 0
    assert load_config(str(copy)).model_dump(exclude={"name"}) == load_config("tiny").model_dump(
        exclude={"name"}
    )
    code, printed = alphaspin("recipes", "copy", "tiny", copy)
    assert code == EXIT_INPUT and "exists" in printed
    for words in (("show", copy), ("copy", copy, tmp_path / "other.yaml")):
        code, printed = alphaspin("recipes", *words)
        assert code == EXIT_INPUT and "is a file, no packaged recipe" in printed
    assert alphaspin("doctor")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--train.lrr=1"], ["train.lrr", "train.lr"]),
        (["--train.learning_rate=1"], ["train.learning_rate"]),
        (["--reference.alpha=1.5"], ["alpha", "1.5"]),
        (["--train.batch_size=5", "--train.accumulation=2"], ["train.batch_size = 5"]),
        (["--loss.beta=abc"], ["loss.beta", "abc"]),
        (["--selfplay.history=0"], ["history", "0"]),
        (["--model=/nowhere/model"], ["model = /nowhere/model"]),
        (["--data=/nowhere/data.jsonl"], ["/nowhere/data.jsonl"]),
        (
            ["--text.max_prompt_tokens=3", "--text.too_long=error"],
            ["max_prompt_tokens", "data.jsonl:"],
        ),
        (
            ["--text.max_response_tokens=500"],
            ["text.max_response_tokens = 500", "128 positions"],
        ),
        (["--lora.targets", "nothing_proj"], ["lora.targets", "nothing_proj"]),
        (["--lora.targets", "lm_head"], ["lora.targets", "lm_head", "head"]),
        (["--name=../../elsewhere"], ["name", "elsewhere"]),
        (["--evaluate.answer=(("], ["evaluate.answer", "(("]),
        (["--evaluate.answer=#### (.+)"], ["evaluate.answer", "data.jsonl:"]),
        (["--reference.kind=ema", "--selfplay.no_warm_start"], ["ema", "warm_start"]),
    ],
)
def test_bad_values(
    folder: Path, tmp_path: Path, alphaspin: Any, arguments: list[str], said: list[str]
) -> None:
    run = tmp_path / "run"
    code, printed = alphaspin(*own(folder, run, *arguments))
    assert code == EXIT_INPUT, printed
    assert all(part in printed for part in said), printed
    assert "Traceback" not in printed
    assert not run.exists(), "what is bad is found before a folder is bound to it"


def test_bad_data_leaves_a_finished_run_alone(
    folder: Path, copied: Path, tmp_path: Path, alphaspin: Any
) -> None:
    run = copied
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", \n')
    code, printed = alphaspin(*own(folder, run, "--train.lr=1e-2", f"--data={broken}"))
    assert code == EXIT_INPUT and f"{broken}:2" in printed and "Traceback" not in printed
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_model_without_tokenizer(folder: Path, tmp_path: Path, alphaspin: Any) -> None:
    make_model().save_pretrained(tmp_path / "bare")
    code, printed = alphaspin(*own(folder, tmp_path / "run", f"--model={tmp_path / 'bare'}"))
    assert code == EXIT_INPUT and f"model = {tmp_path / 'bare'}" in printed
    assert "tokenizer" in printed and "Traceback" not in printed


def test_trackers(
    folder: Path,
    finished: Path,
    tmp_path: Path,
    alphaspin: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scalars = EventAccumulator(str(finished / "default")).Reload()
    steps = records(finished, "train/0") + records(finished, "train/1")
    expected = [record["loss"] for record in steps]
    assert [event.value for event in scalars.Scalars("train/loss")] == pytest.approx(expected)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name)
    )
    code, printed = alphaspin(*own(folder, tmp_path / "none", "--log.trackers", "wandb"))
    assert code == EXIT_INPUT and "log.trackers = wandb: not installed" in printed


def test_a_folder_that_is_no_run_is_left_alone(
    folder: Path, tmp_path: Path, alphaspin: Any
) -> None:
    (tmp_path / "home/.tmp-work").mkdir(parents=True)
    thesis = tmp_path / "home/.tmp-work/thesis.txt"
    thesis.write_text("years of work")
    code, printed = alphaspin(*own(folder, tmp_path / "home"))
    assert code == EXIT_INPUT and "holds no run" in printed
    code, printed = alphaspin(*own(folder, thesis))
    assert code == EXIT_INPUT and "is a file" in printed
    assert thesis.read_text() == "years of work"
    assert [p.name for p in (tmp_path / "home").iterdir()] == [".tmp-work"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"identity": {}}'])
def test_a_damaged_manifest(folder: Path, tmp_path: Path, alphaspin: Any, content: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_text(content)
    code, printed = alphaspin(*own(folder, run))
    assert code == EXIT_INPUT and "damaged" in printed and "Traceback" not in printed
    assert (run / "manifest.json").read_text() == content


def test_garbage_in_the_metrics_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"stage": "train/0", "step": 1, "loss": 0.5}\n'
    path.write_bytes(
        good
        + b'17\n{"loss": 1}\n\xff\xfe\n[]\n{"stage": 3}\n{"stage": "pairs"}\n'
        + b'{"stage": "pairs", "step": "x"}\n'
        + b"[" * 100_000
        + b'\n{"stage": "tr'
    )
    assert Metrics(path).read() == [json.loads(good)]


def test_help_is_what_a_first_run_needs(alphaspin: Any) -> None:
    code, printed = alphaspin("train", "--help")
    assert code == 0 and "--model (tiny)" in printed and "--loss.beta (1.0)" in printed
    assert "--gflownet.lr" not in printed and "--judge.kind" not in printed
    code, printed = alphaspin("train", "--method=sppo", "-h")
    assert code == 0 and "--preference.eta" in printed and "--judge.kind" in printed
    code, printed = alphaspin("train", "--help-all")
    assert code == 0 and "--gflownet.lr" in printed and "--model" in printed


def test_an_adapter_is_no_model(folder: Path, copied: Path, alphaspin: Any) -> None:
    adapter = copied / "iterations/0/adapter"
    arguments = [f"--model={adapter}", f"--data={folder / 'data.jsonl'}", "--output=never"]
    code, printed = alphaspin("train", *arguments)
    assert code == EXIT_INPUT and f"is an adapter of {folder / 'model'} and no model" in printed
    assert f"--model {folder / 'model'} --lora.start {adapter}" in printed
    own = [f"--model={folder / 'model'}", f"--lora.start={adapter}"]  # as it says
    code, printed = alphaspin("train", *arguments[1:], *own, "--plan")
    assert code == 0 and "steps" in printed


def test_it_says_its_version(alphaspin: Any) -> None:
    assert alphaspin("--version") == (0, f"alphaspin {importlib.metadata.version('alphaspin')}")


def test_an_exchanged_adapter_is_refused(folder: Path, copied: Path, alphaspin: Any) -> None:
    run = copied
    shutil.rmtree(run / "iterations/0/adapter")
    shutil.copytree(run / "iterations/1/adapter", run / "iterations/0/adapter")
    shutil.rmtree(run / "iterations/1")
    code, printed = alphaspin(*own(folder, run, "--train.lr=1e-2"))
    assert code == EXIT_INPUT and "iterations/0/adapter" in printed and "manifest" in printed


def test_what_only_cuts_up_the_work_may_change(folder: Path, copied: Path, alphaspin: Any) -> None:
    run = copied
    options = [
        "--train.lr=1e-2",
        "--train.accumulation=3",
        "--train.layout=padded",
        "--control=sft",
    ]
    code, printed = alphaspin(*own(folder, run, *options))
    assert code == 0, printed
    summary = json.loads((run / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["base", "0", "1", "sft 0", "sft 1"]


def test_the_moving_average_reference(folder: Path, tmp_path: Path, alphaspin: Any) -> None:
    """ema_2 = d adapter_0 + (1-d) adapter_1, and losses are taken against it, not against π_1."""
    run = tmp_path / "run"
    options = ["--reference.kind=ema", "--reference.ema_decay=0.7", "--selfplay.iterations=3"]
    assert alphaspin(*own(folder, run, *options, "--train.lr=1e-2"))[0] == 0
    zero, one, average = (
        load_file(run / f"iterations/{name}/adapter_model.safetensors")
        for name in ("0/adapter", "1/adapter", "2/ema")
    )
    moved = 0.0
    for key in average:
        torch.testing.assert_close(average[key], 0.7 * zero[key] + 0.3 * one[key])
        moved = max(moved, (one[key] - zero[key]).abs().max().item())
    assert moved > 1e-3
    # The policy starts from π_1 and the reference is elsewhere: the first margins are not zero.
    assert abs(records(run, "train/2")[0]["rewards/margins"]) > 1e-4


def test_the_environment_of_accelerate_changes_nothing(
    folder: Path,
    finished: Path,
    tmp_path: Path,
    alphaspin: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert alphaspin(*own(folder, tmp_path / "run", "--train.lr=1e-2"))[0] == 0
    plain, configured = (
        json.loads((run / "summary.json").read_text())["adapters"]
        for run in (finished, tmp_path / "run")
    )
    assert configured == plain


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {lrr: 1}", "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        ("train.lr: 1", "unknown key 'train.lr'; a dot stands for a section: train: {lr: …}"),
        ("batch_size: 3", "unknown key 'batch_size'; did you mean 'train.batch_size'?"),
        ("reference: {alpha: 1.5}", "reference.alpha = 1.5"),
        ("train: [", "not YAML"),
        ("- a", "expected keys and values"),
        ("loss: {kind: dop}", "loss.kind = 'dop'"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_config(str(path))
    assert said in str(error.value) and str(path) in str(error.value)


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train: {lr: 5e-6}\nloss: {beta: [1e-1, 5]}")
    assert isinstance(yaml.safe_load("5e-6"), str), "PyYAML's trap is still there"
    config = load_config(str(path))
    assert config.train.lr == (5e-6,) and config.loss.beta == (0.1, 5.0)


def test_a_loss_that_is_not_finite_stops_before_the_update(
    folder: Path, tmp_path: Path, alphaspin: Any
) -> None:
    run = tmp_path / "run"
    options = ["--train.lr=1e30", "--train.clip=None", "--train.warmup=0", "--loss.beta=1"]
    code, printed = alphaspin(*own(folder, run, *options, "--train.checkpoint_every=1"))
    assert code == EXIT_STOPPED and "stopped before the update" in printed
    assert not (run / "iterations/0/adapter").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("stopped before the update" in line.get("alarm", "") for line in lines)


def test_alarms(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    watch = Watch("train/0", metrics)
    for step in range(25):  # winners rise, losers fall: as it should be
        watch.check_rewards(step, {"rewards/chosen": 0.1 * step, "rewards/rejected": -0.1 * step})
    assert not metrics.read()
    watch = Watch("train/0", metrics)
    for step in range(25):
        watch.check_rewards(step, {"rewards/chosen": -0.1 * step, "rewards/rejected": -0.2 * step})
    alarms = [record["alarm"] for record in metrics.read()]
    assert len(alarms) == 1 and "fall together" in alarms[0]
    # A run that was killed in the middle raises the same alarm at the same step, and once.
    for split in (10, 22):
        resumed = Metrics(tmp_path / f"{split}.jsonl")
        for step in range(25):
            if step in (0, split):
                again = Watch("train/0", resumed)
                again.restore()
            values = {"rewards/chosen": -0.1 * step, "rewards/rejected": -0.2 * step}
            resumed.write("train/0", step, values)
            again.check_rewards(step, values)
        found = [record["step"] for record in resumed.read() if "alarm" in record]
        assert found == [record["step"] for record in metrics.read() if "alarm" in record]
    dead, alive = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    dead.grad, alive.grad = torch.zeros(2), torch.ones(2)
    watch.check_gradients({"a.lora_B.policy": dead, "b.lora_B.policy": alive})
    assert "a.lora_B.policy" in metrics.read()[-1]["alarm"]
    count = len(metrics.read())
    watch.check_gradients({"b.lora_B.policy": alive, "b.lora_A.policy": dead})
    assert len(metrics.read()) == count


def test_learning_rate() -> None:
    linear = [learning_rate(s, 10, 1.0, 0.2, "linear") for s in range(10)]
    assert linear[:3] == [0.5, 1.0, 1.0] and linear[-1] == pytest.approx(1 / 8)
    cosine = [learning_rate(s, 10, 1.0, 0.0, "cosine") for s in range(10)]
    assert cosine[0] == 1.0 and cosine[5] == pytest.approx(0.5)
    assert [learning_rate(s, 4, 2.0, 0.25, "constant") for s in range(4)] == [2.0] * 4
