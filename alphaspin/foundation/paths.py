"""Paths that people write: home folders, relative ones, names that look like paths."""

import os
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator

from alphaspin.errors import InputError
from alphaspin.foundation.section import Section, unless_recorded

S = TypeVar("S", bound=Section)


def home(path: str) -> str:
    """The path with `~` expanded, which no shell does in YAML or after `=`.

    Raises:
        InputError: no such user, or nothing.
    """
    if not path.strip():
        raise InputError(f"{path!r} is no path")
    found = os.path.expanduser(path)
    if found.startswith("~") and not os.path.lexists(found):
        raise InputError(f"there is no home folder {path.split('/')[0]}; ./{path} is a path")
    return found


def place(path: str) -> str:
    """A path that means the same from anywhere: absolute, `~` expanded, without `.` and `..`.

    Symlinks keep their names (a hub's cache gives files their suffixes by them), but one that `..`
    leads out of is followed, as the system does. An empty text stays empty.

    Raises:
        InputError: as `home`.
    """
    if not path:
        return path
    found = home(path)
    folder, name = os.path.split(os.path.join(os.getcwd(), found.rstrip("/") or "/"))
    if ".." not in Path(folder, name).parts:
        return os.path.abspath(found)
    return os.path.realpath(found) if name == ".." else os.path.join(os.path.realpath(folder), name)


def source(name: str) -> str:
    """A `place` where `name` is a path; `tiny` and a hub id, which looks like a path, stay.

    It is a path where something is there, or where it is written as no id is.

    Raises:
        InputError: as `place`.
    """
    written = name.startswith(("~", ".", "/")) or name.endswith("/")
    local = written or (name.partition(":")[0].count("/") > 1) or os.path.lexists(name)
    return place(name) if local and name != "tiny" else name


def check_there(key: str, name: str, hint: str = "") -> None:
    """Whether a `source` is there, as far as that can be told without the hub.

    Raises:
        InputError: a path at which nothing is; ends with `hint`.
    """
    if Path(name).is_absolute() and not Path(name).exists():
        raise InputError(f"{key} = {name}: no such file or folder{hint}")


def from_here(name: str) -> str:
    """One spelling for all of a path: relative to the working directory where it is inside.

    So a project's folder can be moved, and runs have the names that they had when paths were kept
    as typed.
    """
    if not Path(name).is_absolute():
        return name
    real, here = Path(name).resolve(), Path.cwd()
    if not real.is_relative_to(here):
        return str(real)
    inside = str(real.relative_to(here))
    return f"./{inside}" if inside in ("tiny", "auto", "plain") else inside


def published(name: str) -> str:
    """What others may see of a path: the hub's id where it is in its cache, else the last part.

    Also of one behind "set aside from ", as comparisons say where their prompts are from.
    """
    if hub := re.search(r"(?:models|datasets)--([^/]+)/snapshots/", name):
        return hub[1].replace("--", "/", 1)
    return re.sub(r"(^|(?<=^set aside from ))/(.*/)?(?=.)", "", name)


PRIVATE = ("output", "folder", "url", "key_variable", "vllm_python", "vllm_arguments")
"""Settings that are nobody else's concern: where results and modules are, who is asked."""


def for_others(section: S) -> S:
    """Settings without what is private, and with names in the place of this machine's paths."""
    changes: dict[str, Any] = {}
    for key, value in section:
        if key in PRIVATE:
            changes[key] = None
        elif isinstance(value, Section):
            changes[key] = for_others(value)
        elif isinstance(value, str) and key != "answer":  # a pattern may look like a path
            changes[key] = published(value)
    return section.model_copy(update=changes)


def refuse_links(folder: Path) -> None:
    """Whether a run folder, which may be anybody's, leads nowhere else.

    A link in it would have us write over, delete or give away what is behind it.

    Raises:
        InputError: it has a link; the folder itself may be one.
    """
    for path in folder.rglob("*"):
        # wandb links its latest run, and nobody here reads or writes there.
        if path.is_symlink() and path.relative_to(folder).parts[0] != "wandb":
            raise InputError(
                f"{path}: is a link, which a run folder must not hold: put the thing itself there "
                "(the run folder as a whole may be a link)"
            )


def packaged(name: str) -> Path:
    """A folder or file among the packaged recipes, e.g. `tiny.yaml` or `tiny/model`."""
    return Path(str(resources.files("alphaspin") / "recipes" / name))


def _no_address(name: str) -> str:
    if "://" in name:
        raise InputError("is an address: give a hub id, or a file or folder that is here")
    return name


Expanded = Annotated[str, AfterValidator(_no_address), AfterValidator(home)]


Place = Annotated[str, unless_recorded(_no_address), AfterValidator(place)]


Source = Annotated[str, unless_recorded(_no_address), AfterValidator(source)]
