"""Differences between policies, by prompt.

All policies answer the same prompts from the same uniform numbers, so that what makes a prompt hard
is taken out of a difference: it is known better than from two standard errors. The covariances of
the means between policies hold all of it, in a few numbers.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from alphaspin.data.answers import checked_part, preference, word_f1
from alphaspin.evaluation.record import Evaluation, Measures

SHARES = ("sampled", "greedy", "preferred", "judged")
"""Measures that are shares of prompts."""

AGAINST_BASE = ("preferred", "judged")
"""Measures that compare with the base, which has ½ itself."""

RARE = 0.02
"""Exact matches of a smaller share of the prompts say nothing about quality."""


class Paired(BaseModel):
    """prompts: N. covariance: measure → [policies, policies] of the means over prompts."""

    prompts: int
    covariance: dict[str, list[list[float]]]


class Difference(NamedTuple):
    """Of two policies' means, with a confidence interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves out 0, else 0."""
        return (self.low > 0) - (self.high < 0)


def by_prompt(
    rows: Sequence[Evaluation], answers: Sequence[str | None], pattern: str | None
) -> dict[str, NDArray[np.float64]]:
    """Measure → [policies, prompts], of those measures that all policies have.

    Args:
        rows: the base first.
        answers: the demonstrations, None for prompts alone.
        pattern: which part of an answer must match.
    """
    if not rows:
        return {}
    found: dict[str, list[list[float]]] = {
        "length": [[float(len(tokens)) for tokens in row.answer_tokens] for row in rows]
    }
    if all(row.verdicts for row in rows):
        found["judged"] = [row.verdicts or [] for row in rows]
    gold = [answer for answer in answers if answer is not None]
    if len(gold) == len(answers):
        part = checked_part(pattern)
        wanted = [part(text) for text in gold]

        def same(texts: Sequence[str]) -> list[bool]:
            return [part(text) == want for text, want in zip(texts, wanted, strict=True)]

        def quality(texts: Sequence[str]) -> list[tuple[bool, float]]:
            words = map(word_f1, texts, gold)
            return list(zip(same(texts), words, strict=True))

        base = quality(rows[0].answers)
        found["nll"] = [[-lp for lp in row.demonstration_logps] for row in rows]
        found["sampled"] = [list(map(float, same(row.answers))) for row in rows]
        found["greedy"] = [list(map(float, same(row.greedy_answers))) for row in rows]
        found["preferred"] = [list(map(preference, quality(row.answers), base)) for row in rows]
    return {measure: np.array(values) for measure, values in found.items()}


def paired(values: dict[str, NDArray[np.float64]]) -> Paired | None:
    """Covariances of the means; None of fewer than two prompts."""
    prompts = max((value.shape[1] for value in values.values()), default=0)
    if prompts < 2:
        return None
    covariance = {
        measure: (np.atleast_2d(np.cov(value, ddof=1)) / prompts).tolist()
        for measure, value in values.items()
    }
    return Paired(prompts=prompts, covariance=covariance)


def primary(rows: Sequence[Measures]) -> str | None:
    """The one measure that a verdict rests on, chosen before differences are looked at.

    The judge's where there is one; else exact matches, or where hardly any policy has them, whose
    answers share more words with the demonstrations.
    """
    if not rows or len(rows) == 1:
        return None
    if all(row.judged is not None for row in rows[1:]):
        return "judged"
    if any(row.sampled is None or not math.isfinite(row.sampled) for row in rows):
        return None
    return "sampled" if max(row.sampled or 0 for row in rows) >= RARE else "preferred"


def value(row: Measures, measure: str) -> float | None:
    """A measure of a policy; None also where it is not finite."""
    if row.name == "base" and measure in AGAINST_BASE:
        return 0.5
    found = getattr(row, measure)
    return None if found is None or not math.isfinite(found) else float(found)


def difference(
    rows: Sequence[Measures],
    known: Paired | None,
    measure: str,
    one: int,
    other: int,
    looks: int = 1,
) -> Difference | None:
    """rows[one] - rows[other], with an interval of 95 %; None where nothing is known.

    Of shares it is Bonett and Price's, see `winrate`: a win and a loss are added to the prompts, so
    that differences that are all alike do not pass for certain. Else it is Student's. Without
    covariances (runs of earlier versions) the policies' own errors stand in, which are too wide.

    Args:
        rows: base, iterates, control.
        known: of the same rows.
        measure: which one.
        one: number of a row.
        other: of another.
        looks: differences that are looked at; all their intervals together hold 95 % (Bonferroni).
    """
    ours, theirs = value(rows[one], measure), value(rows[other], measure)
    if ours is None or theirs is None:
        return None
    apart = ours - theirs
    z = NormalDist().inv_cdf(1 - 0.025 / max(1, looks))
    if known is None or measure not in known.covariance:
        errors = [getattr(rows[k], f"{measure}_se", None) for k in (one, other)]
        if rows[other].name == "base" and measure in AGAINST_BASE:
            errors[1] = 0.0
        finite = [error for error in errors if error is not None and math.isfinite(error)]
        if len(finite) < 2:
            return None
        half = z * math.hypot(*finite)
        return Difference(apart, apart - half, apart + half)
    c, n = known.covariance[measure], known.prompts
    square = max(0.0, c[one][one] + c[other][other] - 2 * c[one][other])
    if measure not in SHARES:
        half = _student(z, n - 1) * math.sqrt(square)
        return Difference(apart, apart - half, apart + half)
    most = 0.5 if measure in AGAINST_BASE and "base" in (rows[one].name, rows[other].name) else 1.0
    middle = n * apart / (n + 2)
    mean_square = (n * (n - 1) * square + n * apart**2 + 2 * most**2) / (n + 2)
    half = z * math.sqrt((mean_square - middle**2) / (n + 2))
    return Difference(apart, max(-most, middle - half), min(most, middle + half))


def _student(z: float, freedom: int) -> float:
    """The quantile of Student's t where the normal's is z (Abramowitz and Stegun, 26.7.5)."""
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def kinds(rows: Sequence[Evaluation], values: dict[str, NDArray[np.float64]]) -> list[str]:
    """What became of each prompt from base to last iterate: `better`, `worse`, `other` or `same`.

    Better and worse by the primary measure; `other` is another text that is neither.
    """
    last = max((k for k, row in enumerate(rows) if not row.control), default=0)
    measure = primary(rows)
    gains = (
        values[measure][last] - values[measure][0] if measure else np.zeros(len(rows[0].answers))
    )
    return [
        "better" if gain > 0 else "worse" if gain < 0 else "same" if one == other else "other"
        for gain, one, other in zip(gains, rows[0].answers, rows[last].answers, strict=True)
    ]


def chosen(became: Sequence[str], count: int) -> list[int]:
    """Numbers of up to `count` prompts, of each kind in turn: better, worse, other; then the same.

    Within a kind in the order of the prompts, so that nothing is picked by hand.
    """
    groups = [
        [i for i, k in enumerate(became) if k == kind] for kind in ("better", "worse", "other")
    ]
    turns = max(map(len, groups), default=0)
    mixed = [group[turn] for turn in range(turns) for group in groups if turn < len(group)]
    return (mixed + [i for i, kind in enumerate(became) if kind == "same"])[:count]
