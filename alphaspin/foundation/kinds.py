"""Sections whose settings depend on what they are: losses, judges, opponents, methods.

A table, a plain dict, names the kinds: each is a section with its own settings, so that a setting
without effect cannot be written. `module:Name` takes the place of a name and is a kind of one's
own: a subclass of the table's base, or where that makes sense a function, whose keyword-only
arguments are its settings.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar, cast, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError, ValidationInfo, create_model

from alphaspin.errors import InputError
from alphaspin.foundation.artefacts import file_hash
from alphaspin.foundation.paths import Place
from alphaspin.foundation.section import RECORDED, Section, nearest, no_effect

K = TypeVar("K", bound="Kind")


class Need(NamedTuple):
    """What a kind needs of the settings of other sections.

    key: a setting, or a property as `sampling.untouched`. values: of which it has one. why: so.
    says: what is to be set, where that is not `key` to the first of `values`.
    """

    key: str
    values: tuple[Any, ...]
    why: str
    says: str = ""


class Kind(Section):
    """Base of the sections of a table."""

    uses: ClassVar[tuple[str, ...]] = ()
    """Settings or whole sections elsewhere that only kinds which name them look at."""
    plugin: ClassVar[str | None] = None
    """Hash of the file of a kind that is somebody's own."""

    def needs(self, config: Any) -> tuple[Need, ...]:
        """What has to hold elsewhere, under a composed configuration."""
        del config
        return ()

    @classmethod
    def of_function(cls, function: Callable[..., Any], name: str) -> type[Self]:
        """The kind that a function of one's own is, with its keyword-only arguments as settings.

        Raises:
            InputError: this base has none such.
        """
        raise InputError(f"{name}: is a function, and a subclass of {cls.__name__} is needed")


