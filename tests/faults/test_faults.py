"""A disk that fails at any call, loses power, or flips a bit costs no result.

One traced run gives the folder as it is after every call: see `disk`. A sample of the calls in CI,
all of them with ALPHASPIN_SWEEP=1 (`make test-all`).
"""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from helpers import arithmetic, save_model, write_rows
from test_resume import by_stage, finish, result, settings

from alphaspin.errors import EXIT_INPUT
from alphaspin.foundation.runs import TEMPORARY
from faults import disk

SWEEP = bool(os.environ.get("ALPHASPIN_SWEEP"))
STATES = 0 if SWEEP else 42  # 0: all that differ
ERRORS = 400 if SWEEP else 10
PARTS = 6
FLIPS = 200 if SWEEP else 14


class Traced(NamedTuple):
    """A run, what came of it, and the calls that made it."""

    folder: Path
    expected: dict[str, str]
    calls: list[disk.Call]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    write_rows(folder / "data.jsonl", arithmetic(40))
    root, log, trace = folder / "disk", folder / "log", folder / "trace"
    root.mkdir()
    faults = {"root": root, "trace": trace}
    assert finish(settings(folder, root / "run"), log, faults=faults) == 0, log.read_text()
    calls = disk.read_trace(trace, root)
    again = disk.after(calls, len(calls), "killed", folder / "again")
    assert contents(again) == contents(root)  # the trace has all that happened
    return Traced(folder, result(root / "run"), calls)


def contents(root: Path) -> dict[str, str]:
    """Hash of every file."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def ends_as_expected(run: Path, traced: Traced, log: Path) -> None:
    """The same command, started again, ends with the same bits and leaves nothing behind."""
    assert finish(settings(traced.folder, run), log) == 0, log.read_text()
    assert result(run) == traced.expected
    assert not list(run.rglob(f"{TEMPORARY}*"))


@pytest.mark.parametrize("part", range(PARTS))
def test_killed_or_dark_at_any_call(traced: Traced, tmp_path: Path, part: int) -> None:
    """States that differ, spread evenly over the calls and the three ways to end there."""
    total = len(traced.calls)
    points = [(k, state) for k in range(1, total + 1) for state in disk.STATES]
    if STATES:
        points = [points[i] for i in np.linspace(0, len(points) - 1, STATES).astype(int)]
    seen: set[str] = set()
    for k, state in np.array_split(np.array(points, object), PARTS)[part]:
        root = disk.after(traced.calls, k, state, tmp_path / "disk")
        key = json.dumps(contents(root))
        if key in seen:
            continue
        seen.add(key)
        try:
            ends_as_expected(root / "run", traced, tmp_path / "log")
        except AssertionError as error:
            raise AssertionError(f"after call {k} of {total}, {state}: {error}") from error
    assert len(seen) > min(STATES or 60, 60) // PARTS // 2


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_call_that_fails(traced: Traced, tmp_path: Path, error: int) -> None:
    """One line, exit code 2, and the command goes on; or the call was not needed."""
    total = len(traced.calls)
    for k in sorted({*np.linspace(1, total, min(total, ERRORS)).astype(int).tolist()}):
        root, log = tmp_path / "disk", tmp_path / f"log-{k}"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        arguments = settings(traced.folder, root / "run")
        code = finish(arguments, log, faults={"root": root, "k": k, "error": error})
        said = log.read_text()
        assert code in (0, EXIT_INPUT) and "Traceback" not in said, f"call {k}: {said}"
        assert code == 0 or os.strerror(error) in " ".join(said.split()), f"call {k}: {said}"
        ends_as_expected(root / "run", traced, log)


def test_killed_again_while_it_goes_on(traced: Traced, tmp_path: Path) -> None:
    """Killed by the library itself, three times, each in the work that the one before left."""
    random = np.random.default_rng(0)
    for number in range(20 if SWEEP else 2):
        root, log = tmp_path / f"disk-{number}", tmp_path / f"log-{number}"
        root.mkdir()
        for _ in range(3):
            k = int(random.integers(1, len(traced.calls) // 3))
            finish(settings(traced.folder, root / "run"), log, faults={"root": root, "k": k})
        ends_as_expected(root / "run", traced, log)


@pytest.mark.parametrize("ended", [True, False])
def test_a_flipped_bit_is_found_or_harmless(traced: Traced, tmp_path: Path, ended: bool) -> None:
    """In any file of a run that has ended, or of one that was killed in its second iteration.

    The same command ends with the same bits, or names the file; what it says itself of the run
    (log of metrics, page, summary) may show the flip.
    """
    random = np.random.default_rng(1 + ended)
    k = len(traced.calls) if ended else len(traced.calls) * 2 // 3
    for number in range(FLIPS // 2):
        root = disk.after(traced.calls, k, "killed", tmp_path / "disk")
        run, log = root / "run", tmp_path / f"log-{number}"
        files = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
        file = files[random.integers(len(files))]
        content = bytearray(file.read_bytes())
        at, bit = int(random.integers(len(content))), int(random.integers(8))
        content[at] ^= 1 << bit
        file.write_bytes(content)
        code = finish(settings(traced.folder, run), log)
        said, which = " ".join(log.read_text().split()), f"{file}, byte {at}, bit {bit}"
        assert "Traceback" not in said, f"{which}: {said}"
        if code:
            assert code == EXIT_INPUT and file.name in said, f"{which}: {said}"
            continue
        found, expected = by_stage(result(run)), by_stage(traced.expected)
        if file.name == "metrics.jsonl":
            del found["metrics"], expected["metrics"]
        if {"opponents", "reference"} & {*file.parts}:  # of an iteration that has ended, perhaps
            del found[str(file.relative_to(run))], expected[str(file.relative_to(run))]
        assert found == expected, which
