"""A run killed at any instant and started again ends with the bits of one that was never killed.

Each case forks a fresh process from a server that has imported everything but computed nothing, and
sends itself a signal at the k-th event of a kind: a decoding step (sampling), a pass over a batch
without gradient (scoring), an optimiser step (training). Kills at each file-system call: `faults`.
"""

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import disk
from faults.forks import fork
from helpers import arithmetic, painted, save_model, write_rows

from alphaspin.errors import EXIT_INPUT, EXIT_RESUMABLE
from alphaspin.foundation.artefacts import HASHES, file_hash, sealed


def settings(folder: Path, run: Path, **changes: str) -> list[str]:
    """A command line for every phase: mixture reference, two opponents, mixing, control."""
    options = {
        "model": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "output": str(run),
        "control": "sft",
        "text.max_response_tokens": "10",
        "selfplay.iterations": "2",
        "selfplay.history": "2",
        "selfplay.prompts": "12",
        "selfplay.mixing": "true",
        "reference.alpha": "0.8",
        "loss.nll_weight": "0.1",
        "lora.r": "2",
        "lora.dropout": "0.1",
        "train.batch_size": "6",
        "train.accumulation": "2",
        "train.checkpoint_every": "1",
        "train.lr": "1e-3",
        "sampling.shard_size": "6",
        "sampling.batch_size": "4",
        "evaluate.prompts": "4",
    } | changes
    flags = [f"--{key}={value}" for key, value in options.items() if value not in ("true", "false")]
    switches = [f"--{key}" for key, value in options.items() if value == "true"]
    return ["train", "default", *flags, *switches]


