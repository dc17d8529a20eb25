"""`alphaspin completion`: the script by which a shell completes our commands.

shtab writes it once, from the settings of all kinds; to complete a word starts no Python.
"""

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import shtab
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from alphaspin.config import recipe_names
from alphaspin.errors import InputError
from alphaspin.evaluation.benchmarks import BENCHMARK
from alphaspin.foundation.section import leaves
from alphaspin.schema import KINDS, all_fields

PROGRAMS = ("alphaspin", "alphaspin-train")
SHELLS = ("bash", "zsh", "fish")
USAGE = f"alphaspin completion {'|'.join(SHELLS)} [{' | '.join(PROGRAMS)}]"

RUN = {"train", "plan", "init"}
"""Commands that begin with a recipe."""


def show(words: Sequence[str], commands: Mapping[str, type[BaseModel] | None]) -> None:
    """Print the script for a shell and a program.

    Args:
        words: of the command line.
        commands: the settings of each command; None where it has none.

    Raises:
        InputError: another shell or program.
    """
    shell, program = (*words, PROGRAMS[0])[:2] if words else ("", "")
    if len(words) > 2 or shell not in SHELLS or program not in PROGRAMS:
        raise InputError(f"usage: {USAGE}")
    parser = ArgumentParser(program, allow_abbrev=False)
    if program == "alphaspin-train":
        _fill(parser, "train", commands["train"])
    else:
        parser.add_argument("--version", action="store_true", help="of alphaspin")
        below = parser.add_subparsers()
        for name, settings in commands.items():
            _fill(below.add_parser(name, help=""), name, settings)
    print(shtab.complete(parser, shell))


def _fill(parser: ArgumentParser, command: str, settings: type[BaseModel] | None) -> None:
    """The words and options of a command."""

    def word(meaning: str, complete: Any = None, **more: Any) -> None:
        action = parser.add_argument(meaning, help=meaning, **more)
        if complete:
            action.complete = complete  # pyright: ignore[reportAttributeAccessIssue]

    if command in RUN:
        if command == "init":
            word("file", shtab.FILE)
        word("recipe", _recipe(), nargs="?")
        parser.add_argument("--help-all", action="store_true", help="all options")
    elif command in ("evaluate", "export", "report"):
        word("run", shtab.DIRECTORY, nargs="*" if command == "report" else None)
    elif command == "recipes":
        word("what", choices=("list", "show", "copy"))
        word("recipe", choices=recipe_names(), nargs="?")
    elif command == "completion":
        word("shell", choices=SHELLS)
        word("program", choices=PROGRAMS, nargs="?")
    elif command == "doctor":
        parser.add_argument("--short", action="store_true", help="a block for a bug report")
    if command == "report":
        parser.add_argument("--to", help="page of several runs")
    for key, field in (all_fields(settings) if settings else {}).items():
        _option(parser, key, field)


def _option(parser: ArgumentParser, key: str, field: FieldInfo) -> None:
    """An option, with its choices, or with files where it is a text; a section is none."""
    types = leaves(field.annotation)
    section = any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in types)
    if section and key != BENCHMARK.section:
        return
    meaning = (field.description or key).partition(". ")[0].replace("%", "%%")
    if types == frozenset([bool]):
        parser.add_argument(f"--{key}", action="store_true", help=meaning)
        return
    chooser = BENCHMARK.key if key == BENCHMARK.section else key
    kinds = next((table.kinds for table in KINDS if table.key == chooser), ())
    parts = (field.annotation, *get_args(field.annotation))
    many = any(get_origin(part) in (tuple, dict) for part in parts)
    action = parser.add_argument(
        f"--{key}",
        help=meaning,
        choices=[*kinds, *_choices(field.annotation)] or None,
        nargs="+" if many else None,
    )
    if str in types and not action.choices:
        action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]


def _choices(annotation: Any) -> list[str]:
    """The words among which a setting chooses."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [word for part in get_args(annotation) for word in _choices(part)]


def _recipe() -> dict[str, Any]:
    """Recipes and files."""
    names = " ".join(recipe_names())
    bash = f'_alphaspin_recipes() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}'
    zsh = f"_alphaspin_recipes() {{ _alternative 'recipes:recipe:({names})' 'files:file:_files' }}"
    return {
        "bash": "_alphaspin_recipes",
        "zsh": "_alphaspin_recipes",
        "fish": f"{names} (__fish_complete_path (commandline -ct))",
        "preamble": {"bash": bash, "zsh": zsh},
    }
