"""Preference models: P(y ≻ y' | x) for batches of pairs, and what self-play makes of them.

A `Judge` compares texts; nothing here knows of training. `win_probabilities` asks it for all pairs
of a prompt's responses and `pick_pair` chooses what is trained on. Preferences are true pairwise
probabilities and may be intransitive. `CachedJudge` keeps verdicts on disk, so that no question is
put twice, neither within a run nor after a kill. Judges that are models are in `judge_models.py`,
one behind a server in `judge_server.py`.

Shapes: K responses of a prompt. Matrices are float64 [K, K] with P[i, j] = P(y_i ≻ y_j | x), and so
P[i, j] + P[j, i] = 1 and 1/2 on the diagonal.
"""

import hashlib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from numbers import Real
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, cast

import numpy as np

from alphaspin.data.answers import checked_part
from alphaspin.data.demonstrations import Messages
from alphaspin.errors import InputError, JudgeError
from alphaspin.foundation.runs import file_hash, write_atomically

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to the response, and the demonstrated answer where a judge needs it."""

    messages: Messages
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The question whether `first` is the better response."""

    prompt: Prompt
    first: str
    second: str

    def swapped(self) -> "Comparison":
        """The same question with the responses in the other order."""
        return Comparison(self.prompt, self.second, self.first)


def plain_text(messages: Messages) -> str:
    """A conversation for a model without a chat template: one message alone is its content."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)


class Judge(Protocol):
    """What compares two responses."""

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


# Asking


def checked_verdicts(judge: Judge, pairs: Sequence[Comparison]) -> Iterator[Mapping[int, float]]:
    """The judge's groups, each verdict checked.

    Raises:
        JudgeError: one that is no number in [0, 1], for no pair or for a pair that had one;
            afterwards, too few.
    """
    seen: set[int] = set()
    for group in judge.compare(pairs):
        for index, verdict in group.items():
            if not 0 <= index < len(pairs) or index in seen:
                raise JudgeError(
                    f"{judge.identity}: a verdict for pair {index}, which was not asked or has one "
                    f"({len(pairs)} pairs)"
                )
            if not isinstance(verdict, Real) or not 0 <= verdict <= 1:  # NaN too
                one, other = pairs[index].first[:60], pairs[index].second[:60]
                raise JudgeError(
                    f"{judge.identity}: verdict {verdict!r} is not a number in [0, 1], on {one!r} "
                    f"against {other!r}"
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
        key = _key("", question)
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


def win_probabilities(
    judge: Judge, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
) -> list[Matrix]:
    """The matrix [K, K] of each prompt's responses; K may differ between prompts.

    All prompts' questions, K(K-1)/2 each at most, go to the judge together.

    Raises:
        JudgeError: as `preferences`.
    """
    pairs = [
        Comparison(prompt, texts[i], texts[j])
        for prompt, texts in zip(prompts, responses, strict=True)
        for i, j in combinations(range(len(texts)), 2)
    ]
    found = iter(preferences(judge, pairs))
    matrices: list[Matrix] = []
    for texts in responses:
        matrix = np.full((len(texts), len(texts)), 0.5)
        for i, j in combinations(range(len(texts)), 2):
            matrix[i, j] = next(found)
            matrix[j, i] = 1 - matrix[i, j]
        matrices.append(matrix)
    return matrices


# What self-play makes of a matrix

TIE = 1e-9  # win rates closer than this differ by rounding


def win_rates(matrix: Matrix) -> list[float]:
    """P̂_i = (1/K) Σ_k P(y_i ≻ y_k), itself counted as 1/2  (SPPO, arXiv 2405.00675)."""
    return [math.fsum(row) / len(row) for row in matrix.tolist()]


def bradley_terry(matrix: Matrix) -> Matrix:
    """The transitive matrix σ(s_i - s_j) with s_i the mean over k of logit P(y_i ≻ y_k).

    What the public SPPO code trains on (scripts/compute_prob.py, from the scores of
    `Blender.rank`). A matrix that is Bradley-Terry stays as it is; certainty is cut at 1e-6. With
    PairRM the public code's s is twice as large, as it adds both orders' logits where
    `PairRMJudge` averages them.
    """
    p = matrix.clip(1e-6, 1 - 1e-6)
    scores = (np.log(p) - np.log1p(-p)).mean(1)
    return 1 / (1 + np.exp(scores[None, :] - scores[:, None]))


class Pair(NamedTuple):
    """Indices of the best and the worst response, and the win probability to train each on."""

    best: int
    worst: int
    p_best: float
    p_worst: float


Labels = Literal["soft", "single", "hard", "bradley_terry"]


def pick_pair(matrix: Matrix, labels: Labels = "soft") -> Pair | None:
    """Argmax and argmin of P̂, the first of those that tie; None if all tie: nothing to learn.

    Responses with equal texts tie, so best and worst differ in text. The probabilities, for the
    `win_prob` of `losses.sppo` and `losses.rspo`:

        soft           P̂ of each, from true pairwise probabilities (the paper)
        single         P(best ≻ worst) and 1 - it (`loss_type: sppo_single` of the public code)
        hard           1 and 0 (`sppo_hard` of TRL, which sums the two losses)
        bradley_terry  P̂ from `bradley_terry`, which chooses the two as well (the public code)
    """
    rates = win_rates(bradley_terry(matrix) if labels == "bradley_terry" else matrix)
    high, low = max(rates), min(rates)
    if high - low <= TIE:
        return None
    best = next(i for i, rate in enumerate(rates) if rate >= high - TIE)
    worst = next(i for i, rate in enumerate(rates) if rate <= low + TIE)
    if labels == "hard":
        return Pair(best, worst, 1.0, 0.0)
    if labels == "single":
        return Pair(best, worst, float(matrix[best, worst]), float(matrix[worst, best]))
    return Pair(best, worst, rates[best], rates[worst])


# Verdicts on disk


def _key(identity: str, pair: Comparison) -> bytes:
    """128 bits of everything that a verdict depends on."""
    content = [identity, pair.prompt.messages, pair.prompt.answer, pair.first, pair.second]
    text = json.dumps(content, sort_keys=True)  # ASCII: lone surrogates too
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _line(content: str) -> bytes:
    """A record of the cache: hash of the content, the content. It begins its own line, so that a
    torn record before it does not swallow it."""
    digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    return f"\n{digest} {content}".encode()


class CachedJudge:
    """A judge whose verdicts are durable in a file that only grows.

    One record per group of verdicts, flushed to disk before it is handed on, with a hash: one that
    was torn by a kill, or is damaged, does not count and is asked again. Verdicts are found by
    hash of the judge's identity, the prompt with its answer, and both responses in their order, so
    several judges may share a file; several processes at the same time may not.
    """

    def __init__(self, judge: Judge, path: Path):
        """Read what is there. `path` is made with the first verdict; its folder must exist."""
        self._judge = judge
        self._path = path
        self._verdicts: dict[str, float] = {}
        self.asked = 0
        """Questions put to the judge by this object."""
        for record in path.read_bytes().split(b"\n") if path.exists() else ():
            content = record[17:].decode(errors="replace")
            if record and b"\n" + record == _line(content):
                self._verdicts |= json.loads(content)

    @property
    def identity(self) -> str:
        """The judge's."""
        return self._judge.identity

    @property
    def both_orders(self) -> bool:
        """The judge's."""
        return self._judge.both_orders

    def compare(self, pairs: Sequence[Comparison]) -> Iterator[Mapping[int, float]]:
        """What is known, then the judge's groups as they become durable."""
        keys = [_key(self.identity, pair).hex() for pair in pairs]
        known = {i: self._verdicts[key] for i, key in enumerate(keys) if key in self._verdicts}
        yield known
        rest = [i for i in range(len(pairs)) if i not in known]
        if not rest:
            return
        self.asked += len(rest)
        for group in checked_verdicts(self._judge, [pairs[i] for i in rest]):
            found = {rest[i]: float(verdict) for i, verdict in group.items()}
            record = {keys[i]: verdict for i, verdict in found.items()}
            self._append(json.dumps(record))
            self._verdicts |= record
            yield found

    def _append(self, content: str) -> None:
        if not self._path.exists():
            write_atomically(self._path, "")  # durable as an entry of its folder
        with self._path.open("ab") as file:
            file.write(_line(content))
            file.flush()
            os.fsync(file.fileno())


