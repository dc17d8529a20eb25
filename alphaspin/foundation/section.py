"""What sections of settings are made of: frozen pydantic models and the types of their fields.

A value that the papers change from one iteration to the next (learning rate, β, prompts) is a list
with one entry per iteration whose last entry repeats; a single number means the same everywhere.
"""

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from alphaspin.errors import InputError
from alphaspin.foundation.console import without_keys

T = TypeVar("T")


def check_installed(package: str, setting: str, extra: str) -> None:
    """Whether an optional package is there.

    Raises:
        InputError: it is not; names the setting that needs it and how to get it.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{setting}: {package} is not installed: pip install 'alphaspin[{extra}]'")


def as_tuple(value: Any) -> Any:
    """A list as a tuple, a single value as a tuple of one."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


PositiveInt = Annotated[int, Field(gt=0)]


Fraction = Annotated[float, Field(ge=0, le=1)]


PerIterationFloat = Annotated[
    tuple[PositiveFloat, ...], BeforeValidator(as_tuple), Field(min_length=1)
]


PerIterationWeight = Annotated[
    tuple[NonNegativeFloat, ...], BeforeValidator(as_tuple), Field(min_length=1)
]


Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)]


PerIterationInt = Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple), Field(min_length=1)]


def at(values: tuple[T, ...], iteration: int) -> T:
    """The value of a per-iteration list at iteration t = 0, 1, …; the last entry repeats."""
    return values[min(iteration, len(values) - 1)]


LARGEST, SMALLEST = 1e30, 1e-30
"""Sizes of settings that are no whole numbers: what is computed in fp32 has no room for others."""

WHOLE = 2**31
"""Settings that are whole numbers are smaller."""


class Section(BaseModel):
    """Base of all sections: no unknown keys, no mutation, docstrings become `--help`.

    Numbers are neither booleans nor absurd, and a text is not empty, whatever the field. Records of
    finished runs are taken as they are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what would be taken for something else than it says."""
        field = cls.model_fields[str(info.field_name)]
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if info.context is RECORDED or value is field.default:
            return value
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, bool) and bool not in (found := leaves(field.annotation)):
                if found & {int, float}:
                    raise ValueError("needs a number, not true or false")
            elif not isinstance(part, bool) and leaves(field.annotation) <= {bool}:
                raise ValueError("needs true or false")
            elif isinstance(part, str) and part != field.default:
                check_text(part)
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _sized(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse absurd numbers."""
        if info.context is RECORDED or value == cls.model_fields[str(info.field_name)].default:
            return value
        for part in value if isinstance(value, tuple) else [value]:
            if isinstance(part, int) and abs(part) >= WHOLE:
                raise ValueError(f"needs a whole number below {WHOLE}")
            if isinstance(part, float) and part and not SMALLEST <= abs(part) <= LARGEST:
                raise ValueError(f"needs a number between {SMALLEST:g} and {LARGEST:g} in size")
        return value

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Unwrap the lines of the docstrings for `--help`."""
        super().__pydantic_init_subclass__(**kwargs)
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split()) or None


def unless_recorded(check: Callable[[str], str]) -> AfterValidator:
    """A validator of settings, but not of those of a finished run."""

    def checked(value: str, info: ValidationInfo) -> str:
        return value if info.context is RECORDED else check(value)

    return AfterValidator(checked)


def leaves(annotation: Any) -> frozenset[Any]:
    """The types that a field's annotation is made of."""
    if get_origin(annotation) is Literal:
        return frozenset(map(type, get_args(annotation)))
    if get_origin(annotation) is Annotated:
        return leaves(get_args(annotation)[0])
    parts = [part for part in get_args(annotation) if part is not Ellipsis]
    return frozenset[Any]().union(*map(leaves, parts)) if parts else frozenset([annotation])


def check_text(text: str) -> None:
    """Whether a text is one.

    Raises:
        ValueError: it is empty, or has what no file can hold.
    """
    if not text.strip():
        raise ValueError("is empty: leave the setting out, or give it a value")
    if "\0" in text or any("\ud800" <= sign <= "\udfff" for sign in text):
        raise ValueError("has a NUL or half a character; write it anew")