def settings_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Fields of the keyword-only arguments of a function: (type, default)."""
    hints = get_type_hints(function, include_extras=True)
    return {
        parameter.name: (
            hints.get(parameter.name, Any),
            ... if parameter.default is inspect.Parameter.empty else parameter.default,
        )
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def load_module(name: str, folder: str) -> tuple[ModuleType, Path | None]:
    """A module of a folder, or an installed one, and its file; an edited one is loaded afresh.

    `sys.path` is as before afterwards.

    Raises:
        InputError: there is none, or it raises.
    """
    file = Path(folder, *name.split(".")).with_suffix(".py")
    known = sys.modules.get(name)
    if known and file.is_file():
        loaded = Path(getattr(known, "__file__", None) or "")
        if loaded != file or getattr(known, "__alphaspin_hash__", None) != file_hash(file):
            del sys.modules[name]
    before = list(sys.path)
    sys.path.insert(0, folder)  # an installed command does not even look in the working one
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except Exception as error:
        if not isinstance(error, ImportError):
            raise InputError(f"{name}: {type(error).__name__}: {error}") from error
        raise InputError(f"{error} (folder = {folder}, and what is installed)") from error
    finally:
        sys.path[:] = before
    path = module.__file__
    found = Path(path) if path else None
    if found:
        module.__alphaspin_hash__ = file_hash(found)  # pyright: ignore[reportAttributeAccessIssue]
    return module, found


def load_object(name: str, folder: str) -> tuple[Any, str]:
    """What `module:Name` names, and the hash of its file.

    Raises:
        InputError: there is no such thing.
    """
    module_name, _, attribute = name.partition(":")
    if not (attribute and all(part.isidentifier() for part in module_name.split("."))):
        raise InputError(f"{name!r}: needs module:Name")
    module, file = load_module(module_name, folder)
    if not hasattr(module, attribute):
        raise InputError(f"{name!r}: {module.__file__} has no {attribute}")
    return getattr(module, attribute), file_hash(file) if file else "?"


@dataclass(frozen=True)
class Table(Generic[K]):
    """Kinds by name.

    key: the setting that chooses, `loss.kind`. section: whose settings depend on it, `loss`. base:
    of all kinds. kinds: the table. default: the kind that is taken where none is chosen.
    """

    key: str
    section: str
    base: type[K]
    kinds: Mapping[str, type[K]]
    default: str

    @property
    def field(self) -> str:
        """The last word of `key`."""
        return self.key.rpartition(".")[2]

    def find(self, name: str, folder: str | None = None) -> type[K]:
        """The kind of this name, or somebody's own.

        Args:
            name: of the table, or `module:Name`.
            folder: in which the module is looked for; by default the working directory.

        Raises:
            InputError: there is none.
        """
        if name in self.kinds:
            return self.kinds[name]
        if ":" not in name:
            known = ", ".join(self.kinds)
            near = nearest(name, list(self.kinds))
            hint = f"; did you mean {near!r}?" if near else ""
            raise InputError(f"no such kind{hint} ({known}, or module:Name of your own)")
        folder = folder or os.getcwd()
        found, digest = load_object(name, folder)
        if own := _OWN.get((self.key, name, folder, digest)):
            return own
        kind: type[K]
        if inspect.isclass(found) and issubclass(found, self.base):
            kind = found
        elif inspect.isfunction(found):
            kind = self.base.of_function(found, name)
        else:
            raise InputError(f"{name}: is no subclass of {self.base.__name__}, nor a function")
        chosen: dict[str, Any] = {"folder": (Place, Field(folder, description=FOLDER))}
        if self.section == self.key.rpartition(".")[0]:  # else another section holds the name
            chosen[self.field] = (str, name)
        own = create_model(kind.__name__, __base__=kind, __module__=kind.__module__, **chosen)
        own.__doc__, own.plugin = found.__doc__, digest
        _OWN[self.key, name, folder, digest] = own
        return own

    def users(self, setting: str) -> list[str]:
        """Names of the kinds that have a setting."""
        return [name for name, kind in self.kinds.items() if setting in kind.model_fields]

    def read(self, values: Any, info: ValidationInfo, name: str | None = None) -> K:
        """The section of these values: to validate a field with.

        Args:
            values: keys and values, or a section.
            info: of the validation; one of a recorded run takes settings without effect.
            name: of the kind, where `values` does not hold it.

        Raises:
            ValueError: a setting of another kind differs from its default there.
        """
        if isinstance(values, self.base):
            return values
        if not isinstance(values, Mapping):
            raise ValueError("expected keys and values")
        given = dict(cast("Mapping[str, Any]", values))
        name = str(name or given.get(self.field, self.default))
        try:
            kind = self.find(name, given.get("folder"))
        except InputError as error:
            raise ValueError(f"{self.key} = {name!r}: {error}") from error
        for setting in [key for key in given if key not in kind.model_fields]:
            if users := self.users(setting):
                field = self.kinds[users[0]].model_fields[setting]
                if info.context is not RECORDED and not _is_default(field, given[setting]):
                    raise ValueError(self.without_effect(setting, given[setting], name))
                del given[setting]
        return kind.model_validate(given, context=info.context)

    def described(self) -> str:
        """The kinds in a sentence each, for `--help`."""
        said = [
            f"`{name}`: {(kind.__doc__ or '').splitlines()[0]}" for name, kind in self.kinds.items()
        ]
        return " ".join([*said, f"Or `module:Name`, a {self.base.__name__} of your own."])

    def without_effect(self, setting: str, value: Any, name: str) -> str:
        """What is said of a setting that the kind `name` does not have."""
        return no_effect(f"{self.section}.{setting}", value, self.key, name, self.users(setting))

    def other(self, section: K, name: str, folder: str | None = None) -> K:
        """Another kind, unchecked, with those settings of a section that both have alike."""
        kind, fields = self.find(name, folder), type(section).model_fields
        shared = {
            key: getattr(section, key)
            for key, field in kind.model_fields.items()
            if key in fields
            and fields[key].annotation == field.annotation
            and key not in (self.field, "folder")
        }
        return kind.model_construct(**shared)


_OWN: dict[tuple[str, str, str, str], Any] = {}
"""Kinds that are somebody's own, so that a name is one class as long as its file is the same."""

FOLDER = (
    "Folder in which `module:Name` is found: the working directory at the start of the run, which "
    "is remembered. For a run whose module has moved."
)


def _is_default(field: Any, value: Any) -> bool:
    """Whether a value, before it is validated, is a field's default."""
    adapter: TypeAdapter[Any] = TypeAdapter(field.rebuild_annotation())
    try:
        return adapter.validate_python(value) == field.get_default(call_default_factory=True)
    except ValidationError:
        return False
