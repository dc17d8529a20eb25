"""What a judge's verdicts say about a policy: a win rate, how sure it is, and at equal length.

Verdicts are P(answer ≻ the other's) of one prompt each, in [0, 1], ½ for a tie. N prompts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054
"""The point of the normal distribution beyond which 2.5 % lie: intervals are of 95 %."""

RIDGE = 1.0
"""λ of the penalty λφ²/2 on the length coefficient: a normal prior of standard deviation 1."""


class Estimate(NamedTuple):
    """A share with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def win_rate(verdicts: Sequence[float]) -> Estimate:
    """The mean verdict, with Bonett and Price's adjusted Wald interval for paired proportions.

    One win and one loss are added to the verdicts; the interval is mean ± z·sd/√(N+2) of the result
    (Journal of Educational and Behavioral Statistics 37, 2012, p. 479, in terms of
    ½ + (wins - losses)/(2N)). Both policies answer the same prompts, so most verdicts may be ties:
    Wilson's interval, which takes each verdict for a win or a loss, would be far too wide then, and
    a bootstrap would have no width at all where all verdicts are alike.
    """
    padded = np.array([*verdicts, 0.0, 1.0])
    half = Z * float(padded.std()) / math.sqrt(len(padded))
    middle = float(padded.mean())
    return Estimate(float(np.mean(verdicts)), max(0.0, middle - half), min(1.0, middle + half))


def at_equal_length(
    verdicts: Sequence[float],
    lengths: Sequence[int],
    others: Sequence[int],
    difficulty: Sequence[float] | None = None,
) -> Estimate:
    """The win rate that a logistic regression predicts for answers of equal length.

        logit P(win) = θ + φ·tanh(Δ/s) + ψ·γ,   Δ = length - other's length,   s = sd(Δ)

    is fitted to the verdicts (soft ones too) by Newton's method, and the mean of σ(θ + ψγ) is the
    result: AlpacaEval 2's length-controlled win rate (Dubois et al., arXiv 2404.04475, eq. 2). The
    difficulty γ of each instruction is estimated from many models; without it ψ is 0. In place of
    the cross-validated L1 penalty: λφ²/2 and λψ²/2 with λ = `RIDGE`, and one win and one loss at
    equal length, which keep θ finite when all verdicts are alike. The interval is that of the
    result's logit by the sandwich estimator, so it holds for ties and soft verdicts as well.

    Args:
        verdicts: [N].
        lengths: of the answers that the verdicts are for, [N], in any unit.
        others: of those they were compared with, [N].
        difficulty: γ of the instructions, [N].
    """
    difference = np.asarray(lengths, float) - np.asarray(others, float)
    scale = float(difference.std()) or 1.0
    gamma_N = [np.asarray(difficulty, float)] if difficulty is not None else []
    of_length_N = np.tanh(difference / scale)
    feature_NF = np.stack([np.ones(len(verdicts)), of_length_N, *gamma_N], 1)
    equal_NF = feature_NF * (np.arange(feature_NF.shape[1]) != 1)
    padding = np.array([1.0, 0.0, *(one.mean() for one in gamma_N)])
    feature_NF = np.concatenate([feature_NF, [padding, padding]])
    wanted_N = np.array([*verdicts, 1.0, 0.0])
    penalty = np.array([0.0, *[RIDGE] * (len(padding) - 1)])

    def loss(weight: np.ndarray) -> float:
        logit_N = feature_NF @ weight
        return float(
            (np.logaddexp(0, logit_N) - wanted_N * logit_N).sum() + penalty @ weight**2 / 2
        )

    weight, step = np.zeros(len(padding)), np.ones(len(padding))
    hessian = inner = np.eye(len(padding))
    while np.abs(step).max() > 1e-10:  # convex, so a step that is halved until it helps must end
        p_N = 1 / (1 + np.exp(-feature_NF @ weight))
        residual_NF = (wanted_N - p_N)[:, None] * feature_NF
        inner = residual_NF.T @ residual_NF
        hessian = (feature_NF.T * (p_N * (1 - p_N))) @ feature_NF + np.diag(penalty)
        step = np.linalg.solve(hessian, residual_NF.sum(0) - penalty * weight)
        while loss(weight + step) > loss(weight) and np.abs(step).max() > 1e-10:
            step = step / 2
        weight = weight + step
    inverse = np.linalg.inv(hessian)
    p_N = 1 / (1 + np.exp(-equal_NF @ weight))
    value = float(p_N.mean())
    slope = ((p_N * (1 - p_N)) @ equal_NF) / len(p_N) / (value * (1 - value))
    half = Z * math.sqrt(slope @ inverse @ inner @ inverse @ slope)
    middle = math.log(value / (1 - value))
    low, high = (float(1 / (1 + np.exp(-(middle + d)))) for d in (-half, half))
    return Estimate(value, low, high)
