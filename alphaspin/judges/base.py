"""What a judge is, and how it is asked; one file each beside this one.

A judge says P(first ≻ second) of two responses to a prompt. Preferences are true pairwise
probabilities and may be intransitive: `matrix` makes of them what self-play trains on, `cache`
keeps them on disk.
"""

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Protocol, Self

from pydantic import create_model

from alphaspin.data.rows import Messages
from alphaspin.errors import JudgeError
from alphaspin.foundation.kinds import Kind, settings_of


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to the response, and the demonstrated answer where a judge needs it."""

    messages: Messages
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The question whether `first` is the better response.

    In a dialogue of several turns each response may have turns of its own before it: then `other`
    is the prompt of `second`, which has the same turns of the user.
    """

    prompt: Prompt
    first: str
    second: str
    other: Prompt | None = None

    def swapped(self) -> "Comparison":
        """The same question with the responses in the other order."""
        other = self.prompt if self.other else None
        return Comparison(self.other or self.prompt, self.second, self.first, other)

    def flat(self) -> "Comparison":
        """The same question as one prompt: what both have before they part, and the rest of each
        dialogue, the user's turns included, as the response."""
        ours, theirs = self.prompt.messages, (self.other or self.prompt).messages
        if ours == theirs:
            return self
        both = next(
            i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]
        )

        def rest(messages: Messages, response: str) -> str:
            whole = [*messages[both:], {"role": "assistant", "content": response}]
            return plain_text(whole).removeprefix("Assistant: ")

        prompt = Prompt(ours[:both], self.prompt.answer)
        return Comparison(prompt, rest(ours, self.first), rest(theirs, self.second))


