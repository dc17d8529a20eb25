"""Keeps a server alive for the process that started this one, and not a moment longer.

    python keeper.py SOCKET COMMAND …

When the server ends it is started again as often as the last digit on stdin says. It and all its
descendants end when stdin closes or the parent is gone, however that one dies; one that hangs, when
the parent says so by SIGUSR1. The exit code is the server's last. A file of its own, run by its
path: the standard library alone, so that it starts at once and has nothing to lose.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

TICK, PATIENCE, YOUNG = 0.2, 10.0, 30.0
"""Seconds between two looks; that a server has to end in order; before which none is said to hang,
as several processes may tell of the same."""
DEATH, SUBREAPER = 1, 36
"""PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of prctl(2)."""


def keep(socket: str, command: list[str]) -> int:
    """Start the server, and watch."""
    hanging = False

    def hang(*_: object) -> None:
        nonlocal hanging
        hanging = True

    signal.signal(signal.SIGUSR1, hang)
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's, who may want to finish a shard
        signal.signal(number, signal.SIG_IGN)
    prctl = ctypes.CDLL(None).prctl
    prctl(SUBREAPER, 1, 0, 0, 0)

    def start() -> subprocess.Popen[bytes]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket)
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            restore_signals=True,
            preexec_fn=lambda: prepare(prctl),
        )

    parent, restarts = os.getppid(), 0
    server, since = start(), time.monotonic()
    while os.getppid() == parent:
        if select.select([0], [], [], TICK)[0]:
            said = os.read(0, 1)
            if not said:
                break
            restarts = int(said)
        if hanging:
            hanging = False
            if time.monotonic() - since > YOUNG:
                end(server, 0)
        if server.poll() is not None:
            end(server, 0)
            if not restarts:
                break
            restarts, since = restarts - 1, time.monotonic()
            server = start()
    end(server, PATIENCE)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(socket)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def prepare(prctl: Any) -> None:
    """In the server's process, before it is the server: it dies with this one."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    prctl(DEATH, signal.SIGKILL, 0, 0, 0)


def end(server: subprocess.Popen[bytes], patience: float) -> None:
    """End the server, in order within `patience` seconds, and whatever it has started."""
    if server.poll() is None:
        server.terminate() if patience else server.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience or None)
    server.kill()
    server.wait()
    # Whoever has lost its parent is now a child of this process.
    with contextlib.suppress(ChildProcessError):
        while True:
            for child in children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            os.waitpid(-1, 0)


def children() -> list[int]:
    """Processes whose parent is this one."""
    found: list[int] = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="latin-1") as file:
            # pid (name) state ppid …, and a name may have brackets and spaces
            if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1], sys.argv[2:]))
