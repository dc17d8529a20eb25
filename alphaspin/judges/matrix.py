"""What self-play makes of win probabilities.

Shapes: K responses of a prompt. Matrices are float64 [K, K] with P[i, j] = P(y_i ≻ y_j | x), and so
P[i, j] + P[j, i] = 1 and 1/2 on the diagonal.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from alphaspin.judges.base import Comparison, Judge, Prompt, preferences

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]


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
    pair = pick_extremes(rates)
    if pair and labels == "hard":
        return pair._replace(p_best=1.0, p_worst=0.0)
    if pair and labels == "single":
        best, worst = pair.best, pair.worst
        return Pair(best, worst, float(matrix[best, worst]), float(matrix[worst, best]))
    return pair


def pick_extremes(rates: Sequence[float]) -> Pair | None:
    """Argmax and argmin of win rates, the first of those that tie; None if all tie."""
    high, low = max(rates), min(rates)
    if high - low <= TIE:
        return None
    best = next(i for i, rate in enumerate(rates) if rate >= high - TIE)
    worst = next(i for i, rate in enumerate(rates) if rate <= low + TIE)
    return Pair(best, worst, rates[best], rates[worst])
