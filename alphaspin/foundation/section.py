"""What sections of settings are made of: frozen pydantic models and the types of their fields.

A value that the papers change from one iteration to the next (learning rate, β, prompts) is a list
with one entry per iteration whose last entry repeats; a single number means the same everywhere.
"""

import difflib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from alphaspin.errors import InputError

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


class Section(BaseModel):
    """Base of all sections: no unknown keys, no mutation, docstrings become `--help`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Unwrap the lines of the docstrings for `--help`."""
        super().__pydantic_init_subclass__(**kwargs)
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split()) or None


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
    """A value for a message."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
