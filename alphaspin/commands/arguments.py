"""The options of a command line as nested values, which the same checks read as a recipe's.

    --KEY VALUE   --KEY=VALUE   --KEY VALUE VALUE …   --FLAG   --no_FLAG   --KEY NAME VALUE …

Keys are the dotted names of settings; `-` and `_` are one. tyro writes `--help` and no more: its
own reading of values would have other rules than a recipe has.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from alphaspin.config import Config
from alphaspin.errors import InputError
from alphaspin.evaluation.benchmarks import BENCHMARK
from alphaspin.foundation.section import Section, leaves, short
from alphaspin.model.settings import NOT_HERE
from alphaspin.schema import KINDS, all_keys, likely

FLAGS = {"true": True, "false": False}


def is_help(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return bool({"-h", "--help", "--help-all"} & {*arguments})


def given(arguments: Sequence[str], key: str) -> str | None:
    """The value of an option, as far as plain text tells, before it is known what options are."""
    for number, word in enumerate(arguments):
        name, sign, value = word.partition("=")
        if name.startswith("--") and _chooser(_key(name)) == key:
            return value if sign else next(iter(arguments[number + 1 :]), None)
    return None


def read(
    kind: type[Section], arguments: Sequence[str], start: Section | None = None
) -> dict[str, Any]:
    """Values by section and key.

    Args:
        kind: has the options.
        arguments: the words.
        start: what they change; its kinds say which settings of a section are meant.

    Raises:
        InputError: an unknown option, one that is given twice or has no effect with the kinds that
            are chosen, a word that belongs to none.
    """
    known = _annotations(kind)
    found: dict[str, Any] = {}
    nested: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, sign, value = word.partition("=")
        if not name.startswith("--") or len(name) < 3:
            raise InputError(f"{word!r}: belongs to no option; options are --KEY VALUE")
        key = _chooser(_key(name))
        plain = key if key in known else _without_no(key)
        _check_known(kind, name, plain, value or (words[0] if words else None), start)
        annotation = known[plain]
        if plain in found:
            raise InputError(
                f"--{plain} is given twice, as {short(found[plain])} and once more: leave one out"
            )
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            some = [f"--{other}" for other in known if other.startswith(f"{plain}.")]
            said = f"set one of its keys, as {some[0]}" if some else "this kind has no settings"
            raise InputError(f"--{plain} is a section: {said}")
        following: list[str] = [value] if sign else []
        if not sign:
            while words and not words[0].startswith("--"):
                following.append(words.pop(0))
        found[plain] = _value(plain, annotation, following, key != plain, bool(sign))
        place = nested
        *sections, last = plain.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = found[plain]
    return nested


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with some of them changed."""
    result = dict(values)
    for key, value in changes.items():
        deeper = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if deeper else value
    return result


def _chooser(key: str) -> str:
    """`--benchmark NAME` is `--benchmark.kind NAME`."""
    return BENCHMARK.key if key == BENCHMARK.section else key


def _key(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _without_no(key: str) -> str:
    section, dot, name = key.rpartition(".")
    return f"{section}{dot}{name.removeprefix('no_')}"


def fields(kind: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """All settings by dotted key, sections included."""
    found: dict[str, FieldInfo] = {}
    for name, field in kind.model_fields.items():
        found[prefix + name] = field
        if section := _section(field):
            found |= fields(section, f"{prefix}{name}.")
    return found


def _section(field: FieldInfo) -> type[BaseModel] | None:
    types = (field.annotation, *get_args(field.annotation))
    return next((t for t in types if isinstance(t, type) and issubclass(t, BaseModel)), None)


def _annotations(kind: type[BaseModel]) -> dict[str, Any]:
    return {key: _section(field) or field.annotation for key, field in fields(kind).items()}


def _check_known(
    kind: type[Section], name: str, key: str, value: str | None, start: Section | None
) -> None:
    """Unknown options, each with the nearest right one; settings of another kind than chosen."""
    if key not in (keys := [*all_keys(kind), *fields(kind)]):
        if key in NOT_HERE:
            raise InputError(f"{name}: {NOT_HERE[key]}")
        near = likely(key, keys)
        hint = f"; did you mean --{near}?" if near else "; see --help"
        raise InputError(f"unknown option {name!r}{hint}")
    section, _, last = key.rpartition(".")
    for table in KINDS:
        own: Any = getattr(start, table.section, None)
        if own and section == table.section and last not in type(own).model_fields:
            chosen = start.chosen(table) if isinstance(start, Config) else own.kind
            raise InputError(table.without_effect(last, value, chosen))


def _plain(word: str) -> bool | int | float | str:
    """What a word is, where nothing else tells: as a recipe has it."""
    if word.lower() in FLAGS:
        return FLAGS[word.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(word)
    return word


def _value(key: str, annotation: Any, words: list[str], negated: bool, assigned: bool) -> Any:
    """What the words behind an option say: text, which its section reads, a list or a boolean."""
    if get_origin(annotation) is dict:
        if len(words) % 2 or negated or not words:
            raise InputError(f"--{key}: takes NAME VALUE pairs, not {' '.join(words)!r}")
        return dict(zip(words[::2], map(_plain, words[1::2]), strict=True))
    types = leaves(annotation)
    if bool in types:
        if not words and not assigned:
            return not negated
        if len(words) == 1 and words[0].lower() in FLAGS and not negated:
            return FLAGS[words[0].lower()]
        raise InputError(f"--{key}: {' '.join(words)!r} is neither true nor false")
    if negated:
        raise InputError(f"--{key} is no flag: it takes a value")
    if any(get_origin(t) in (tuple, list) for t in (annotation, *get_args(annotation))):
        return words
    if len(words) != 1:
        extra = f"{' '.join(words[1:])!r} belongs to no option" if words else "needs a value"
        raise InputError(f"--{key}: {extra}")
    return None if type(None) in types and words[0].lower() in ("none", "null") else words[0]