def plain_text(messages: Messages) -> str:
    """A conversation for a model without a chat template: one message alone is its content."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)


class Judge(Protocol):
    """What compares two responses.

    It may have `bounds` other than (0, 1): a grader's are (1, 10), and its verdict is a grade of
    `first`. Where it has `unread`, a verdict may be NaN: of a reply that cannot be read.
    """

    @property
    def identity(self) -> str:
        """Text that changes when the verdicts may: weights, prompt wording, settings."""
        ...

    @property
    def both_orders(self) -> bool:
        """Whether the verdict depends on who comes first; then both orders are asked."""
        ...

    def compare(self, pairs: Sequence[Comparison]) -> Iterator[Mapping[int, float]]:
        """P(first ≻ second) in [0, 1] by index into `pairs`, in groups as they are found.

        Each index comes once, in any order. A group is kept as a whole or not at all when the run
        dies: one pair where a verdict is dear, one batch where its composition moves last bits.
        """
        ...


class FunctionJudge:
    """A Python function of a `Comparison` that returns P(first ≻ second) in [0, 1].

    Each verdict is kept as soon as it is there. The identity has the hash of the function's source
    file: an edited one is another judge.
    """

    def __init__(
        self,
        function: Callable[..., float],
        identity: str,
        settings: Mapping[str, Any] | None = None,
        *,
        both_orders: bool = True,
        bounds: tuple[float, float] = (0, 1),
    ):
        """Nothing is called yet.

        Args:
            function: takes a `Comparison`, and settings by keyword.
            identity: changes when the verdicts may.
            settings: by keyword.
            both_orders: ask both orders; False for a function with f(a, b) = 1 - f(b, a).
            bounds: of what it returns.
        """
        self.bounds = bounds
        self._function, self._settings = function, dict(settings or {})
        self.identity = f"{identity}{self._settings or ''}"
        self.both_orders = both_orders

    def compare(self, pairs: Sequence[Comparison]) -> Iterator[Mapping[int, float]]:
        """One by one."""
        return ({i: self._function(pair, **self._settings)} for i, pair in enumerate(pairs))


class JudgeConfig(Kind):
    """Who says which of two responses is better; for every `method` but `spin`."""

    kind: str

    free: ClassVar[frozenset[str]] = frozenset({"folder"})
    """Settings that change how it is asked, not what it says."""
    needs_answers: ClassVar[bool] = False
    """Whether it compares with the demonstrated answers, as `evaluate.answer` finds them."""

    @abstractmethod
    def load(self, pattern: str | None) -> Judge:
        """The judge itself.

        Args:
            pattern: `evaluate.answer`.

        Raises:
            InputError: it cannot be loaded.
        """

    def counting(self, pattern: str | None) -> tuple[Judge, Judge | None]:
        """The judge, and where it has one its grader, as benchmarks ask them.

        A reply that cannot be read is NaN, to be counted, and no reason to stop; a demonstrated
        answer that a prompt has is shown to whoever can read. Raises as `load`.
        """
        return self.load(pattern), None

    def title(self) -> str:
        """What it is, for the report."""
        return self.kind

    @classmethod
    def of_function(cls, function: Callable[..., Any], name: str) -> type[Self]:
        """The judge that `function(comparison, *, …)` is."""

        def load(self: JudgeConfig, pattern: str | None) -> Judge:
            del pattern
            chosen = {key: getattr(self, key) for key in settings}
            return FunctionJudge(function, f"callable:{name}@{str(self.plugin)[:16]}", chosen)

        settings = settings_of(function)
        kind = create_model(function.__name__, __base__=cls, **settings)
        kind.load = load
        return kind


def checked_verdicts(judge: Judge, pairs: Sequence[Comparison]) -> Iterator[Mapping[int, float]]:
    """The judge's groups, each verdict checked.

    Raises:
        JudgeError: one that is no number in its bounds, for no pair or for a pair that had one;
            afterwards, too few.
    """
    seen: set[int] = set()
    low, high = getattr(judge, "bounds", (0, 1))
    for group in judge.compare(pairs):
        for index, verdict in group.items():
            if not 0 <= index < len(pairs) or index in seen:
                raise JudgeError(
                    f"{judge.identity}: a verdict for pair {index}, which was not asked or has one "
                    f"({len(pairs)} pairs)"
                )
            unread = getattr(judge, "unread", False) and verdict != verdict
            if not unread and not (isinstance(verdict, Real) and low <= verdict <= high):  # NaN too
                one, other = pairs[index].first[:60], pairs[index].second[:60]
                raise JudgeError(
                    f"{judge.identity}: verdict {verdict!r} is not a number in [{low}, {high}], on "
                    f"{one!r} against {other!r}"
                )
            seen.add(index)
        yield group
    if len(seen) < len(pairs):
        raise JudgeError(f"{judge.identity}: {len(seen)} verdicts for {len(pairs)} pairs")


def preferences(judge: Judge, pairs: Sequence[Comparison]) -> list[float]:
    """P(first ≻ second) of each pair, exactly antisymmetric whatever the judge.

    Equal responses are 1/2 and not asked about; a question that repeats, also in the other order,
    is asked once. Where the order matters to the judge, the mean of P(a, b) and 1 - P(b, a).

    Raises:
        JudgeError: as `checked_verdicts`, or the judge's own.
    """
    place: dict[bytes, int] = {}
    questions: list[Comparison] = []
    slots: list[tuple[int, bool] | None] = []  # which question, and whether it is turned round
    for pair in pairs:
        turned = pair.first > pair.second
        if pair.first == pair.second:
            slots.append(None)
            continue
        question = pair.swapped() if turned else pair
        key = key_of("", question)
        if key not in place:
            place[key] = len(questions)
            questions += [question, question.swapped()] if judge.both_orders else [question]
        slots.append((place[key], turned))
    verdicts = [math.nan] * len(questions)
    for group in checked_verdicts(judge, questions):
        for index, verdict in group.items():
            verdicts[index] = float(verdict)

    def result(slot: tuple[int, bool] | None) -> float:
        if slot is None:
            return 0.5
        index, turned = slot
        p = verdicts[index]
        if judge.both_orders:
            p = (p + (1 - verdicts[index + 1])) / 2
        return 1 - p if turned else p

    return [result(slot) for slot in slots]


def key_of(identity: str, pair: Comparison) -> bytes:
    """128 bits of everything that a verdict depends on."""
    content = [identity, pair.prompt.messages, pair.prompt.answer, pair.first, pair.second]
    content += [pair.other.messages] if pair.other else []
    text = json.dumps(content, sort_keys=True)  # ASCII: lone surrogates too
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
