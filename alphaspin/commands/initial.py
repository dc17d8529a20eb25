"""`alphaspin init`: a recipe for a model and its data, commented, after a look at both."""

import math
import textwrap
from collections.abc import Iterable
from pathlib import Path

import yaml

from alphaspin import __version__
from alphaspin.commands import plan
from alphaspin.commands.sizing import room, trained_together
from alphaspin.config import Config, PlanHints, load_config
from alphaspin.data.settings import LIMITS
from alphaspin.errors import InputError
from alphaspin.foundation import console
from alphaspin.foundation.section import Section, at
from alphaspin.schema import TABLES
from alphaspin.training.trainer import total_steps

STEPS = 32
"""Steps that an iteration has at least, where the data are few: by smaller batches."""

SMALLEST = 8
"""Pairs of a batch at least."""


def write(config: Config, target: Path, shown: Iterable[str]) -> None:
    """Write the recipe, and say what a run of it will do.

    Args:
        config: as the command line has it.
        target: the file.
        shown: settings that the recipe has even where they are the defaults.

    Raises:
        InputError: there is such a file, or no recipe of this name; model or data cannot be used.
    """
    if target.suffix not in {".yaml", ".yml"}:
        raise InputError(f"{target}: a recipe's name ends in .yaml")
    if target.exists():
        raise InputError(f"{target} exists already: give another name, or remove it")
    with console.recorded() as lines:
        found, facts = plan.gather(config, fresh=True)
    config, notes = fitting(config.model_copy(update={"text": found.text}), facts)
    config = config.model_copy(update={"name": Config.model_fields["name"].default, "hints": None})
    unused = "loss" if config.preference.judged else "judge"
    kept = {
        *shown,
        *(f"text.{key}" for key in LIMITS),
        *(table.key for table in TABLES if table.section != unused),
    }
    head = [f"Written by `alphaspin init` {__version__} after a look at both:", *lines, *notes]
    content = [*(f"# {line}".rstrip() for line in head), *_lines(config, kept), ""]
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write("\n".join(content))
        config = load_config(target)
    except OSError as error:
        raise InputError(f"{target}: {error.strerror}") from None
    except InputError:
        target.unlink()
        raise
    plan.tell(config, facts)
    console.note(f"{target} is written; read it, then: alphaspin-train {target}")


def fitting(config: Config, facts: PlanHints) -> tuple[Config, list[str]]:
    """Batches that suit the number of rows and the memory here, and why they are so."""
    train, notes = config.train, list[str]()
    pairs = min(at(config.selfplay.prompts, 0), facts.demonstrations)
    size = train.batch_size
    while size > SMALLEST and not size % 2 and pairs < STEPS * size:
        size //= 2
    if size < train.batch_size:
        parts = max(1, train.accumulation * size // train.batch_size)
        parts = next(n for n in range(parts, size + 1) if size % n == 0)
        train = train.model_copy(update={"batch_size": size, "accumulation": parts})
        steps = total_steps(pairs, train)
        notes.append(f"train.batch_size = {size}: {steps} steps of an iteration from {pairs} rows")
    tree = config.text.prompt_limit + trained_together(config) * config.text.response_limit
    tokens = room(config, plan.device())
    if tokens and tokens < train.batch_size // train.accumulation * tree:
        parts = next(
            n
            for n in range(train.accumulation, train.batch_size + 1)
            if train.batch_size % n == 0
            and (n == train.batch_size or train.batch_size // n * tree <= tokens)
        )
        train = train.model_copy(update={"accumulation": parts})
        notes.append(f"train.accumulation = {parts}: memory here holds {tokens} tokens at a time")
    return config.model_copy(update={"train": train}), notes


def _lines(section: Section, kept: set[str], above: str = "") -> list[str]:
    """YAML of the settings that differ from their defaults or are kept, with their meanings."""
    changed = section.model_dump(mode="json", exclude_defaults=True)
    values = section.model_dump(mode="json")
    fields = type(section).model_fields
    sections = [name for name in fields if isinstance(getattr(section, name), Section)]
    lines: list[str] = []
    for name in sorted(fields, key=lambda name: (name in sections, name not in ("model", "data"))):
        value, field = getattr(section, name), fields[name]
        if isinstance(value, Section):
            if found := _lines(value, kept, f"{above}{name}."):
                lines += [f"{name}:", *(f"  {line}" for line in found)]
        elif name in changed or (above + name in kept and value is not None):
            meaning = (field.description or "").partition(". ")[0]
            lines += [f"# {line}" for line in textwrap.wrap(meaning, 90)]
            text = yaml.safe_dump(
                [values[name]], default_flow_style=True, allow_unicode=True, width=math.inf
            )
            lines.append(f"{name}: {text.strip()[1:-1]}")
    return lines
