"""What a disk holds after the k-th file-system call of a traced process: killed, or cut off power.

A file's content lasts once the file was flushed, its name once its folder was. Until then a kernel
may have written both, one, or neither. `killed` has all calls up to k; `dark` what lasted and no
more; `nameless` all names, but of the contents only those that lasted, as a file system that orders
its names but not its data leaves it.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

State = Literal["killed", "dark", "nameless"]
STATES: tuple[State, ...] = ("killed", "dark", "nameless")


@functools.cache
def library() -> Path:
    """`inject.c`, compiled for this session."""
    found = Path(tempfile.mkdtemp(prefix="faults-")) / "inject.so"
    source = Path(__file__).with_name("inject.c")
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", found, source, "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return found


def arm(root: Path, *, k: int = 0, error: int = 0, trace: Path | None = None) -> None:
    """In a process that preloads `library()`: count the calls that change something under `root`.

    Args:
        root: an existing folder.
        k: the call that fails with errno `error`, or, where that is 0, kills the process.
        trace: file for the calls, outside of `root`.
    """
    function = ctypes.CDLL(os.environ["FAULTS"]).fault_arm
    function(os.fsencode(root), ctypes.c_long(k), error, os.fsencode(trace) if trace else None)


class Call(NamedTuple):
    """A record of the trace, see `inject.c`; paths are relative to the root."""

    tag: str
    ino: int
    offset: int
    path: str
    other: str
    data: bytes


def read_trace(trace: Path, root: Path) -> list[Call]:
    """All calls in their order.

    Raises:
        AssertionError: something changed the disk in a way that the trace does not follow.
    """
    return list(_calls(trace.read_bytes(), str(root.resolve())))


def _calls(content: bytes, root: str) -> Iterator[Call]:
    at = 0

    def text(end: bytes) -> str:
        nonlocal at
        stop = content.index(end, at)
        found, at = content[at:stop].decode(), stop + 1
        return found

    while at < len(content):
        tag, ino, offset, length = (text(b" ") for _ in range(4))
        path = os.path.relpath(text(b"\0"), root)
        other = os.path.relpath(text(b"\0"), root) if tag == "R" else ""
        assert tag != "X", f"{path} is changed by a call that the trace does not follow"
        data = content[at : at + int(length)]
        at += int(length)
        yield Call(tag, int(ino), int(offset), path, other, data)


@dataclass
class File:
    """Content now, and as it was last flushed."""

    now: bytearray = field(default_factory=bytearray)
    flushed: bytes = b""


@dataclass
class Folder:
    """Names now, and as they were last flushed."""

    now: "dict[str, File | Folder]" = field(default_factory=dict)
    flushed: "dict[str, File | Folder]" = field(default_factory=dict)


class Disk:
    """An empty root folder, and what calls make of it."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.root = Folder()
        self._inodes: dict[int, File | Folder] = {}

    def _find(self, path: str) -> "File | Folder":
        node: File | Folder = self.root
        for part in () if path == "." else path.split("/"):
            assert isinstance(node, Folder), path
            node = node.now[part]
        return node

    def _parent(self, path: str) -> tuple[dict[str, File | Folder], str]:
        folder = self._find(os.path.dirname(path) or ".")
        assert isinstance(folder, Folder), path
        return folder.now, os.path.basename(path)

    def _catch_up(self, call: Call) -> None:
        """A rename past the C library (Rust's `tempfile`) shows in the file's next call."""
        node = self._inodes.get(call.ino)
        if call.tag in "OTWS" and isinstance(node, File):
            names, name = self._parent(call.path)
            if names.get(name) is not node:
                (old,) = (key for key, value in names.items() if value is node)
                names[name] = names.pop(old)

    def apply(self, call: Call) -> None:
        """Let one call happen."""
        self._catch_up(call)
        if call.tag in "NM":
            names, name = self._parent(call.path)
            names[name] = self._inodes[call.ino] = File() if call.tag == "N" else Folder()
        elif call.tag == "R":
            (old, a), (new, b) = self._parent(call.path), self._parent(call.other)
            new[b] = old.pop(a)
        elif call.tag == "U":
            names, name = self._parent(call.path)
            del names[name]
        elif call.tag == "S":
            node = self.root if call.path == "." else self._inodes[call.ino]
            if isinstance(node, File):
                node.flushed = bytes(node.now)
            else:
                node.flushed = dict(node.now)
        else:
            node = self._inodes[call.ino]
            assert isinstance(node, File)
            if call.tag == "O":
                node.now.clear()
            elif call.tag == "T":
                node.now[call.offset :] = bytes(max(0, call.offset - len(node.now)))
            else:
                node.now.extend(bytes(max(0, call.offset - len(node.now))))
                node.now[call.offset : call.offset + len(call.data)] = call.data

    def lay_out(self, state: State, place: Path) -> None:
        """Write what is there in this state; `place` must not exist."""
        _lay_out(self.root, state, place)


def _lay_out(folder: Folder, state: State, place: Path) -> None:
    place.mkdir()
    for name, node in (folder.flushed if state == "dark" else folder.now).items():
        if isinstance(node, Folder):
            _lay_out(node, state, place / name)
        else:
            (place / name).write_bytes(node.now if state == "killed" else node.flushed)


def after(calls: list[Call], k: int, state: State, place: Path) -> Path:
    """The root folder after the first k calls; `place` is replaced."""
    disk = Disk()
    for call in calls[:k]:
        disk.apply(call)
    shutil.rmtree(place, ignore_errors=True)
    disk.lay_out(state, place)
    return place
