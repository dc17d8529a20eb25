"""The demonstrations of a run: read, limited, parted and checked."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from alphaspin.config import Config
from alphaspin.data.chat import ChatFormat
from alphaspin.data.demonstrations import (
    Demonstration,
    hold_out,
    lengths,
    load_demonstrations,
    shared,
    within,
)
from alphaspin.data.files import is_one
from alphaspin.data.settings import TextConfig
from alphaspin.errors import InputError
from alphaspin.foundation import console
from alphaspin.foundation.paths import packaged


def load_source(
    config: Config, chat: ChatFormat, source: str, split: str, embedded: str
) -> list[Demonstration]:
    """Demonstrations of a file, folder or hub id; `embedded` is the packaged file behind `tiny`."""
    path = str(packaged(embedded)) if source == "tiny" else source
    found, notes = load_demonstrations(path, chat, config.text, split, answers=config.uses_answers)
    for note, count in notes.items():
        console.note(f"{source}: {count} {note}")
    return found


def load_heldout(config: Config, chat: ChatFormat, source: str) -> list[Demonstration]:
    """All demonstrations of a source that is held out."""
    split = config.heldout_split or config.split
    return load_source(config, chat, source, split, "tiny/heldout.jsonl")


def load_data(config: Config, chat: ChatFormat) -> tuple[list[Demonstration], list[Demonstration]]:
    """Demonstrations to train on and held-out ones."""
    return _parted(config, *_read(config, chat))


def load_limited(
    config: Config, chat: ChatFormat, limit: "partial[tuple[TextConfig, str]]"
) -> tuple[Config, list[Demonstration], list[Demonstration]]:
    """The same, with limits that `limit` chooses of them; and the settings with these.

    Args:
        config: of the run; `auto` among its limits is replaced.
        chat: makes tokens.
        limit: `sizing.choose_limits`, which is told how much there is room for.
    """
    if not config.text.auto:
        return config, *load_data(config, chat)
    demonstrations, heldout = _read(config, chat)
    text, note = limit(config.text, demonstrations + heldout)
    console.note(note)
    config = config.sized(text.model_dump())
    notes = Counter[str]()
    demonstrations, heldout = (
        [replace(one, index=i) for i, one in enumerate(within(part, text, notes))]
        for part in (demonstrations, heldout)
    )
    for said, count in notes.items():
        console.note(f"{count} {said}")
    return config, *_parted(config, demonstrations, heldout)


def _read(config: Config, chat: ChatFormat) -> tuple[list[Demonstration], list[Demonstration]]:
    """All demonstrations, and all of the held-out ones that are elsewhere."""
    demonstrations = load_source(config, chat, config.data, config.split, "tiny/train.jsonl")
    return demonstrations, load_heldout(config, chat, config.heldout) if config.heldout else []


def _parted(
    config: Config, demonstrations: list[Demonstration], heldout: list[Demonstration]
) -> tuple[list[Demonstration], list[Demonstration]]:
    """Those to train on and those held out, of what `_read` has found."""
    if config.heldout:
        heldout = heldout[: config.evaluate.prompts]
        if config.evaluate.overlap == "drop":
            prompts = {name for one in heldout for name in one.names}
            kept = [one for one in demonstrations if prompts.isdisjoint(one.names)]
            if dropped := len(demonstrations) - len(kept):
                console.note(f"{config.data}: {dropped} rows dropped: their prompts are held out")
            demonstrations = kept
    else:
        count = min(config.evaluate.prompts, len(demonstrations) // 5)
        if count < config.evaluate.prompts:
            console.note(
                f"{count} of {len(demonstrations)} demonstrations are held out: a fifth, in place "
                f"of evaluate.prompts = {config.evaluate.prompts}"
            )
        demonstrations, heldout = hold_out(demonstrations, count, config.seed)
    if not demonstrations:
        raise InputError(f"data = {config.data}: no demonstration is left to train on")
    return demonstrations, heldout


def check_data(
    config: Config, demonstrations: Sequence[Demonstration], heldout: Sequence[Demonstration]
) -> None:
    """Say how long the demonstrations are, and refuse what would be trained wrongly.

    Raises:
        InputError: held-out prompts that are trained on, too many demonstrations cut, a split that
            a file does not have.
    """
    data_split = config.split if config.split != "train" else ""
    for key, source, setting, split in (
        ("data", config.data, "split", data_split),
        ("heldout", config.heldout, "heldout_split", config.heldout_split or ""),
    ):
        if split and source is None:
            raise InputError(
                f"{setting} = {split} is a split of {key}: set that too, as --{key} {config.data}"
            )
        if source and (source == "tiny" or is_one(source)) and split not in Path(source).name:
            raise InputError(f"{setting} = {split}: {key} = {source} has no splits: leave it out")
    console.note(lengths(demonstrations))
    if both := shared(demonstrations, heldout):
        shown = ", ".join(f"{one.origin} (as {other.origin})" for one, other in both[:3])
        said = f"{len(both)} of {len(heldout)} held-out prompts are also trained on: {shown}"
        said += ", …" * (len(both) > 3)
        if config.evaluate.overlap == "error":
            raise InputError(f"{said}: evaluate.overlap = drop trains without them, keep with them")
        console.alarm(said)
    cut, text = sum(one.truncated for one in demonstrations), config.text
    trained = not config.preference.judged or config.control == "sft"
    share = cut / len(demonstrations)
    if trained and text.overlong == "error" and share > text.overlong_share:
        raise InputError(
            f"{cut} of {len(demonstrations)} demonstrations are longer than "
            f"text.max_response_tokens = {text.max_response_tokens} and would be trained without "
            f"an end: raise it (the longest has {max(one.whole for one in demonstrations)}), or "
            "set text.overlong to drop or cut, or text.overlong_share = "
            f"{text.overlong_share:g} to {math.ceil(100 * share) / 100:g}"
        )
