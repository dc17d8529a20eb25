"""A disk that fails at any call, loses power, or flips a bit costs no result.

One traced start of each command gives the folder as it is after every call: see `disk`. A sample of
the calls in CI, all of them with ALPHASPIN_SWEEP=1 (`make test-all`).
"""

import contextlib
import copy
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import arithmetic, save_model, write_rows
from test_resume import finish, settings

from alphaspin.errors import EXIT_INPUT
from alphaspin.foundation.artefacts import TEMPORARY
from alphaspin.foundation.runs import Run
from faults import disk

SWEEP = bool(os.environ.get("ALPHASPIN_SWEEP"))
ERRORS = 400 if SWEEP else 4
FLIPS = 200 if SWEEP else 8
PARTS = 6 if SWEEP else 3

SPPO = {
    "method": "sppo",
    "judge.kind": "verifiable",
    "control": "none",
    "preference.responses": "2",
    "selfplay.mixing": "false",
    "loss.nll_weight": "",
    "reference.alpha": "",
    "selfplay.history": "",
}


def sppo(folder: Path) -> list[str]:
    options = settings(folder, folder / "disk/run", **SPPO)
    return [option for option in options if not option.endswith("=")]


def gflownet(folder: Path) -> list[str]:
    sizes = {"prompts": 6, "epochs": 2, "batch_size": 3, "answers": 8, "checkpoint_every": 1}
    return [
        "gflownet",
        f"--model={folder / 'model'}",
        f"--adapter={folder / 'disk/run/iterations/0/adapter'}",
        f"--data={folder / 'data.jsonl'}",
        f"--output={folder / 'disk/sampler'}",
        *("--text.max_response_tokens=5", "--check_prompts=2", "--check_answers=4"),
        *(f"--gflownet.{key}={value}" for key, value in sizes.items()),
    ]


COMMANDS: dict[str, tuple[int, bool, Callable[[Path], list[str]]]] = {
    # points in CI, whether it is about a finished run, its arguments
    "spin": (15, False, lambda folder: settings(folder, folder / "disk/run")),
    "sppo": (4, False, sppo),
    "gflownet": (4, True, gflownet),
    "evaluate": (4, True, lambda f: ["evaluate", f"{f}/disk/run", f"--heldout={f}/more.jsonl"]),
    "merge": (3, True, lambda f: ["export", f"{f}/disk/run", f"--to={f}/disk/out", "--merge"]),
    "vllm": (3, True, lambda f: ["export", f"{f}/disk/run", f"--to={f}/disk/out", "--vllm"]),
    "report": (2, True, lambda f: ["report", f"{f}/disk/run"]),
}
OPENING = ("train", "gflownet", "evaluate")
"""Commands that begin by opening the folder as a `Run`."""
POINTS = [(name, part) for name in COMMANDS for part in range(PARTS if name == "spin" else 1)]


class Traced(NamedTuple):
    """A command, the disk before it, the calls it made, what came of it, and what is known of it.

    ended: `opened` of folders from which it ended as it should.
    """

    folder: Path
    command: list[str]
    start: disk.Disk
    calls: list[disk.Call]
    expected: dict[str, Any]
    ended: set[str]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Traced]:
    """Of a name in `COMMANDS`; the run that some are about is made once."""
    base, known = tmp_path_factory.mktemp("world"), dict[str, Traced]()
    save_model(base / "model")
    write_rows(base / "data.jsonl", arithmetic(40))
    write_rows(base / "more.jsonl", arithmetic(46)[40:])

    def trace(name: str) -> Traced:
        if name in known:
            return known[name]
        _, finished, arguments = COMMANDS[name]
        folder = base / name
        folder.mkdir()
        for path in (base / "model", base / "data.jsonl", base / "more.jsonl"):
            (folder / path.name).symlink_to(path)
        root, log, file = folder / "disk", folder / "log", folder / "trace"
        root.mkdir()
        if finished:
            spin = trace("spin")
            disk.after(spin.start, spin.calls, len(spin.calls), "killed", root)
        start, command = disk.Disk(root), arguments(folder)
        faults = {"root": root, "trace": file}
        assert finish(command, log, faults=faults) == 0, log.read_text()
        calls = disk.read_trace(file, root)
        again = disk.after(start, calls, len(calls), "killed", folder / "again")
        assert contents(again) == contents(root)  # the trace has all that happened
        known[name] = Traced(folder, command, start, calls, essence(root), set())
        return known[name]

    return trace


