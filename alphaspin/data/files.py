"""Rows of files, folders and hub data sets, each with where it stands.

`datasets` says which files of a folder make a split, and reads what it has saved and what is on a
hub. Files are read here: its loaders tell neither line nor column of what is broken. A column that
`rows` does not know is not decoded.
"""

import csv
import glob
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, cast

from alphaspin.data.rows import COLUMNS, FIELDS, FLAG
from alphaspin.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
PACKED = (".gz", ".zst", ".bz2")
"""Compressions of JSON and CSV files; PyArrow reads them and checks that they are whole."""

SHARD = re.compile(r"(.*-)(\d+)-of-(\d{1,6})(\D.*)")

Row = tuple[Any, str]
"""Columns by name, and file:line of JSON lines and CSV, file[row] or hub-id:split[row] elsewhere.
"""


@contextmanager
def located(origin: str) -> Generator[None]:
    """Put before an `InputError` where what it is about stands."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error.__cause__


def read_rows(
    source: str,
    split: str,
    fields: Collection[str] = FIELDS,
    notes: Counter[str] | None = None,
) -> Iterator[Row]:
    """Rows of a source, in order.

    Args:
        source: a JSONL, JSON (list of rows, or JSON lines) or CSV file, which may be compressed, or
            a Parquet file; a folder of such files at any depth, whose names tell the split as
            `datasets` has it, or from `datasets.save_to_disk`; a hub id `name` or `name:config`.
        split: of a folder or a hub data set. A file is one split, whatever its name.
        fields: what is read of the turns of a Parquet file.
        notes: gets what is to be said.

    Raises:
        InputError: while iterating: nothing to read, no such split, or a file that is broken.
    """
    path = Path(source).expanduser()
    if is_file(source):
        yield from _file_rows(path, fields)
    elif path.is_dir() and not _saved(path):
        files, others = _files_of(path, split)
        if others and notes is not None:
            shown = ", ".join(others)
            notes[f"files not read, in no split or of no known kind: {shown}"] += len(others)
        if len(files) > 1 and notes is not None:
            shown = ", ".join(map(str, files[:8])) + ", …" * (len(files) > 8)
            notes[f"files are the split {split}: {shown}"] += len(files)
        for file in files:
            yield from _file_rows(path / file, fields)
    else:
        yield from _dataset_rows(source, split, path.is_dir())


def is_file(source: str) -> bool:
    """Whether a source is one file (perhaps a missing one): no folder, and no hub id."""
    path = Path(source).expanduser()
    named = bool(_format(path)) or path.suffix in PACKED or source[:1] in "./~"
    return path.is_file() or (named and not path.is_dir())


def is_one(source: str) -> bool:
    """Whether a source has no splits: a file, or one saved data set."""
    return is_file(source) or Path(source, "state.json").is_file()


def _saved(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote a folder."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _format(path: Path) -> str | None:
    """The one of `SUFFIXES` that a file has, before that of its compression."""
    suffix = path.suffix
    if suffix in PACKED and (suffix := Path(path.stem).suffix) == ".parquet":
        return None
    return suffix if suffix in SUFFIXES else None


def _files_of(folder: Path, split: str) -> tuple[list[Path], list[str]]:
    """The files of a split, sorted, and the names of those that are in none.

    Raises:
        InputError: there are none, or there is no such split.
    """
    # Hidden files and folders are other programs' caches.
    inside = [f.relative_to(folder) for f in folder.rglob("*")]
    inside = sorted(n for n in inside if not any(part.startswith(".") for part in n.parts))
    for name in inside:
        if (folder / name).is_symlink() and (folder / name).is_dir():
            raise InputError(
                f"{folder / name}: is a link to a folder, which `datasets` does not "
                "follow: put the folder itself there, or name it as the data"
            )
    known = [name for name in inside if _format(name) and (folder / name).is_file()]
    if not known:
        raise InputError(f"{folder}: no {', '.join(SUFFIXES)} file in this folder")
    resolving: Any = import_module("datasets.data_files")
    base = str(folder.resolve())
    try:
        patterns = _declared(folder) or resolving.get_data_patterns(glob.escape(base))
        found = resolving.DataFilesDict.from_patterns(patterns, base_path=glob.escape(base))
    except InputError:
        raise
    except Exception as error:  # of YAML in README.md, of patterns there: an open set
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{folder}: {reason}") from None
    splits = {str(name): {*files} for name, files in found.items()}
    chosen = {
        name: [one for one in known if str(Path(base, one)) in files]
        for name, files in splits.items()
    }
    others = [str(one) for one in known if not any(one in files for files in chosen.values())]
    if not chosen.get(split):
        have = [f"{name} ({', '.join(map(str, f[:3]))})" for name, f in chosen.items() if f]
        raise InputError(f"{folder}: no split {split!r}; by the names of its files it has: "
                         f"{'; '.join(have) or 'none that can be read'}")  # fmt: skip
    _check_shards(folder, chosen[split])
    unread = {n for n in inside if str(Path(base, n)) in splits[split]} - {*known}
    others += map(str, sorted(unread))
    return chosen[split], others


def _check_shards(folder: Path, files: list[Path]) -> None:
    """Whether all files that are numbered as shards, as `train-00000-of-00004`, are there.

    Raises:
        InputError: one is missing.
    """
    names = {str(one) for one in files}
    for one in sorted(names):
        if found := SHARD.fullmatch(one):
            start, _, count, end = found.groups()
            shards = [f"{start}{i:0{len(count)}}-of-{count}{end}" for i in range(int(count))]
            if gone := next((shard for shard in shards if shard not in names), None):
                raise InputError(f"{folder / gone}: is missing, beside {folder / one}")


def _declared(folder: Path) -> dict[str, list[str]] | None:
    """Patterns by split that the folder's README.md declares, as a hub's data sets do.

    Raises:
        InputError: it declares several configurations.
    """
    readme = folder / "README.md"
    if not readme.is_file() or not readme.read_bytes().startswith(b"---"):
        return None
    card: Any = import_module("huggingface_hub").DatasetCard.load(readme)
    metadata: Any = import_module("datasets.utils.metadata").MetadataConfigs
    configs: dict[str, Any] = metadata.from_dataset_card_data(card.data)
    configs = {name: c for name, c in configs.items() if "data_files" in c}
    if len(configs) > 1:
        names = ", ".join(configs)
        raise InputError(f"{folder}: README.md has several configurations ({names}): name a file")
    patterns: Any = import_module("datasets.data_files").sanitize_patterns
    return next((patterns(c["data_files"]) for c in configs.values()), None)


def _file_rows(path: Path, fields: Collection[str]) -> Iterator[Row]:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    kind = _format(path)
    if not kind:
        packed = f"; all but Parquet also with {', '.join(PACKED)}"
        raise InputError(f"{path}: a data file ends with one of {', '.join(SUFFIXES)}{packed}")
    empty = True
    try:
        if kind == ".parquet":
            rows = _parquet_rows(path, fields)
        else:
            rows = _csv_rows(path) if kind == ".csv" else _json_rows(path, kind)
        for row in rows:
            empty = False
            yield row
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if empty:
        raise InputError(f"{path}: no rows")


@contextmanager
def _opened(path: Path) -> Generator[BinaryIO]:
    """The bytes of a file, unpacked, after a byte order mark."""
    if path.suffix in PACKED:
        file: Any = io.BufferedReader(import_module("pyarrow").input_stream(str(path)))
    else:
        file = path.open("rb")
    with file:
        if file.peek(3).startswith(b"\xef\xbb\xbf"):
            file.read(3)
        yield file


def _json_rows(path: Path, kind: str) -> Iterator[Row]:
    with _opened(path) as file:
        offset = 0 if path.suffix in PACKED else file.tell()
        # A .json file is a list of rows or, as is common, JSON lines under another name.
        start = cast("io.BufferedReader", file).peek(1).lstrip()
        listed = kind == ".json" and start.startswith(b"[")
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
        # An error at the end belongs to the last line.
        return json.loads(data.decode().rstrip(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        reason = f"not UTF-8 at byte {offset + error.start} of the file"
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        reason = f"broken JSON at column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:  # endless digits, or thousands of brackets
        reason = f"broken JSON: {error}"
    raise InputError(f"{path}:{line}: {reason}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


def _check_names(names: list[str], where: str) -> None:
    """Whether no column that is read stands twice.

    Raises:
        InputError: one does.
    """
    for name, count in Counter(names).items():
        if count > 1 and name in COLUMNS:
            raise InputError(f"{where}: {count} columns {name}")


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # 128 KiB unless told; it holds for the whole process
    with _opened(path) as file:
        reader = csv.reader(io.TextIOWrapper(file, "utf-8", newline=""), strict=True)
        names: list[str] | None = None
        line = first = 1
        try:
            for cells in reader:
                if names is None and any(cell.strip() for cell in cells):
                    names, first = cells, line
                    _check_names(names, f"{path}:{line}")
                elif names and cells and len(cells) != len(names):
                    reason = f"{len(cells)} cells, but {len(names)} columns in line {first}"
                    raise InputError(f"{path}:{line}: {reason}")
                elif names and cells:
                    # An empty cell is no value.
                    row = {n: c or None for n, c in zip(names, cells, strict=True)}
                    yield row, f"{path}:{line}"
                line = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{path}:{line}: broken CSV: {error}") from None
        except UnicodeDecodeError:
            raise InputError(f"{path}:{line} or later: not UTF-8") from None


def _parquet_rows(path: Path, fields: Collection[str]) -> Iterator[Row]:
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, str(path))
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            wanted = [leaf for leaf in leaves if _looked_at(leaf, fields)]
            unread = dict.fromkeys(_name(leaf) for leaf in leaves if leaf not in wanted)
            if not wanted and file.metadata.num_rows:
                yield dict.fromkeys(file.schema_arrow.names), f"{path}[0]"
                return
            for batch in file.iter_batches(1024, columns=wanted):
                for row in batch.to_pylist():
                    yield _row(row) | unread, f"{path}[{number}]"
                    number += 1
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}[{number}] or later: broken Parquet: {error}") from None


def _looked_at(leaf: str, fields: Collection[str]) -> bool:
    """Whether a leaf of a Parquet schema is read."""
    column, _, field = _name(leaf).partition(".")
    return column in COLUMNS and (not field or field in fields or bool(FLAG.search(field)))


def _name(leaf: str) -> str:
    """A column, or COLUMN.FIELD of turns, by a leaf of a Parquet schema.

    `messages.list.element.role.…` or, one list a field, `messages.role.list.element`.
    """
    column, *inside = leaf.split(".")
    if column == "tools" or len(inside) < 3:
        return column
    field = inside[0] if inside[1] == "list" else inside[2]
    return column if field == "list" else f"{column}.{field}"  # `history` has lists of lists


def _row(columns: dict[str, Any]) -> dict[str, Any]:
    """A row of Arrow without the nulls with which it fills what objects do not have."""
    return {name: _without_nulls(value) for name, value in columns.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return {k: _without_nulls(v) for k, v in items if v is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in cast("list[Any]", value)]
    return value


def _dataset_rows(source: str, split: str, saved: bool) -> Iterator[Row]:
    datasets: Any = import_module("datasets")  # takes a second, and few sources need it
    try:
        if saved:
            data = datasets.load_from_disk(str(Path(source).expanduser()))
            if isinstance(data, dict) and split not in data:
                names = ", ".join(cast("dict[str, Any]", data))
                raise InputError(f"{source}: no split {split!r}; it has: {names}")
            data = data[split] if isinstance(data, dict) else data
        else:
            name, _, config = source.partition(":")
            data = datasets.load_dataset(name, config or None, split=split)
    except InputError:
        raise
    except Exception as error:  # offline, not found, gated, no such split: an open set
        what = "" if saved else "no such file or folder, and not from the hub: "
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{source} (split {split}): {what}{reason}") from error
    if not len(data):
        raise InputError(f"{source} (split {split}): no rows")
    known = [name for name in data.column_names if name in COLUMNS]
    unread = dict.fromkeys(name for name in data.column_names if name not in COLUMNS)
    if not known:
        yield dict.fromkeys(data.column_names), f"{source}:{split}[0]"
        return
    for number, row in enumerate(data.select_columns(known)):
        yield _row(row) | unread, f"{source}:{split}[{number}]"
