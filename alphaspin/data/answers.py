"""How a text answer is compared with the demonstration: exact match, word overlap, preference."""

import re
from collections import Counter
from collections.abc import Callable

from alphaspin.errors import InputError


def checked_part(pattern: str | None) -> Callable[[str], str | None]:
    """The part of an answer that must match: all of it, or the last match's first group."""
    if pattern is None:
        return lambda text: " ".join(text.split())
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"evaluate.answer = {pattern!r}: not a regular expression: {error}"
        ) from None
    if not compiled.groups:
        raise InputError(f"evaluate.answer = {pattern!r}: needs a group, e.g. '#### (.+)'")

    def part(text: str) -> str | None:
        found = list(compiled.finditer(text))
        return found[-1].group(1).strip() if found and found[-1].group(1) else None

    return part


def word_f1(answer: str, demonstration: str) -> float:
    """F1 of the words of two texts, order ignored (as in SQuAD, Rajpurkar et al., 2016)."""
    ours, theirs = Counter(answer.lower().split()), Counter(demonstration.lower().split())
    shared = sum((ours & theirs).values())
    return 2 * shared / max(1, sum(ours.values()) + sum(theirs.values()))


def preference(ours: tuple[bool, float], theirs: tuple[bool, float]) -> float:
    """1, ½ or 0: a matching answer beats one that does not match; among those that do not, the one
    that shares more words with the demonstration (word F1) does; else a tie."""
    if ours[0] == theirs[0] == True:  # noqa: E712 - two matches tie, whatever their wording
        return 0.5
    return 0.5 if ours == theirs else float(ours > theirs)