def contents(root: Path) -> dict[str, str]:
    """Hash of every file."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


TIMED = ("tokens_per_second", "seconds")


def untimed(line: str) -> str:
    """A line of the metrics without what the clock says; nothing where that is all."""
    try:
        record = json.loads(line)
    except ValueError:  # torn
        return line
    timed = record["stage"].startswith("time/")
    return "" if timed else json.dumps({k: v for k, v in record.items() if k not in TIMED})


def opened(case: Traced, place: Path) -> str:
    """What the next start finds, once it has opened the run and thrown away what is half written.

    What comes of it is a function of that: of several states that are one then, one is resumed.
    `place` is no use afterwards.
    """
    more: list[str] = []
    if case.command[0] in OPENING:
        for manifest in place.glob("*/manifest.json"):
            with contextlib.suppress(ValueError, LookupError):  # damaged: as it is
                Run(manifest.parent, json.loads(manifest.read_text())["identity"]).close()
        for path in [*place.glob("*/lock"), *place.glob("*/report.html")]:
            path.unlink()
        for path in [*place.glob("*/metrics.jsonl")]:
            more += map(untimed, path.read_text().split("\n"))
            path.unlink()
        for path in [*place.glob("*/summary.json")]:
            with contextlib.suppress(ValueError):
                summary = json.loads(path.read_text())
                more.append(json.dumps({**summary, "seconds": 0, "sha256": 0}))
                path.unlink()
    return json.dumps([contents(place), *filter(None, more)])


def essence(root: Path) -> dict[str, Any]:
    """The same, but of what tells of times and processes only the rest, in an order of its own."""
    found: dict[str, Any] = contents(root)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = str(path.relative_to(root))
        if path.name in ("lock", "report.html", "verdicts"):
            del found[name]
        elif path.name == "metrics.jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            kept = [
                {key: value for key, value in record.items() if key not in TIMED}
                for record in records
                if not record["stage"].startswith("time/")
            ]
            found[name] = sorted(kept, key=lambda r: (r["stage"], r["step"], "alarm" in r))
        elif path.name in ("summary.json", "manifest.json"):
            content = json.loads(path.read_text())
            found[name] = {k: content[k] for k in ("rows", "adapters") if k in content}
    return found


def ends_as_expected(traced: Traced, root: Path, log: Path) -> None:
    """The same command, started again, ends with the same bits and leaves nothing behind."""
    shutil.copytree(root, again := root.with_name("again"))
    key = opened(traced, again)
    shutil.rmtree(again)
    if key in traced.ended:
        return
    code = finish(moved(traced, root), log)
    assert code == 0 or "exists already" in " ".join(log.read_text().split()), log.read_text()
    assert essence(root) == traced.expected
    assert not list(root.rglob(f"{TEMPORARY}*"))
    traced.ended.add(key)


def moved(traced: Traced, root: Path) -> list[str]:
    """The command about another disk."""
    return [word.replace(str(traced.folder / "disk"), str(root)) for word in traced.command]


@pytest.mark.parametrize(("name", "part"), POINTS)
def test_killed_or_dark_at_any_call(
    traced: Callable[[str], Traced], tmp_path: Path, name: str, part: int
) -> None:
    """States that differ, spread evenly over the calls and the three ways to end there."""
    case, sample = traced(name), COMMANDS[name][0]
    total = len(case.calls)
    points = [(k, state) for k in range(1, total + 1) for state in disk.STATES]
    if not SWEEP:
        points = [points[i] for i in np.linspace(0, len(points) - 1, sample).astype(int)]
    parts = PARTS if name == "spin" else 1
    now, done = copy.deepcopy(case.start), 0
    for k, state in points[part::parts]:
        root = tmp_path / "disk"
        for call in case.calls[done:k]:
            now.apply(call)
        done = k
        now.lay_out(state, root)
        known = opened(case, root) in case.ended
        shutil.rmtree(root)
        if known:
            continue
        now.lay_out(state, root)
        try:
            ends_as_expected(case, root, tmp_path / "log")
        except AssertionError as error:
            raise AssertionError(f"after call {k} of {total}, {state}: {error}") from error
        shutil.rmtree(root)
    print(f"{name}: {len(points[part::parts])} points, {len(case.ended)} states were resumed")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_call_that_fails(traced: Callable[[str], Traced], tmp_path: Path, error: int) -> None:
    """One line, exit code 2, and the command goes on; or the call was not needed."""
    case = traced("spin")
    total = len(case.calls)
    points = sorted({*np.linspace(1, total, min(total, ERRORS)).astype(int).tolist()})
    for k in points if SWEEP else points[error == errno.EIO :: 2]:
        root, log = tmp_path / "disk", tmp_path / f"log-{k}"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        code = finish(moved(case, root), log, faults={"root": root, "k": k, "error": error})
        said = log.read_text()
        assert code in (0, EXIT_INPUT) and "Traceback" not in said, f"call {k}: {said}"
        assert code == 0 or os.strerror(error) in " ".join(said.split()), f"call {k}: {said}"
        ends_as_expected(case, root, log)


def test_killed_again_while_it_goes_on(traced: Callable[[str], Traced], tmp_path: Path) -> None:
    """Killed by the library itself, three times, each in the work that the one before left."""
    case, random = traced("spin"), np.random.default_rng(0)
    for number in range(20 if SWEEP else 1):
        root, log = tmp_path / f"disk-{number}", tmp_path / f"log-{number}"
        root.mkdir()
        for _ in range(3):
            k = int(random.integers(1, len(case.calls) // 3))
            finish(moved(case, root), log, faults={"root": root, "k": k})
        ends_as_expected(case, root, log)


@pytest.mark.parametrize("ended", [True, False])
def test_a_flipped_bit_is_found_or_harmless(
    traced: Callable[[str], Traced], tmp_path: Path, ended: bool
) -> None:
    """In any file of a run that has ended, or of one that was killed in its second iteration.

    The same command ends with the same bits, or names the file.
    """
    case, random = traced("spin"), np.random.default_rng(1 + ended)
    k = len(case.calls) if ended else len(case.calls) * 2 // 3
    for number in range(FLIPS // 2):
        root, log = tmp_path / "disk", tmp_path / f"log-{number}"
        disk.after(case.start, case.calls, k, "killed", root)
        files = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
        file = files[random.integers(len(files))]
        content = bytearray(file.read_bytes())
        at, bit = int(random.integers(len(content))), int(random.integers(8))
        content[at] ^= 1 << bit
        file.write_bytes(content)
        code = finish(moved(case, root), log)
        said, which = " ".join(log.read_text().split()), f"{file}, byte {at}, bit {bit}"
        assert "Traceback" not in said, f"{which}: {said}"
        if code:
            assert code == EXIT_INPUT and file.name in said, f"{which}: {said}"
            continue
        if file.name == "metrics.jsonl":  # it may not even be one of lines of JSON any more
            file.write_text("")
        found, expected = essence(root), dict(case.expected)
        # Numbers of a log of numbers cannot be checked; nothing reads answers and log-probs of an
        # iteration that has ended.
        if file.name == "metrics.jsonl" or {"opponents", "reference"} & {*file.parts}:
            del found[str(file.relative_to(root))], expected[str(file.relative_to(root))]
        assert found == expected, which
