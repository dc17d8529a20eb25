"""Rows of files, folders and hub data sets, each with where it stands."""

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from alphaspin.errors import InputError

SUFFIXES = (".jsonl", ".json", ".parquet")


@contextmanager
def located(origin: str) -> Generator[None]:
    """Put before an `InputError` where what it is about stands."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error.__cause__


def read_rows(source: str, split: str) -> Iterator[tuple[Any, str]]:
    """Rows and their origins, in order; see `load_messages`."""
    path = Path(source).expanduser()
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if path.is_dir() and not saved:
        inside = (f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        # Hidden files and folders are other programs' caches.
        names = (file.relative_to(path) for file in inside)
        files = sorted(n for n in names if not any(part.startswith(".") for part in n.parts))
        if not files:
            raise InputError(f"{source}: no {', '.join(SUFFIXES)} file in this folder")
        for file in files:
            yield from _file_rows(path / file)
    elif saved or not (path.exists() or path.suffix in SUFFIXES or source[:1] in "./~"):
        yield from _dataset_rows(source, split, saved)
    else:
        yield from _file_rows(path)


def _file_rows(path: Path) -> Iterator[tuple[Any, str]]:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: a data file ends with one of {', '.join(SUFFIXES)}")
    empty = True
    try:
        for row in _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path):
            empty = False
            yield row
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if empty:
        raise InputError(f"{path}: no rows")


def _json_rows(path: Path) -> Iterator[tuple[Any, str]]:
    with path.open("rb") as file:
        offset = 3 if file.peek(3).startswith(b"\xef\xbb\xbf") else 0  # byte order mark
        file.seek(offset)
        # A .json file is a list of rows or, as is common, JSON lines under another name.
        listed = path.suffix == ".json" and file.peek(1).lstrip().startswith(b"[")
        for number, line in enumerate([file.read()] if listed else file, 1):
            if line.strip():
                value = _parse(line, path, number, offset)
                rows = cast("list[Any]", value) if listed else [value]
                for index, row in enumerate(rows):
                    yield row, f"{path}[{index}]" if listed else f"{path}:{number}"
            offset += len(line)


def _parse(data: bytes, path: Path, line: int, offset: int) -> Any:
    """JSON from bytes that begin at this line and byte offset of the file."""
    try:
        return json.loads(data.decode().rstrip())  # an error at the end belongs to the last line
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        reason = f"not UTF-8 at byte {offset + error.start} of the file"
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        reason = f"broken JSON at column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:  # endless digits, or thousands of brackets
        reason = f"broken JSON: {error}"
    raise InputError(f"{path}:{line}: {reason}")


def _parquet_rows(path: Path) -> Iterator[tuple[Any, str]]:
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    yield row, f"{path}[{number}]"
                    number += 1
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}[{number}] or later: broken Parquet: {error}") from None


def _dataset_rows(source: str, split: str, saved: bool) -> Iterator[tuple[Any, str]]:
    datasets = import_module("datasets")  # takes a second, and few sources need it
    try:
        if saved:
            data = datasets.load_from_disk(str(Path(source).expanduser()))
            data = cast(Any, data)[split] if isinstance(data, dict) else data
        else:
            name, _, config = source.partition(":")
            data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # offline, not found, gated, no such split: an open set
        what = "" if saved else "no such file or folder, and not from the hub: "
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{source} (split {split}): {what}{reason}") from error
    if not len(data):
        raise InputError(f"{source} (split {split}): no rows")
    yield from ((row, f"{source}:{split}[{number}]") for number, row in enumerate(data))
