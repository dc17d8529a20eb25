"""The run folder: durable artefacts, the lock, metrics, and what a signal does.

An artefact is a folder. It is written under a temporary name, its files are hashed into
`hashes.json`, everything is flushed to disk, and the folder is renamed; only then does it exist.
A reader accepts a folder whose files have the recorded hashes and nothing else, so a process killed
at any instant leaves either the whole artefact or none. Nothing is pickled.
"""

import contextlib
import copy
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError

from alphaspin.errors import InputError, Interrupted
from alphaspin.foundation import locks
from alphaspin.foundation.paths import refuse_links

HASHES = "hashes.json"
TEMPORARY = ".tmp-"

HASHED = (
    ("base", "", "model"),
    ("data", "", "data"),
    ("heldout", "", "heldout"),
    ("data", "text", "template"),  # the tokens are hashed
    ("judge", "judge", "model"),
)
"""An entry of a run's identity that holds a hash, and the setting that tells where that is from."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(folder: Path, patterns: Sequence[str]) -> str:
    """SHA-256 over the sorted names and hashes of a folder's files that match a pattern."""
    names = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    lines = [f"{path.relative_to(folder)} {file_hash(path)}\n" for path in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> Path:
    """Create a folder and its parents so that they survive a power cut."""
    missing = [folder, *folder.parents]
    missing = [path for path in missing if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        _flush(path.parent)
    return folder


@contextlib.contextmanager
def _safetensors_as_os_errors() -> Generator[None]:
    """safetensors reports a full disk in an exception of its own."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if not found:
            raise
        code = int(found.group(1))
        raise OSError(code, os.strerror(code)) from None


@contextlib.contextmanager
def commit(folder: Path) -> Generator[Path]:
    """Write an artefact: the body fills the yielded temporary folder, which then becomes `folder`.

    An exception in the body, a full disk for instance, leaves nothing behind. A folder already
    there is replaced; callers get here only when it does not verify.
    """
    make_folder(folder.parent)
    temporary = folder.with_name(TEMPORARY + folder.name)
    remove(temporary)
    temporary.mkdir()
    try:
        with _safetensors_as_os_errors():
            yield temporary
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        hashes = {str(path.relative_to(temporary)): file_hash(path) for path in files}
        (temporary / HASHES).write_text(json.dumps(hashes, indent=1))
        for path in [*files, temporary / HASHES, temporary]:
            _flush(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    remove(folder)
    temporary.rename(folder)
    _flush(folder.parent)


def remove(folder: Path) -> None:
    """Delete an artefact. It loses its name first, so that half of it is never found under it."""
    if folder.exists():
        doomed = folder.with_name(f"{TEMPORARY}old-{folder.name.removeprefix(TEMPORARY)}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def verifies(folder: Path) -> bool:
    """Whether `folder` is a whole artefact: each file has its recorded hash and none is missing."""
    try:
        hashes: dict[str, str] = json.loads((folder / HASHES).read_text())
        matches = [file_hash(folder / name) == digest for name, digest in hashes.items()]
        return bool(matches) and all(matches)
    except (OSError, ValueError, AttributeError):
        return False


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file as a whole, durably."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    _flush(path.parent)


Mirror = Callable[[Mapping[str, float], int], None]
"""Called with (values by name, global step) for each record of numbers."""


class Metrics:
    """`metrics.jsonl`: a JSON object a line, each with its `stage` (e.g. `train/0`) and `step`."""

    def __init__(
        self,
        path: Path,
        mirror: Mirror | None = None,
        *,
        writes: bool = True,
        tell: Callable[[str, int, Mapping[str, float | str]], None] = lambda *_: None,
    ):
        """Open `path`; `mirror` also gets the numbers (TensorBoard, wandb), `tell` the records.

        With `writes` off nothing is written: a file has one writer among several processes.
        """
        self._path = path
        self._mirror = mirror
        self._writes = writes
        self._tell = tell
        self._step = 0

    def read(self) -> list[dict[str, Any]]:
        """All whole records; a line torn by a kill, or anything else, is passed over."""
        records: list[dict[str, Any]] = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if isinstance(record, dict) and isinstance(record.get("stage"), str):
                        records.append(record)
        return records

    def rewind(self, stage: str, step: int = 0) -> None:
        """Forget what a stage recorded after `step`: that work is about to be repeated."""
        if not self._writes:
            return
        kept = [r for r in self.read() if r.get("stage") != stage or r.get("step", 0) <= step]
        write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._step = len(kept)

    def write(self, stage: str, step: int, values: Mapping[str, float | str]) -> None:
        """Append one record; not flushed to disk by itself, since `rewind` repairs a torn end."""
        if not self._writes:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        self._step += 1
        self._tell(stage, step, values)
        if self._mirror:
            prefix = stage.split("/")[0]
            numbers = {f"{prefix}/{k}": v for k, v in values.items() if not isinstance(v, str)}
            self._mirror(numbers, self._step)


def read_manifest(path: Path) -> dict[str, Any]:
    """A run's `manifest.json`.

    Raises:
        InputError: it is damaged.
    """
    manifest: dict[str, Any] = {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        whole = "identity" in manifest and isinstance(manifest["adapters"], dict)
    except (ValueError, TypeError, LookupError):
        whole = False
    if not whole:
        raise InputError(f"{path}: damaged; restore it, or choose another --output") from None
    return manifest


class Run:
    """One run folder, locked by this process for as long as the object is open.

    The processes of a job share the lock: one of them opens the folder and shares it, the others
    join. So another job is refused until the last of them is gone.
    """

    def __init__(
        self,
        path: Path,
        identity: dict[str, Any],
        renewed: Callable[[dict[str, Any]], dict[str, Any]] = lambda known: known,
    ):
        """Create or reopen the folder.

        Args:
            path: created if missing.
            identity: what decides the result (configuration, hashes of base and data). A folder
                that holds a run of another identity is refused.
            renewed: the identity that is there, perhaps of an earlier version, as this one has it.

        Raises:
            InputError: another job has the folder, or it holds another run or other things.
        """
        if path.exists() and not path.is_dir():
            raise InputError(f"output = {path}: is a file")
        make_folder(path)
        refuse_links(path)
        names = {entry.name for entry in path.iterdir()}
        if names and not names & {"manifest.json", f"{TEMPORARY}manifest.json", "lock"}:
            raise InputError(f"output = {path}: is not empty and holds no run; choose another")
        self.path = path
        self._lock = (path / "lock").open("a+")
        self._flock(shared=False)
        self.owner = f"{os.getpid()}\n{socket.gethostname()} {time.time_ns()}\n"
        """What the lock holds: this process and, for `join`, which of its runs."""
        self._lock.truncate(0)
        self._lock.write(self.owner)
        self._lock.flush()
        try:
            self.manifest = self._open_manifest(identity, renewed)
            for leftover in [*path.rglob(f"{TEMPORARY}*")]:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        except BaseException:
            self.close()
            raise

    def _flock(self, *, shared: bool) -> None:
        if not locks.take(self._lock, shared=shared):
            owner = (self.path / "lock").read_text().partition("\n")[0]
            self.close()
            raise InputError(
                f"{self.path}: process {owner} is working in this run folder; wait for it, or "
                "choose another --output"
            )

    def share(self) -> None:
        """Let other processes `join`.

        Raises:
            InputError: another job was quicker, in the instant in which the lock is no one's.
        """
        self._flock(shared=True)

    @classmethod
    def join(cls, path: Path, owner: str) -> "Run":
        """The folder that another process of this job has opened and shared.

        Args:
            path: as in that process.
            owner: its `Run.owner`.

        Raises:
            InputError: at this path is not the same folder.
        """
        run = cls.__new__(cls)
        run.path, run.owner = path, owner
        try:
            run._lock = (path / "lock").open()
        except FileNotFoundError:
            seen = ""
        else:
            seen = run._lock.read()
            if seen != owner:
                run.close()
        if seen != owner:
            raise InputError(
                f"output = {path}: on {socket.gethostname()} this is not the folder that process 0 "
                "opened; all nodes must see it, on a file system that they share"
            )
        run._flock(shared=True)
        run.manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        return run

    def _open_manifest(
        self, identity: dict[str, Any], renewed: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        path = self.path / "manifest.json"
        identity = json.loads(json.dumps(identity))
        if path.exists():
            manifest = read_manifest(path)
            known = json.loads(json.dumps(renewed(manifest["identity"])))
            for line in differences(known, relocated(identity, known)):
                raise InputError(
                    f"{self.path} holds another run: {line}. Choose another --output, or give "
                    "this run's settings to go on with it"
                )
            return manifest
        manifest = {"identity": identity, "adapters": {}}
        write_atomically(path, json.dumps(manifest, indent=1))
        return manifest

    def record_adapter(self, stage: str, weights: Path) -> None:
        """Record an adapter's hash, or compare it with the one recorded.

        Raises:
            InputError: the file is another than the one that later artefacts were made with.
        """
        found, known = file_hash(weights), self.manifest["adapters"].get(stage)
        if known is None:
            self.record(adapters={stage: found})
        elif known != found:
            raise InputError(
                f"{weights}: is not the adapter that this run made ({found[:12]} on disk, "
                f"{known[:12]} in the manifest); restore it, or choose another --output"
            )

    def record(self, **entries: Any) -> None:
        """Add entries to `manifest.json`, durably; mappings are merged."""
        for name, value in entries.items():
            old = self.manifest.get(name)
            self.manifest[name] = {**old, **value} if isinstance(old, dict) else value
        text = json.dumps(self.manifest, indent=1)
        write_atomically(self.path / "manifest.json", text)

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()


def relocated(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """The settings `new`, with the paths of `old` where the hashes say that both mean the same.

    What was moved, or is spelled another way, is no other thing.
    """
    new = copy.deepcopy(new)
    for content, section, key in HASHED:
        whole = (settings.get("config", {}) for settings in (new, old))
        ours, theirs = (part.get(section, {}) if section else part for part in whole)
        if content in new and new[content] == old.get(content) and key in ours and key in theirs:
            ours[key] = theirs[key]
    return new


def differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """What two nested settings differ in, in half a sentence each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from differences(old.get(name), new.get(name), f"{key}.{name}".strip("."))
    elif old != new:
        yield f"its {key} is {old!r}, not {new!r}"


class SignalGuard:
    """Turns the first SIGTERM or SIGINT into a flag that long phases look at between units of work.

    The second one acts at once: what is on disk is whole anyway. Within a second of the first it is
    the same one, passed on by a launcher to processes that the terminal or scheduler told already.
    """

    def __init__(self) -> None:
        """Install the handlers; `restore` puts the old ones back."""
        self.requested = False
        self._first = 0.0
        self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested and time.monotonic() - self._first > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self.requested:
            self.requested, self._first = True, time.monotonic()

    def check(self) -> None:
        """For what one process does alone: stop here where a signal came.

        Raises:
            Interrupted: it did.
        """
        if self.requested:
            raise Interrupted

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
