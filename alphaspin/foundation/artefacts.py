"""Durable artefacts of a run, and its manifest.

An artefact is a folder. It is written under a temporary name, its files are hashed into
`hashes.json`, everything is flushed to disk, and the folder is renamed; only then does it exist.
A reader accepts a folder whose files have the recorded hashes and nothing else, so a process killed
at any instant leaves either the whole artefact or none. `hashes.json` also says where the artefact
belongs: the run, its place there (with the kind and the iteration), and what it was made from; so
one that was copied from elsewhere does not count. Nothing is pickled. A record is a file of JSON
that says the same of itself, with a hash of all that it says.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError

from alphaspin.errors import InputError
from alphaspin.foundation import console

HASHES = "hashes.json"
MANIFEST = "manifest.json"
PARTS = ("config", "environment", "metrics", "trackers")
"""Of a manifest, beside what each has: keys and values all."""
SEAL = "sha256"
TEMPORARY = ".tmp-"
EDITED = (
    "was edited, but is a record and no place for settings; restore it, or choose another --output"
)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(folder: Path, patterns: Sequence[str]) -> str:
    """SHA-256 over the sorted names and hashes of a folder's files that match a pattern."""
    names = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    lines = [f"{path.relative_to(folder)} {file_hash(path)}\n" for path in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def flush(path: Path) -> None:
    """Make a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> Path:
    """Create a folder and its parents so that they survive a power cut.

    Raises:
        InputError: a link is there that leads to nothing.
    """
    missing = [folder, *folder.parents]
    missing = [path for path in missing if not path.exists()]
    for path in missing:
        if path.is_symlink():
            raise InputError(
                f"{path}: is a link to {path.readlink()}, where nothing is: make that folder, or "
                "name another"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        flush(path.parent)
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
def commit(folder: Path, inputs: Mapping[str, str] | None = None) -> Generator[Path]:
    """Write an artefact: the body fills the yielded temporary folder, which then becomes `folder`.

    An exception in the body, a full disk for instance, leaves nothing behind. A folder already
    there is replaced; callers get here only when it does not verify. `inputs`: hashes of what it is
    made from, by name, where run and place do not say it all.
    """
    make_folder(folder.parent)
    temporary = folder.with_name(TEMPORARY + folder.name)
    remove(temporary)
    temporary.mkdir()
    try:
        with _safetensors_as_os_errors():
            yield temporary
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        hashes = {path.relative_to(temporary).as_posix(): file_hash(path) for path in files}
        record = {"of": _whose(folder), "inputs": inputs or {}, "files": hashes}
        (temporary / HASHES).write_text(json.dumps(record, indent=1))
        for path in [*files, temporary / HASHES, temporary]:
            flush(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    remove(folder)
    temporary.rename(folder)
    flush(folder.parent)


def remove(folder: Path) -> None:
    """Delete an artefact. It loses its name first, so that half of it is never found under it."""
    if folder.exists():
        doomed = folder.with_name(f"{TEMPORARY}old-{folder.name.removeprefix(TEMPORARY)}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        if doomed.is_dir():
            shutil.rmtree(doomed)
        else:  # what somebody put there
            doomed.unlink()


def _whose(path: Path) -> dict[str, str]:
    """The run that a path is in and its place there; nothing where no run is around, or one that
    was begun by a version whose artefacts did not say so."""
    for root in path.absolute().parents:
        if (root / MANIFEST).is_file() and (manifest := _manifest(root / MANIFEST)):
            place = path.absolute().relative_to(root).as_posix()
            return {"run": run_id(manifest), "place": place} if SEAL in manifest else {}
    return {}


def run_id(manifest: dict[str, Any]) -> str:
    """What a run's artefacts call it: the hash of all that decides its result."""
    return _hash_of(manifest["identity"])


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def recorded(folder: Path) -> dict[str, str]:
    """Hashes of an artefact's files by name, as they were when it was made."""
    record: dict[str, Any] = json.loads((folder / HASHES).read_text(encoding="utf-8"))
    return record.get("files", record)


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    """What `hashes.json` records, and what is wrong with the files, or nothing."""
    try:
        record: dict[str, Any] = json.loads((folder / HASHES).read_text(encoding="utf-8"))
        files: dict[str, str] = record.get("files", record)
        wrong = [name for name, digest in files.items() if file_hash(folder / name) != digest]
        extra = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
        extra -= {*files, HASHES}
    except FileNotFoundError as error:
        return {}, f"{error.filename} is missing"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return {}, f"{folder / HASHES} cannot be read ({error})"
    if extra:
        raise InputError(
            f"{folder / min(extra)}: does not belong to this artefact; move it elsewhere, or "
            "delete the whole folder, which is then made again"
        )
    if wrong or not files:
        return {}, f"{folder / min(wrong, default=HASHES)} is damaged"
    return record, ""


def intact(folder: Path) -> bool:
    """Whether an artefact is as it was written, wherever it belongs; raises what `fault` does."""
    return not _read(folder)[1]


def fault(folder: Path, inputs: Mapping[str, str] | None = None, *, silent: bool = False) -> str:
    """What is wrong with an artefact, or nothing.

    Artefacts of versions that did not write down where they belong count in the runs that these
    began, and wherever no run is around.

    Args:
        folder: the artefact.
        inputs: see `commit`; None where the caller does not know them.
        silent: it may also say nothing of them, as those of earlier versions do.

    Raises:
        InputError: it holds a file that does not belong to it.
    """
    record, wrong = _read(folder)
    if wrong:
        return wrong
    here = _whose(folder)
    if here and (elsewhere := _elsewhere(record.get("of"), here)):
        return elsewhere
    told = record.get("inputs")
    if inputs is not None and told != inputs and (told or not silent):
        return "it was made from other " + ", ".join(sorted(inputs))
    return ""


def _elsewhere(known: Any, here: dict[str, str]) -> str:
    """Where what is here says that it belongs; nothing if here."""
    if not isinstance(known, dict):
        return "it does not say what it is of"
    place, run = (cast("dict[str, Any]", known).get(key) for key in ("place", "run"))
    other = "" if run == here["run"] else " of another run"
    return f"it is {place or 'an artefact'}{other}" if known != here else ""


def verifies(folder: Path, inputs: Mapping[str, str] | None = None) -> bool:
    """Whether `folder` is a whole artefact, and the one that belongs there; see `fault`."""
    return not fault(folder, inputs)


def stands(
    folder: Path,
    inputs: Mapping[str, str] | None = None,
    *,
    silent: bool = False,
    otherwise: str = "made again",
) -> bool:
    """The same; says why one that is there does not stand, and what is done about it."""
    found = fault(folder, inputs, silent=silent)
    if found and folder.exists():
        console.note(f"{folder} is {otherwise}: {found}")
    return not found


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file as a whole, durably."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    flush(path.parent)


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a file of JSON, sealed, with where it belongs."""
    write_atomically(path, json.dumps(sealed({**values, "of": _whose(path)}), indent=1))


def read_record(path: Path, remedy: str) -> dict[str, Any]:
    """What `write_record` wrote.

    Files of versions that sealed none count in the runs that these began, and wherever no run is
    around.

    Args:
        path: the file.
        remedy: what makes it again.

    Raises:
        InputError: it is missing, damaged or edited, or belongs elsewhere.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            raise ValueError("no object")
    except FileNotFoundError:
        raise InputError(f"{path}: missing; {remedy}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}; {remedy}") from None
    record, here = cast("dict[str, Any]", known), _whose(path)
    wrong = ""
    if (here or SEAL in record) and record != sealed(record):
        wrong = "it is not as it was written"
    elif here:
        wrong = _elsewhere(record["of"], here)
    if wrong:
        raise InputError(f"{path}: {wrong}; {remedy}")
    return record


def _manifest(path: Path) -> dict[str, Any]:
    """A run's manifest; nothing where the file is something else.

    Raises:
        InputError: it is not as it was written.
    """
    manifest: dict[str, Any] = {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        parts = [manifest["identity"], manifest["adapters"]]
        parts += [manifest[key] for key in PARTS if key in manifest]
        hashes = manifest["adapters"].values()
        if not all(isinstance(part, dict) for part in parts) or not all(
            isinstance(digest, str) for digest in hashes
        ):
            return {}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}
    if SEAL in manifest and manifest != sealed(manifest):
        raise InputError(f"{path}: {EDITED}")
    return manifest


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A manifest, or another record, with the hash of all else that it says."""
    rest = {key: value for key, value in record.items() if key != SEAL}
    return {**rest, SEAL: _hash_of(rest)}


def read_manifest(path: Path) -> dict[str, Any]:
    """A run's `manifest.json`.

    Raises:
        InputError: it is damaged or edited.
    """
    if not (manifest := _manifest(path)):
        raise InputError(f"{path}: damaged; restore it, or choose another --output")
    # Artefacts say which run they are of where its manifest is sealed.
    if SEAL not in manifest and any(map(_says_whose, path.parent.rglob(HASHES))):
        raise InputError(f"{path}: {EDITED}")
    return manifest


def _says_whose(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("of"))
    except (OSError, ValueError, AttributeError):
        return False