# Judges without a model


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


class CallableJudge:
    """A Python function of a `Comparison` that returns P(first ≻ second) in [0, 1].

    Each verdict is kept as soon as it is there. The identity has the hash of the function's source
    file: an edited one is another judge.
    """

    def __init__(self, name: str, *, folder: str = "", both_orders: bool = True):
        """Import `module:function`, also from a folder.

        Args:
            name: `package.module:function`.
            folder: by default the working directory.
            both_orders: ask both orders; False for a function with f(a, b) = 1 - f(b, a).

        Raises:
            InputError: no such module or function.
        """
        module_name, _, attribute = name.partition(":")
        if folder not in sys.path:  # an installed command does not even look in the working one
            sys.path.insert(0, folder)
        try:
            module = importlib.import_module(module_name)
            function = getattr(module, attribute)
        except (ImportError, AttributeError, ValueError) as error:
            looked = f" (folder = {folder}, and what is installed)" if folder else ""
            raise InputError(f"judge {name!r}: {error}; needs module:function{looked}") from error
        if not callable(function):
            raise InputError(f"judge {name!r}: is not a function")
        self._function = cast("Callable[[Comparison], float]", function)
        source = getattr(module, "__file__", None)
        self.identity = f"callable:{name}@{file_hash(Path(source))[:16] if source else '?'}"
        self.both_orders = both_orders

    def compare(self, pairs: Sequence[Comparison]) -> Iterator[Mapping[int, float]]:
        """One by one."""
        return ({i: self._function(pair)} for i, pair in enumerate(pairs))
