"""A run folder: its lock and identity, its metrics, and what a signal does."""

import contextlib
import copy
import hashlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from alphaspin.errors import InputError, Interrupted
from alphaspin.foundation import locks
from alphaspin.foundation.artefacts import (
    MANIFEST,
    SEAL,
    TEMPORARY,
    file_hash,
    flush,
    make_folder,
    read_manifest,
    sealed,
    write_atomically,
)
from alphaspin.foundation.paths import refuse_links

HASHED = (
    ("base", "", "model"),
    ("data", "", "data"),
    ("heldout", "", "heldout"),
    ("data", "text", "template"),  # the tokens are hashed
    ("judge", "judge", "model"),
    ("start", "lora", "start"),
)
"""An entry of a run's identity that holds a hash, and the setting that tells where that is from."""


LOST = (
    "metrics.jsonl: the records of {} are missing or were edited; their curves, times and alarms "
    "are left out, and only the same run in another --output can make them again"
)

Mirror = Callable[[Mapping[str, float], int], None]
"""Called with (values by name, global step) for each record of numbers."""


class Metrics:
    """`metrics.jsonl`: a JSON object a line, each with its `stage` (e.g. `train/0`) and `step`."""

    def __init__(
        self,
        path: Path,
        mirror: Mirror | None = None,
        *,
        folder: "Run | None" = None,
        writes: bool = True,
        tell: Callable[[str, int, Mapping[str, float | str]], None] = lambda *_: None,
    ):
        """Open `path`; `mirror` also gets the numbers (TensorBoard, …), `tell` the records.

        Steps of the mirror count what it gets, so that one which goes on goes forwards; what an
        earlier process sent is not sent again, though that work may be repeated: the manifest of
        `folder` has how far each stage had come. With `writes` off nothing is written: a file has
        one writer among several processes.
        """
        self._path = path
        self._mirror = mirror
        self._writes = writes
        self._tell = tell
        self._folder = folder
        self._sent: dict[str, int] = {"": len(self.read())} if mirror else {}
        if mirror and folder:
            known = folder.manifest.get("sent", {})
            self._sent = {**known, "": max(self._sent[""], known.get("", 0))}
        """How far a stage had come that is repeated; under "" the mirror's own last step."""

    def read(self, but: Collection[str] = ()) -> list[dict[str, Any]]:
        """All whole records, but those of some stages; what is torn by a kill is passed over."""
        records: list[dict[str, Any]] = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        continue
                    if (type(record.get("stage")), type(record.get("step"))) == (str, int):
                        records.append(record)
        return [record for record in records if record["stage"] not in but]

    def digest(self, stage: str) -> str | None:
        """Hash of a stage's records, without the clock's part; None where there are none."""
        records = [record for record in self.read() if record["stage"] == stage]
        lines = [json.dumps({**record, "tokens_per_second": None}) for record in records]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else None

    def lost(self, manifest: Mapping[str, Any]) -> list[str]:
        """Stages that have ended, and whose records are not those that they ended with.

        Manifests of earlier versions do not know these; there have to be some.
        """
        known = manifest.get("metrics", {})
        found = {stage: self.digest(stage) for stage in manifest["adapters"]}
        return [
            stage
            for stage, digest in found.items()
            if not digest or digest != known.get(stage, digest)
        ]

    def rewind(self, stage: str, step: int = 0) -> None:
        """Forget what a stage recorded after `step`: that work is about to be repeated."""
        if not self._writes:
            return
        found = self.read()
        kept = [r for r in found if r.get("stage") != stage or r.get("step", 0) <= step]
        if self._mirror and self._folder and len(kept) < len(found):
            last = max(r.get("step", 0) for r in found if r.get("stage") == stage)
            self._sent[stage] = max(last, self._sent.get(stage, 0))
            self._folder.record(sent=self._sent)
        write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept))

    def keep(self) -> None:
        """Flush the records to disk: before work that they belong to is made durable."""
        if self._writes and self._path.exists():
            flush(self._path)

    def write(self, stage: str, step: int, values: Mapping[str, float | str]) -> None:
        """Append one record; unflushed (see `keep`): `rewind` repairs a torn end."""
        if not self._writes:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        if self._mirror and step > self._sent.get(stage, -1):
            self._sent[""] += 1
            prefix = stage.split("/")[0]
            numbers = {f"{prefix}/{k}": v for k, v in values.items() if not isinstance(v, str)}
            self._mirror(numbers, self._sent[""])
        self._tell(stage, step, values)


def clock(path: Path) -> str | None:
    """When the prompts of the run in a folder were rendered, in ISO 8601, for templates that print
    the date.

    Now, where there is no run yet; None where an earlier version did not record it.

    Raises:
        InputError: the manifest is damaged.
    """
    file = path / "manifest.json"
    if not file.is_file():
        return datetime.now().isoformat(timespec="seconds")
    return read_manifest(file)["identity"].get("clock")


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
        if names and not names & {MANIFEST, f"{TEMPORARY}{MANIFEST}", "lock"}:
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
        run.manifest = read_manifest(path / MANIFEST)
        return run

    def _open_manifest(
        self, identity: dict[str, Any], renewed: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        path = self.path / MANIFEST
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
        manifest = sealed({"identity": identity, "adapters": {}})
        write_atomically(path, json.dumps(manifest, indent=1))
        return manifest

    def record_adapter(self, stage: str, weights: Path, metrics: Metrics) -> None:
        """Record an adapter's hash and that of its metrics, or compare it with the one recorded.

        Raises:
            InputError: the file is another than the one that later artefacts were made with.
        """
        found, known = file_hash(weights), self.manifest["adapters"].get(stage)
        if known is None:
            self.record(adapters={stage: found}, metrics={stage: metrics.digest(stage)})
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
        if SEAL in self.manifest:  # earlier versions' runs stay as they were begun
            self.manifest = sealed(json.loads(json.dumps(self.manifest)))
        write_atomically(self.path / MANIFEST, json.dumps(self.manifest, indent=1))

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
