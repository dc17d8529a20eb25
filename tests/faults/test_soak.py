"""Long runs keep their size, and odd surroundings change nothing."""

import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from helpers import arithmetic, save_model, write_rows
from test_resume import finish, result, settings, start

from alphaspin import Callback, play
from alphaspin.errors import EXIT_RESUMABLE

ITERATIONS = 20 if os.environ.get("ALPHASPIN_SWEEP") else 10


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    write_rows(folder / "data.jsonl", arithmetic(40))
    log = folder / "log"
    assert finish(settings(folder, folder / "run"), log) == 0, log.read_text()
    return folder, result(folder / "run")


def test_iterations_grow_by_their_artefacts_alone(tmp_path: Path) -> None:
    """Fictitious play: all earlier iterates stay opponents, and each iteration costs the same."""
    save_model(tmp_path / "model")
    write_rows(tmp_path / "data.jsonl", arithmetic(60))
    sizes: list[tuple[int, int, int, int]] = []

    class Watch(Callback):
        def on_iterate(self, iteration: int, adapter: Path) -> None:
            files = [path for path in adapter.parent.rglob("*") if path.is_file()]
            disk = sum(path.stat().st_size for path in files)
            sizes.append((resident(), len(os.listdir("/proc/self/fd")), disk, len(files)))

    play(
        {
            "model": str(tmp_path / "model"),
            "data": str(tmp_path / "data.jsonl"),
            "output": str(tmp_path / "run"),
            "control": "none",
            "evaluate": {"prompts": 2},
            "text": {"max_response_tokens": 8},
            "selfplay": {"iterations": ITERATIONS, "prompts": 20, "opponent": "fictitious"},
            "lora": {"r": 2},
            "train": {"batch_size": 10, "checkpoint_every": 1},
        },
        callbacks=[Watch()],
    )
    memory, handles, disk, files = zip(*sizes, strict=True)
    assert len(set(handles[2:])) == 1
    assert memory[-1] - memory[4] < 40 * 2**20, [size >> 20 for size in memory]
    # An opponent more is a shard more, with its two files' headers, of fewer answers each.
    assert all(b - a <= 2 for a, b in pairwise(files)), files
    assert all(b - a < 2048 for a, b in pairwise(disk)), disk


def test_a_storm_of_signals(world: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """SIGTERM after SIGTERM: the first one saves, later ones may kill; nothing is lost."""
    folder, expected = world
    arguments, log = settings(folder, tmp_path / "run"), tmp_path / "log"
    codes: list[int] = []
    for wait in (1.0, 2.0, 3.0, 1.5):
        process = start(arguments, log)
        time.sleep(wait)
        for _ in range(20):
            if not process.is_alive():
                break
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.1)
        process.join(60)
        codes.append(process.exitcode)
    assert {*codes} <= {0, EXIT_RESUMABLE, -signal.SIGTERM}
    assert finish(arguments, log) == 0, log.read_text()
    assert result(tmp_path / "run") == expected and "Traceback" not in log.read_text()


def test_stopped_for_a_while_and_moved(world: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """SIGSTOP and SIGCONT; killed; the folder moved to a name with blanks; gone on with there."""
    folder, expected = world
    log = tmp_path / "log"
    process = start(settings(folder, tmp_path / "run"), log)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.5)
    process.kill()
    process.join()
    moved = tmp_path / "a folder, moved"
    shutil.move(tmp_path / "run", moved)
    assert finish(settings(folder, moved), log) == 0, log.read_text()
    assert result(moved) == expected


def test_without_home_locale_or_output(world: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, expected = world
    command = [sys.executable, "-m", "alphaspin.cli", *settings(folder, tmp_path / "run")]
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")}
    done = subprocess.run(
        ["sh", "-c", '"$@" >&- 2>&-', "sh", *command],
        env={**kept, "LC_ALL": "C", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        timeout=180,
    )
    assert done.returncode == 0
    assert result(tmp_path / "run") == expected