RECORDED = object()
"""Context of a validation that reads what a finished run was given: settings without effect, which
earlier versions accepted, stay as they are."""


def refuse_unused(
    settings: Section,
    choice: str,
    chosen: str,
    keys: Mapping[str, tuple[str, ...]],
    prefix: str = "",
) -> None:
    """Refuse what was set and would have no effect under the chosen method or kind.

    Raises:
        ValueError: one of `keys` that is not for `chosen` differs from its default.
    """
    for key, users in keys.items():
        if chosen in users:
            continue
        value: Any = settings
        default: Any = None
        for name in key.split("."):
            field = type(value).model_fields.get(name)
            if field is None:  # another kind of the section has it
                value = default = None
                break
            default, value = field.default, getattr(value, name)
        if value == default:
            continue
        if isinstance(value, Section):  # name the first setting that differs
            name = next(
                n
                for n in type(value).model_fields
                if getattr(value, n) != getattr(default, n, None)
            )
            key, value = f"{key}.{name}", getattr(value, name)
        raise ValueError(no_effect(prefix + key, value, choice, chosen, users))


def no_effect(key: str, value: Any, choice: str, chosen: str, users: Sequence[str]) -> str:
    """What is said of a setting that was set and would have no effect."""
    return (
        f"{key} = {short(value)} has no effect with {choice} = {chosen}, only with "
        f"{' or '.join(users)}: leave it out"
        + ", or start from a recipe of the method"
        * (choice == "method")
    )


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The one of `known`, dotted names, that is most like a word, or whose last part is."""
    by_last = {name.rsplit(".", 1)[-1]: name for name in known}
    found = difflib.get_close_matches(word, known, 1, cutoff=0.6)
    if not found:
        last = difflib.get_close_matches(word.rsplit(".", 1)[-1], by_last, 1, cutoff=0.6)
        found = [by_last[name] for name in last]
    return found[0] if found else None


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def short(value: Any) -> str:
    """A value for a message, without the keys that it may hold."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    text = without_keys(repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


WANTED = {
    "bool": "true or false",
    "dict": "keys and values",
    "float": "a number",
    "finite_number": "a finite number",
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "int": "a whole number",
    "int_from_float": "a whole number",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "literal_error": "{expected}",
    "model": "keys and values",
    "multiple_of": "a multiple of {multiple_of}",
    "none_required": "null",
    "string": "text (in quotes, where it looks like a number)",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "letters, digits, `_`, `-` and `.` only",
    "too_short": "at least {min_length} of them",
    "tuple": "a list",
}
"""What is wanted, by pydantic's kind of error or its first word."""


def wanted(item: Mapping[str, Any]) -> str:
    """What a value should have been, by one of pydantic's errors."""
    kind: str = item["type"]
    text = WANTED.get(kind) or WANTED.get(kind.partition("_")[0], "another value")
    known = re.findall(r"'([^']*)'", str(item.get("ctx", {}).get("expected", "")))
    near = nearest(str(item["input"]), known)
    return text.format(**item.get("ctx", {})) + (f" (did you mean {near!r}?)" if near else "")


def refusals(
    items: Sequence[Mapping[str, Any]], name: Callable[[Mapping[str, Any]], str]
) -> Iterator[tuple[str, str]]:
    """Keys and what is told of each, in the place of pydantic's errors.

    Args:
        items: pydantic's errors. A union has one for each of its branches: one is told.
        name: the key of an error.
    """
    found: dict[str, tuple[Any, list[str]]] = {}
    for item in items:
        key = name(item)
        if item["type"] == "value_error":
            said = without_keys(str(item["ctx"]["error"]))
            if key.endswith("key_variable"):  # which may have been given the key itself
                yield key, f"{key}: {said}"
                continue
            yield (
                key,
                said
                if re.match(r"[\w.]+ = ", said) or not key
                else (f"{key} = {short(item['input'])}: {said}"),
            )
        elif item["type"] == "missing":
            yield key, f"{key}: is needed"
        else:
            _, wants = found.setdefault(key, (item["input"], []))
            wants += [want for want in [wanted(item)] if want not in wants]
    for key, (value, wants) in found.items():
        yield key, f"{key} = {short(value)}: needs {' or '.join(wants)}"