def child(
    arguments: list[str],
    event: tuple[str, int] | None,
    action: str,
    log: str,
    faults: Mapping[str, Any] | None = None,
) -> None:
    """Run `alphaspin` in this process; at event (kind, k) do `action`; count events into `log`.

    faults: what `disk.arm` is given.
    """
    import torch

    from alphaspin import cli
    from alphaspin.model import scoring
    from alphaspin.report import plots
    from alphaspin.sampling import decode as sampling

    torch.set_num_threads(1)
    sys.argv = ["alphaspin", *arguments]
    plots.draw = painted
    seen: Counter[str] = Counter()

    def count(kind: str) -> None:
        seen[kind] += 1
        if event == (kind, seen[kind]):
            if action == "full disk":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
            os.kill(os.getpid(), getattr(signal, action))

    def counting(owner: Any, name: str, kind: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            count(kind)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    counting(os, "fsync", "saving")
    counting(Path, "rename", "saving")
    counting(Path, "replace", "saving")
    counting(torch.optim.AdamW, "step", "training")
    counting(sampling, "invert", "sampling")
    original = scoring.sequence_logps

    def scored(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            count("scoring")
        return original(*args)

    scoring.sequence_logps = scored
    sys.stdout = sys.stderr = Path(log).open("a")  # noqa: SIM115 - lives as long as the process
    if faults:
        disk.arm(**faults)
    try:
        cli.main()
    finally:
        sys.stdout.flush()
        Path(log + ".events").write_text(json.dumps(seen))


def start(
    arguments: list[str],
    log: Path,
    event: tuple[str, int] | None = None,
    action: str = "SIGKILL",
    faults: Mapping[str, Any] | None = None,
) -> Any:
    process = fork(child, arguments, event, action, str(log), faults)
    process.start()
    return process


def finish(*arguments: Any, **keywords: Any) -> int:
    process = start(*arguments, **keywords)
    process.join(180)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def result(run: Path, adapters: int = 4) -> dict[str, str]:
    """Hashes of everything that must not depend on kills."""
    patterns = ("*/adapter/*", "*/opponents/*/*", "*/reference/*/*", "*/evaluation/*")
    found = {
        str(path.relative_to(run)): file_hash(path)
        for pattern in patterns
        for path in run.rglob(pattern.removeprefix("*/"))
        if path.is_file()
    }
    summary = json.loads((run / "summary.json").read_text())
    found["rows"] = json.dumps(summary["rows"])
    found["lineage"] = json.dumps(summary["adapters"])
    assert len(summary["adapters"]) == adapters
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # What was measured in training is repeated exactly too, once each and in order.
    volatile = ("tokens_per_second", "seconds")
    found["metrics"] = json.dumps(
        [
            {key: value for key, value in record.items() if key not in volatile}
            for record in metrics
            if record["stage"].startswith(("train/", "control/"))
        ]
    )
    assert len([name for name in found if name.endswith("adapter_model.safetensors")]) >= adapters
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], Counter[str]]:
    """Model and data, the uninterrupted run's result, and how often each event happened."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    write_rows(folder / "data.jsonl", arithmetic(40))
    log = folder / "log"
    assert finish(settings(folder, folder / "run"), log) == 0, log.read_text()
    events = Counter(json.loads(Path(f"{log}.events").read_text()))
    return folder, result(folder / "run"), events


def test_killed_again_and_again(
    world: tuple[Path, dict[str, str], Counter[str]], tmp_path: Path
) -> None:
    """Asynchronous kills at random times, in a chain on one folder."""
    folder, expected, _ = world
    arguments, log = settings(folder, tmp_path / "run"), tmp_path / "log"
    random = np.random.default_rng(0)
    for _ in range(8 if os.environ.get("ALPHASPIN_SWEEP") else 5):
        process = start(arguments, log)
        time.sleep(random.uniform(0.3, 2.0))
        process.kill()
        process.join()
    assert finish(arguments, log) == 0, log.read_text()
    assert result(tmp_path / "run") == expected


@pytest.mark.parametrize(
    ("kind", "k", "action"),
    [("training", 3, "SIGTERM"), ("sampling", 5, "SIGTERM"), ("scoring", 2, "SIGINT")],
)
def test_a_signal_saves_and_exits_with_the_documented_code(
    world: tuple[Path, dict[str, str], Counter[str]], tmp_path: Path, kind: str, k: int, action: str
) -> None:
    folder, expected, _ = world
    arguments, log = settings(folder, tmp_path / "run"), tmp_path / "log"
    assert finish(arguments, log, (kind, k), action) == EXIT_RESUMABLE
    assert "goes on from here" in log.read_text()
    if kind == "training":  # the step was finished and saved, not lost
        assert list((tmp_path / "run").rglob("step-*"))
    assert finish(arguments, log) == 0, log.read_text()
    assert result(tmp_path / "run") == expected


def test_a_damaged_artefact_is_made_again(
    world: tuple[Path, dict[str, str], Counter[str]], tmp_path: Path
) -> None:
    folder, expected, _ = world
    arguments, log = settings(folder, tmp_path / "run"), tmp_path / "log"
    assert finish(arguments, log, ("training", 6)) == -signal.SIGKILL
    damaged = sorted((tmp_path / "run").rglob("answers.safetensors"))[-1]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert finish(arguments, log) == 0, log.read_text()
    assert result(tmp_path / "run") == expected


def over(run: Path, source: Path | str, target: str) -> None:
    """What a hand that copies folders does."""
    shutil.rmtree(run / target, ignore_errors=True)
    shutil.copytree(run / source, run / target)


def by_stage(found: dict[str, str]) -> dict[str, Any]:
    """A result in an order that does not tell which stage was last."""
    records = sorted(json.loads(found["metrics"]), key=lambda r: (r["stage"], r["step"]))
    return {**found, "metrics": records, "lineage": json.loads(found["lineage"])}


@pytest.fixture(scope="module")
def another(world: tuple[Path, dict[str, str], Counter[str]]) -> Path:
    """A run of the same form with another seed, killed in its second iteration."""
    folder, log = world[0], world[0] / "another-log"
    assert finish(settings(folder, folder / "another", seed="1"), log, ("training", 4)) < 0
    return folder / "another"


@pytest.mark.parametrize(
    ("source", "target", "gone", "says"),
    [
        ("iterations/0/evaluation", "iterations/1/evaluation", (), "it is iterations/0/evaluation"),
        ("base/evaluation", "iterations/0/evaluation", (), "it is base/evaluation"),
        ("control/sft/0/evaluation", "iterations/0/evaluation", (), "it is control/sft/0/eval"),
        ("iterations/0/opponents/*", "iterations/1/opponents/*", ("1",), "it is iterations/0/"),
        ("iterations/0/reference/00000", "iterations/1/reference/00000", ("1",), "it is iterat"),
        ("iterations/0/adapter", "iterations/1/adapter", ("1", "manifest"), "it is iterations/0/a"),
        ("ANOTHER/iterations/0/opponents/*", "iterations/0/opponents/*", ("0", "1"), "another"),
        ("ANOTHER/iterations/0/evaluation", "iterations/0/evaluation", (), "of another run"),
        ("ANOTHER/iterations/0/adapter", "iterations/0/adapter", ("0", "manifest"), "another run"),
    ],
)
def test_what_belongs_elsewhere_is_made_again(
    world: tuple[Path, dict[str, str], Counter[str]],
    another: Path,
    tmp_path: Path,
    source: str,
    target: str,
    gone: tuple[str, ...],
    says: str,
) -> None:
    folder, expected, _ = world
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    if "manifest" in gone:  # as if killed before it took note of the adapter
        manifest = json.loads((run / "manifest.json").read_text())
        known = {k: v for k, v in manifest["adapters"].items() if not k.endswith(gone)}
        (run / "manifest.json").write_text(json.dumps(sealed({**manifest, "adapters": known})))
    (run / "summary.json").unlink()
    root = another if source.startswith("ANOTHER") else run
    origin = min(root.glob(source.removeprefix("ANOTHER/")))
    place = min(run.glob(target))
    for t in {"0", "1"} & {*gone}:
        shutil.rmtree(run / "iterations" / t / "adapter")
    over(run, origin, str(place.relative_to(run)))
    log = tmp_path / "log"
    assert finish(settings(folder, run), log) == 0, log.read_text()
    printed = " ".join(log.read_text().split())
    assert "is made again: " in printed and says in printed
    assert by_stage(result(run)) == by_stage(expected)


def test_a_checkpoint_of_another_iteration_is_passed_over(
    world: tuple[Path, dict[str, str], Counter[str]], another: Path, tmp_path: Path
) -> None:
    folder, expected, _ = world
    arguments, log = settings(folder, tmp_path / "run"), tmp_path / "log"
    assert finish(arguments, log, ("training", 2)) < 0
    checkpoints = "iterations/0/checkpoints"
    stray = Path(shutil.copytree(tmp_path / "run" / checkpoints, tmp_path / "kept"))
    assert finish(arguments, log, ("training", 3)) < 0  # in the second iteration by now
    place = tmp_path / "run/iterations/1/checkpoints"
    for found in (stray, another / "iterations/1/checkpoints"):
        shutil.copytree(min(found.iterdir()), place / f"step-{5 + len(found.parts):06d}")
    assert finish(arguments, log) == 0, log.read_text()
    printed = " ".join(log.read_text().split())
    assert printed.count("is made again: it is iterations/") == 2 and "of another run" in printed
    assert result(tmp_path / "run") == expected


def test_what_was_made_from_other_iterates_is_passed_over(
    world: tuple[Path, dict[str, str], Counter[str]], tmp_path: Path
) -> None:
    """Of the same run: another way to cut up the work rounds otherwise, from its first iterate."""
    folder, expected, _ = world
    log = tmp_path / "log"
    changes = {"train.accumulation": "1", "train.layout": "padded"}
    assert finish(settings(folder, tmp_path / "other", **changes), log, ("training", 6)) < 0
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["adapters"]["train/1"]
    (run / "manifest.json").write_text(json.dumps(sealed(manifest)))
    for gone in ("adapter", "evaluation"):
        shutil.rmtree(run / "iterations/1" / gone)
    over(run, tmp_path / "other/iterations/1/checkpoints", "iterations/1/checkpoints")
    over(run, tmp_path / "other/iterations/1/reference", "iterations/1/reference")
    assert finish(settings(folder, run), log) == 0, log.read_text()
    said = " ".join(log.read_text().split())
    assert said.count("is made again: it was made from other iterates") >= 3
    assert by_stage(result(run)) == by_stage(expected)


def test_a_file_that_does_not_belong_to_an_artefact_is_named(
    world: tuple[Path, dict[str, str], Counter[str]], tmp_path: Path
) -> None:
    folder, _, _ = world
    run, log = Path(shutil.copytree(folder / "run", tmp_path / "run")), tmp_path / "log"
    (run / "iterations/1/adapter/notes.txt").write_text("mine")
    for command in (settings(folder, run), ["evaluate", str(run), "--heldout=tiny"]):
        log.unlink(missing_ok=True)
        assert finish(command, log) == EXIT_INPUT
        printed = " ".join(log.read_text().split())
        assert "1/adapter/notes.txt: does not belong to this artefact; move it" in printed


def test_an_edited_manifest_is_refused(
    world: tuple[Path, dict[str, str], Counter[str]], tmp_path: Path
) -> None:
    folder, _, _ = world
    run, log = Path(shutil.copytree(folder / "run", tmp_path / "run")), tmp_path / "log"
    text = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(text.replace('"alpha": 0.8', '"alpha": 0.9'))
    assert (run / "manifest.json").read_text() != text
    export = ["export", str(run), f"--to={tmp_path / 'out'}", "--vllm"]
    for command in (settings(folder, run), ["evaluate", str(run)], export, ["report", str(run)]):
        log.unlink(missing_ok=True)
        assert finish(command, log) == EXIT_INPUT
        assert "manifest.json: was edited" in " ".join(log.read_text().split()), command


def test_a_second_process_is_refused(
    world: tuple[Path, dict[str, str], Counter[str]], tmp_path: Path
) -> None:
    folder, expected, _ = world
    arguments = settings(folder, tmp_path / "run")
    first = start(arguments, tmp_path / "first", ("training", 1), "SIGSTOP")
    while not list((tmp_path / "run").rglob("reference/*")):
        time.sleep(0.05)
    assert finish(arguments, tmp_path / "second") == EXIT_INPUT
    assert f"process {first.pid} is working in this run folder" in (tmp_path / "second").read_text()
    while first.is_alive() and first.exitcode is None and not _stopped(first.pid):
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGCONT)
    first.join(180)
    assert first.exitcode == 0
    assert result(tmp_path / "run") == expected


def test_another_configuration_is_refused(
    world: tuple[Path, dict[str, str], Counter[str]], tmp_path: Path
) -> None:
    folder, _, _ = world
    before = {p: file_hash(p) for p in (folder / "run").rglob("*") if p.is_file()}
    log = tmp_path / "log"
    assert finish(settings(folder, folder / "run", **{"train.lr": "2e-3"}), log) == EXIT_INPUT
    assert "train.lr" in log.read_text() and "0.002" in log.read_text()
    after = {p: file_hash(p) for p in (folder / "run").rglob("*") if p.is_file()}
    assert {p: h for p, h in after.items() if p.name != "lock"} == {
        p: h for p, h in before.items() if p.name != "lock"
    }


def test_every_artefact_is_hashed_and_nothing_is_pickled(
    world: tuple[Path, dict[str, str], Counter[str]],
) -> None:
    run = world[0] / "run"
    adapters = [path.parent for path in run.rglob("adapter_model.safetensors")]
    assert adapters and all((folder / HASHES).is_file() for folder in adapters)
    kinds = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jsonl", ".safetensors", ".html", ""}


def _stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
