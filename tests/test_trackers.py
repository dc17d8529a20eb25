"""A stopped run goes on in its trackers as the same run: in stand-ins, and in what is installed."""

import importlib.util
import json
import sys
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType
from helpers import arithmetic, save_model, write_rows

from alphaspin import Callback, Config, InputError, play
from alphaspin.errors import Interrupted

EXTERNAL = ("mlflow", "trackio", "wandb")


class Stop(Callback):
    """A kill after a step of the second iteration."""

    def __init__(self, last: int = 1):
        self.last = last

    def on_step(self, stage: str, step: int, values: Any) -> None:
        if stage == "train/1" and step == self.last:
            raise Interrupted


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", arithmetic(14))
    return {
        "name": "mine",
        "model": str(tmp_path / "model"),
        "data": str(tmp_path / "rows.jsonl"),
        "output": str(tmp_path / "run"),
        "text": {"max_response_tokens": 8, "overlong": "cut"},
        "selfplay": {"iterations": 2, "prompts": 6},
        "lora": {"r": 2},
        "train": {"batch_size": 6, "lr": 1e-2},
        "evaluate": {"prompts": 0},
    }


def stopped_and_finished(settings: dict[str, Any], *trackers: str) -> dict[str, str]:
    """By which name each tracker knows the run."""
    config = Config.model_validate({**settings, "log": {"trackers": trackers}})
    manifest = Path(settings["output"]) / "manifest.json"
    with pytest.raises(Interrupted):
        play(config, callbacks=[Stop()])
    before = json.loads(manifest.read_text())["trackers"]
    play(config)
    assert json.loads(manifest.read_text())["trackers"] == before
    return before


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Modules in the place of the trackers, and what they were told, in order."""
    told: list[tuple[str, Any]] = []

    def note(kind: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            told.append((kind, {**options, "": arguments}))
            finish = lambda: told.append((f"{kind} finish", {}))  # noqa: E731
            info = types.SimpleNamespace(run_id="of-mlflow")
            return types.SimpleNamespace(log=note(f"{kind} log"), finish=finish, info=info)

        return call

    for name in EXTERNAL:
        module: Any = types.ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        module.init = note(name)
        module.config = types.SimpleNamespace(update=note(f"{name} config"))
        module.search_experiments = lambda **_: [types.SimpleNamespace(experiment_id="1")]
        module.start_run, module.end_run = note(name), note(f"{name} finish")
        module.log_params, module.log_metrics = note(f"{name} config"), note(f"{name} log")
        limits = {"MAX_PARAM_VAL_LENGTH": 6000, "MAX_PARAMS_TAGS_PER_BATCH": 100}
        module.utils = types.SimpleNamespace(validation=types.SimpleNamespace(**limits))
        monkeypatch.setitem(sys.modules, name, module)
    both = {*accelerate.tracking._available_trackers, *map(LoggerType, EXTERNAL)}
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [*both])
    return told


def test_each_tracker_is_told_which_run_goes_on(
    settings: dict[str, Any], stand_ins: list[tuple[str, Any]]
) -> None:
    ids = stopped_and_finished(settings, *EXTERNAL)
    assert ids["mlflow"] == "of-mlflow" and len(ids["wandb"]) == 8
    first, second = ([o for kind, o in stand_ins if kind == name] for name in ("wandb", "trackio"))
    project = {"project": "mine", "resume": "allow", "": ()}
    assert first == [{**project, "id": ids["wandb"], "name": "run"}] * 2
    assert second == [{**project, "name": f"run-{ids['trackio']}"}] * 2
    assert [o["run_id"] for kind, o in stand_ins if kind == "mlflow"] == [None, "of-mlflow"]
    for name in EXTERNAL:
        kinds = [kind for kind, _ in stand_ins]
        assert kinds.count(f"{name} finish") == 2, "also of the run that was stopped"
        settled = [o for kind, o in stand_ins if kind == f"{name} config"]
        assert len({str(o) for o in settled}) == len(settled), "settings are told once"
    (told,) = [o[""][0] for kind, o in stand_ins if kind == "wandb config"]
    assert told["model"] == "model", "no paths of this machine"
    assert "output" not in told


def test_a_run_that_is_killed_twice_tells_each_step_once(
    settings: dict[str, Any], stand_ins: list[tuple[str, Any]]
) -> None:
    """wandb drops what is behind its last step. The second process repeats less than was told."""
    train = {"batch_size": 2, "lr": 1e-2}  # three steps an iteration, and no checkpoint
    config = Config.model_validate({**settings, "train": train, "log": {"trackers": ["mlflow"]}})
    for last in (3, 1):
        with pytest.raises(Interrupted):
            play(config, callbacks=[Stop(last)])
    play(config)
    told = [(o["step"], o[""][0]) for kind, o in stand_ins if kind == "mlflow log"]
    lines = (Path(settings["output"]) / "metrics.jsonl").read_text().splitlines()
    assert [step for step, _ in told] == [*range(1, len(lines) + 1)]
    records = [json.loads(line) for line in lines]
    wanted = [r["loss"] for r in records if r["stage"].startswith("train")]
    assert [values["train/loss"] for _, values in told if "train/loss" in values] == wanted
    assert len(wanted) == 6


def test_what_a_tracker_wants_is_told_in_one_line(
    settings: dict[str, Any], stand_ins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del stand_ins

    def init(**_: Any) -> None:
        raise RuntimeError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    config = Config.model_validate({**settings, "log": {"trackers": ["tensorboard", "wandb"]}})
    with pytest.raises(InputError) as error:
        play(config)
    assert str(error.value).endswith("wandb: No API key configured. Use `wandb login`")


@pytest.mark.parametrize("dies", ["log", "finish"])
def test_a_tracker_that_dies_does_not_cost_the_run(
    settings: dict[str, Any],
    stand_ins: list[tuple[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dies: str,
) -> None:
    def die(*_: Any, **options: Any) -> None:
        if options.get("step", 2) == 2:
            raise BrokenPipeError("the service\nis gone")

    name = {"log": "log_metrics", "finish": "end_run"}[dies]
    monkeypatch.setattr(sys.modules["mlflow"], name, die)
    config = Config.model_validate({**settings, "log": {"trackers": ["mlflow", "trackio"]}})
    play(config)
    lines = (Path(settings["output"]) / "metrics.jsonl").read_text().splitlines()
    others = [kind for kind, _ in stand_ins if kind == "trackio log"]
    assert len(others) == len(lines) > 2, "another tracker goes on"
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("mlflow failed") == 1 and "(the service is gone)" in printed
    assert "trackio finish" in [kind for kind, _ in stand_ins]


@pytest.mark.filterwarnings("default")  # of what the library itself imports
def test_a_run_goes_on_in_mlflow(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    ids = stopped_and_finished(settings, "mlflow")
    (found,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert found.info.run_id == ids["mlflow"] and found.info.status == "FINISHED"
    assert found.info.run_name == "run" and found.data.params["lora.r"] == "2"
    history = mlflow.MlflowClient().get_metric_history(ids["mlflow"], "train/loss")
    assert len(history) >= 2 and len({one.step for one in history}) >= 2


@pytest.mark.filterwarnings("default")  # of what the library itself imports
def test_a_run_goes_on_in_trackio(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    storage: Any = importlib.import_module("trackio.sqlite_storage")
    project = f"mine-{uuid.uuid4().hex}"  # TRACKIO_DIR may hold earlier ones
    ids = stopped_and_finished({**settings, "name": project}, "trackio")
    runs = storage.SQLiteStorage.get_runs(project)
    assert runs == [f"run-{ids['trackio']}"]
    logs = storage.SQLiteStorage.get_logs(project, runs[0])
    assert len([log for log in logs if "train/loss" in log]) >= 2


@pytest.mark.filterwarnings("default")  # of what the library itself imports
def test_a_run_goes_on_in_wandb(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = stopped_and_finished(settings, "wandb")
    folders = [*(tmp_path / "wandb").glob("offline-run-*")]
    assert folders and {folder.name.rpartition("-")[2] for folder in folders} == {ids["wandb"]}
