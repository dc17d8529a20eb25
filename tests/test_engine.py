"""A vLLM of the run's own: its life, by a fake that is started as the real one is."""

import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import fake_vllm
import pytest
from faults.forks import fork
from helpers import arithmetic, save_model, write_rows
from pydantic import ValidationError
from test_distributed import both

from alphaspin.commands.job import run
from alphaspin.config import Config
from alphaspin.errors import InputError, ServerError
from alphaspin.foundation import keeper
from alphaspin.foundation.vllm import environment, installed, knows
from alphaspin.judges import JUDGES
from alphaspin.sampling import engine
from alphaspin.sampling.remote import ServerSampler

MODEL = {"max_position_embeddings": 256}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("engine") / "model", **MODEL)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of its events and faults; vLLM is then installed."""
    folder = fake_vllm.install(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("FAKE_VLLM", str(tmp_path))
    return tmp_path


def settings(base: Path, folder: Path, /, **sampling: Any) -> dict[str, Any]:
    return {
        "model": str(base),
        "data": str(write_rows(folder / "data.jsonl", arithmetic(20))),
        "output": str(folder / "run"),
        "selfplay": {"iterations": 2, "prompts": 8},
        "text": {"max_response_tokens": 6, "overlong": "cut"},
        "lora": {"r": 2},
        "train": {"batch_size": 4, "lr": 1e-2},
        "evaluate": {"prompts": 2},
        "sampling": {"engine": "vllm", "shard_size": 4, "workers": 2, **sampling},
    }


def events(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "EVENTS").read_text().splitlines()]


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def all_gone(folder: Path, patience: float = 15) -> bool:
    deadline = time.monotonic() + patience
    pids = [int(event[-1]) for event in events(folder)]
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return all(map(gone, pids))


def play(base: Path, folder: Path, /, **sampling: Any) -> dict[str, Any]:
    return run(Config.model_validate(settings(base, folder, **sampling)))


def test_a_run_starts_and_ends_it(model: Path, fake: Path) -> None:
    summary = play(model, fake, vllm_arguments=["--swap-space=0"])
    happened = events(fake)
    assert [event[0] for event in happened[:2]] == ["start", "child"]
    assert happened[2][0].startswith("alphaspin-") and len(happened) <= 4, "one start, one adapter"
    told = happened[0]
    for argument in (
        f"--model={model}",
        "--dtype=float32",
        "--max-lora-rank=8",
        "--tensor-parallel-size=1",
        "--enforce-eager",
    ):
        assert argument in told
    assert told[-2] == "--swap-space=0", "what the user says comes last"
    assert all_gone(fake) and not Path(told[told.index("--uds") + 1]).parent.exists()
    # What is on disk needs no engine.
    assert play(model, fake)["adapters"] == summary["adapters"] and events(fake) == happened


def test_a_judge_of_the_runs_own(model: Path, fake: Path) -> None:
    """Started when it is first asked, with the judge's model; ended with the run."""
    judged = {"method": "sppo", "preference": {"responses": 2}}
    judge = {"kind": "vllm", "model": str(model), "vllm_arguments": ["--max-model-len=64"]}
    base = settings(model, fake, engine="local", workers=None)
    base["sampling"].pop("workers")
    summary = run(Config.model_validate(base | judged | {"judge": judge}))
    gc.collect()
    assert summary["adapters"] and all_gone(fake)
    (told,) = [event for event in events(fake) if event[0] == "start"]
    assert {f"--model={model}", "--served-model-name=judge", "--enforce-eager"} <= {*told}
    assert told[-2] == "--max-model-len=64"
    (line, *_) = (fake / "run").rglob("verdicts")
    assert line.stat().st_size
    with pytest.raises(InputError, match=r"judge.kind = vllm: vllm is not installed in"):
        JUDGES["vllm"].model_validate(judge | {"vllm_python": sys.executable}).load(None)


