"""Exact match with the demonstrated answer."""

from collections.abc import Iterator, Mapping, Sequence

from alphaspin.data.answers import checked_part
from alphaspin.errors import InputError
from alphaspin.judges.base import Comparison, Judge, JudgeConfig


class VerifiableJudge:
    """Exact match with the demonstrated answer: 1 if only the first response is right, 0 if only
    the second is, else 1/2."""

    both_orders = False

    def __init__(self, pattern: str | None = None):
        """`pattern` finds the part that must match, as `evaluate.answer` does.

        Raises:
            InputError: not a regular expression with a group.
        """
        self._part = checked_part(pattern)
        self._pattern = pattern
        self.identity = f"verifiable:{pattern!r}"

    def compare(self, pairs: Sequence[Comparison]) -> Iterator[Mapping[int, float]]:
        """All at once.

        Raises:
            InputError: a prompt's answer is missing, or has no match of the pattern.
        """

        def verdict(pair: Comparison) -> float:
            gold = self._part(pair.prompt.answer) if pair.prompt.answer is not None else None
            if gold is None:
                raise InputError(
                    f"no match of {self._pattern!r} in the demonstrated answer "
                    f"{pair.prompt.answer!r}, which verifiable verdicts need"
                )
            return (1 + (self._part(pair.first) == gold) - (self._part(pair.second) == gold)) / 2

        yield {i: verdict(pair) for i, pair in enumerate(pairs)}


class Verifiable(JudgeConfig):
    """Exact match with the demonstrated answer, as `evaluate.answer` says."""

    kind: str = "verifiable"
    needs_answers = True

    def load(self, pattern: str | None) -> Judge:
        """Nothing is read."""
        return VerifiableJudge(pattern)
