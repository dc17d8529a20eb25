"""The commands as functions: what is told and returned is what is on disk, and a call goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import arithmetic, save_model, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import alphaspin
from alphaspin import Callback, Config, InputError, evaluate, export, load_config, play


class Heard(Callback):
    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []
        self.phases: list[tuple[str, int]] = []
        self.iterates: list[Path] = []
        self.evaluated: list[str] = []

    def on_step(self, stage: str, step: int, values: Any) -> None:
        if stage.startswith("train/"):
            assert "loss" in values
            self.steps.append((stage, step))

    def on_phase(self, name: str, iteration: int, seconds: float) -> None:
        assert seconds >= 0
        self.phases.append((name, iteration))

    def on_iterate(self, iteration: int, adapter: Path) -> None:
        assert iteration == len(self.iterates) and load_file(adapter / "adapter_model.safetensors")
        self.iterates.append(adapter)

    def on_evaluation(self, evaluation: Any) -> None:
        self.evaluated.append(evaluation.name)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("api")
    save_model(folder / "model")
    write_rows(folder / "data.jsonl", arithmetic(14))
    return {
        "model": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "output": str(folder / "run"),
        "selfplay": {"iterations": 2, "prompts": 8},
        "text": {"max_response_tokens": 6, "overlong": "cut"},
        "lora": {"r": 2},
        "train": {"batch_size": 4, "lr": 1e-2},
        "evaluate": {"prompts": 3},
    }


def test_a_run_tells_and_returns_what_is_on_disk(settings: dict[str, Any]) -> None:
    heard = Heard()
    run = play(settings, callbacks=[heard])
    assert run.path == Path(settings["output"]) and (run.path / "report.html").is_file()
    given = Config.model_validate(settings)
    assert run.config.model_copy(update={"text": given.text}) == given
    assert heard.steps == [(f"train/{t}", step) for t in range(2) for step in (1, 2)]
    assert {("train", 0), ("train", 1), ("evaluate", 1)} <= {*heard.phases}
    assert heard.iterates == run.adapters
    assert heard.evaluated == [row.name for row in run.table] == ["base", "0", "1"]
    written = json.loads((run.path / "summary.json").read_text())
    assert run.summary == {k: v for k, v in written.items() if k not in ("of", "sha256")}
    assert [r for r in run.metrics if r["stage"] == "train/1"][-1]["step"] == 2
    assert not torch.are_deterministic_algorithms_enabled(), "left as it was"

    again = Heard()
    second = play(Config.model_validate(settings), callbacks=[again])
    assert second.table == run.table and not again.steps
    assert again.iterates == run.adapters and again.evaluated == heard.evaluated


def test_a_run_is_compared_and_exported(settings: dict[str, Any], tmp_path: Path) -> None:
    run = play(settings)
    rows = evaluate(run.path, prompts=2, iterations=["1"])
    assert [row.name for row in rows] == ["base", "1"]
    assert all(row.verdicts is not None and len(row.verdicts) == 2 for row in rows)
    folder = export(run.path, tmp_path / "merged", merge=True, iteration=0)
    assert AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(InputError, match="exists already"):
        export(run.path, tmp_path / "merged", merge=True)


def test_paths_are_paths(tmp_path: Path) -> None:
    recipe, data = tmp_path / "r.yaml", tmp_path / "a.jsonl"
    recipe.write_text("seed: 3")
    assert load_config(recipe).seed == 3
    assert Config.model_validate({"data": data}).data == str(data)


def test_errors_are_those_of_the_commands(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"selfplay\.iteratons"):
        play({**settings, "selfplay": {"iteratons": 2}})
    with pytest.raises(InputError, match="is no run folder"):
        evaluate(tmp_path)
    with pytest.raises(InputError, match="say where to"):
        export(settings["output"])


def test_what_a_callback_raises_ends_the_run_and_a_second_call_goes_on(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    class Stop(Callback):
        def on_iterate(self, iteration: int, adapter: Path) -> None:
            raise ZeroDivisionError

    mine = settings | {"output": str(tmp_path / "run")}
    with pytest.raises(ZeroDivisionError):
        play(mine, callbacks=[Stop()])
    ours, whole = play(mine), play(settings)
    for one, other in zip(ours.adapters, whole.adapters, strict=True):
        files = (folder / "adapter_model.safetensors" for folder in (one, other))
        assert next(files).read_bytes() == next(files).read_bytes()


def test_names_are_there_without_being_imported() -> None:
    assert set(alphaspin.__all__) <= {*dir(alphaspin), *alphaspin.__all__}
    assert all(getattr(alphaspin, name) for name in alphaspin.__all__)
    with pytest.raises(AttributeError, match="no attribute 'unheard_of'"):
        _ = alphaspin.unheard_of


def test_scripts_written_for_earlier_modules_find_what_they_import() -> None:
    from alphaspin.errors import InputError as same
    from alphaspin.model.load import choose_bf16, load_base
    from alphaspin.model.routing import POLICY
    from alphaspin.model.stepper import Stepper, mixture
    from alphaspin.sampling.decode import Policy, decode

    assert same is InputError
    assert all((POLICY, choose_bf16, load_base, Policy, Stepper, decode, mixture))