@pytest.mark.parametrize("fault", ["die 6", "hang 6"])
def test_one_failure_is_mended(
    model: Path, fake: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = play(model, fake)["adapters"]
    (fake / "EVENTS").unlink()
    (fake / "run").rename(fake / "straight")
    (fake / "FAULTS").write_text(fault)
    monkeypatch.setattr(ServerSampler.__init__, "__kwdefaults__", PATIENT | {"timeout": 2.0})
    quick = Path(keeper.__file__).read_text().replace("30.0", "0.5")
    (fake / "keeper.py").write_text(quick)
    monkeypatch.setattr(keeper, "__file__", str(fake / "keeper.py"))
    assert play(model, fake)["adapters"] == straight
    assert [event[0] for event in events(fake)].count("start") == 2
    assert all_gone(fake)


PATIENT = dict(ServerSampler.__init__.__kwdefaults__ or {})


def test_two_failures_end_the_run_in_a_line(model: Path, fake: Path) -> None:
    (fake / "FAULTS").write_text("die 6\ndie 1")
    with pytest.raises(ServerError, match=r"vLLM .*vllm-0\.log\); last: .*the fake broke") as told:
        play(model, fake)
    assert "\n" not in str(told.value)
    assert all_gone(fake)
    assert play(model, fake)["adapters"], "the same command goes on"


def test_one_that_cannot_start_says_why(model: Path, fake: Path) -> None:
    (fake / "FAULTS").write_text("exit")
    with pytest.raises(ServerError, match=r"vLLM ended .*last: .*no memory for the fake"):
        play(model, fake)
    assert [event[0] for event in events(fake)] == ["start"], "not begun anew"


def test_a_policy_that_is_not_ours_is_refused(model: Path, fake: Path) -> None:
    (fake / "FAULTS").write_text("tell")
    with pytest.raises(ServerError, match=r"of the base differ from ours by .*another model"):
        play(model, fake)


def apart(environment: dict[str, str], config: dict[str, Any]) -> None:
    """A run in a process of its own, of several that share a vLLM where there are more."""
    os.environ |= environment
    engine.SHARED_ON_CPU = True
    run(Config.model_validate(config))


def surroundings() -> dict[str, str]:
    """What `fake` has set, for processes forked from a server that was there before."""
    return {name: os.environ[name] for name in ("PYTHONPATH", "FAKE_VLLM")}


@pytest.mark.parametrize("fault", ["", "die 6"])
def test_processes_share_one(model: Path, fake: Path, fault: str) -> None:
    """One of the two starts it; both ask, and wait where it is begun anew."""
    config = settings(model, fake) | {"train": {"batch_size": 4, "lr": 1e-2, "accumulation": 2}}
    alone = run(Config.model_validate(config))["adapters"]
    (fake / "EVENTS").unlink()
    (fake / "FAULTS").write_text(fault)
    shared = (surroundings(), config | {"output": str(fake / "both")})
    assert both(apart, shared, shared) == [0, 0]
    assert [event[0] for event in events(fake)].count("start") == (2 if fault else 1)
    assert all_gone(fake)
    manifest = json.loads((fake / "both" / "manifest.json").read_text())
    assert manifest["adapters"] == alone


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_the_run(model: Path, fake: Path, how: signal.Signals) -> None:
    """A run that is killed while it waits for an answer leaves nobody, and goes on."""
    (fake / "FAULTS").write_text("hang 6")
    config = settings(model, fake)
    process = fork(apart, surroundings(), config)
    process.start()
    deadline = time.monotonic() + 240
    while (fake / "FAULTS").read_text() and time.monotonic() < deadline:
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, how)
    if how is signal.SIGTERM:  # the first waits for the shard
        time.sleep(1.2)
        assert process.is_alive() and not all_gone(fake, 0)
        os.kill(process.pid, how)
    process.join(30)
    assert process.exitcode == -how
    assert all_gone(fake)
    assert run(Config.model_validate(config))["adapters"]


def test_auto(model: Path, fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(model, fake, engine="auto")
    assert "the local sampler answers: there is no GPU" in " ".join(capsys.readouterr().out.split())
    assert not (fake / "EVENTS").exists()
    mixed = settings(model, fake, engine="auto") | {"method": "nash_md"}
    assert Config.model_validate(mixed | {"train": {"epochs": 1}}).needs_local()
    package = installed(None)
    assert package and package.parent == fake / "site"
    assert knows(package, "LlamaForCausalLM") and not knows(package, "FalconForCausalLM")


def test_what_does_not_fit_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vllm is not installed in this environment.*vllm_python"):
        play(model, tmp_path)
    with pytest.raises(InputError, match="vllm_python = /nowhere/python: cannot be run"):
        play(model, tmp_path, vllm_python="/nowhere/python")
    assert not (tmp_path / "run").exists()
    for wrong, message in (
        ({"model": "m"}, "sampling.model has no effect without sampling.url"),
        ({"url": "http://h/v1", "model": "m", "tensor_parallel": 2}, "no effect with sampling.url"),
        ({"engine": "local", "workers": 64, "vllm_python": "x"}, "vllm_python = .*no effect"),
        ({"engine": "sglang"}, "sampling.engine = sglang needs sampling.url"),
    ):
        with pytest.raises(ValidationError, match=message):
            Config.model_validate(settings(model, tmp_path, **wrong))
    with pytest.raises(ValidationError, match=r"vllm without url needs train.quantization = none"):
        nf4 = {"train": {"quantization": "nf4"}}
        Config.model_validate(settings(model, tmp_path) | nf4)


def test_the_child_knows_nothing_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    assert not {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & {*environment(None)}
    assert "PYTHONPATH" in environment(None) and "PYTHONPATH" not in environment("python")
