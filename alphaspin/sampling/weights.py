"""Importance weights: what they estimate, what they choose, what they are worth.

Shape suffixes: B prompts, N draws per prompt.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOW_SIZE, LARGE_SHARE = 0.1, 0.5
"""Weights are not to be trusted where the effective sample size is below this share of N, or the
largest weight above this share of the sum."""


def log_mean(log_w_BN: Tensor) -> Tensor:
    """log Ẑ(x) = log((1/N) Σ_n w_n) per prompt, [B]; Ẑ is unbiased, log Ẑ low by Var(w/Z)/2N."""
    return log_w_BN.double().logsumexp(1) - math.log(log_w_BN.shape[1])


def effective_size(log_w_BN: Tensor) -> Tensor:
    """Effective sample size (Σ w)² / Σ w² per prompt, [B], from 1 to N (Kong, 1992)."""
    return 1 / log_w_BN.double().softmax(1).square().sum(1)


def resample(log_w_BN: Tensor, uniform_B: Tensor) -> Tensor:
    """Systematic resampling: N indices per prompt, n with multiplicity ⌊N W_n⌋ or ⌈N W_n⌉.

    With the normalised weights W, draw k is the n at which their running sum passes (k + u)/N.

    Args:
        log_w_BN: log-weights.
        uniform_B: one number in [0, 1) per prompt.

    Returns:
        [B, N] int64, each row in ascending order.

    Source: Kitagawa, "Monte Carlo filter and smoother" (1996).
    """
    draws = log_w_BN.shape[1]
    steps_N = torch.arange(draws, dtype=torch.float64, device=log_w_BN.device)
    return _invert(log_w_BN, (steps_N + uniform_B.double()[:, None]) / draws)


def choose(log_w_BN: Tensor, uniform_B: Tensor) -> Tensor:
    """One index per prompt, [B] int64, drawn in proportion to the weights."""
    return _invert(log_w_BN, uniform_B.double()[:, None])[:, 0]


def _invert(log_w_BN: Tensor, point_BK: Tensor) -> Tensor:
    """The indices at which the distribution function passes given points of [0, 1)."""
    total_BN = log_w_BN.double().softmax(1).cumsum(1)
    # The running sum ends at exactly 1, so that it passes every point, and an entry without weight
    # is never the one that does. (N-1+u)/N can round up to 1.
    point_BK = point_BK.clamp(max=math.nextafter(1, 0))
    return torch.searchsorted(total_BN / total_BN[:, -1:], point_BK, right=True)


def metropolis(log_w_BN: Tensor, uniform_BN: Tensor) -> Tensor:
    """Independent Metropolis-Hastings over the draws in their order: where each chain stands.

    The chain starts at draw 0 and moves to draw n where u_n < w_n / w_current. Its law approaches
    π at the rate (1 - Z / max w)^n (Mengersen and Tweedie, 1996, theorem 2.1).

    Args:
        log_w_BN: log-weights of independent draws.
        uniform_BN: numbers in [0, 1); column 0 is not used.

    Returns:
        [B, N] int64, the index after each step; the last column is the answer.
    """
    log_u_BN = uniform_BN.double().log()
    rows_B = torch.arange(len(log_w_BN), device=log_w_BN.device)
    at_B = torch.zeros_like(rows_B)
    path: list[Tensor] = [at_B]
    for n in range(1, log_w_BN.shape[1]):
        gain_B = (log_w_BN[:, n] - log_w_BN[rows_B, at_B]).double()
        at_B = torch.where(log_u_BN[:, n] < gain_B, n, at_B)
        path.append(at_B)
    return torch.stack(path, 1)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the weights of some prompts are worth.

    log_z: [B] log Ẑ, nats. size: [B] ESS/N. share: [B] largest w / Σ w. spread: [B] Var(log w)
    over the draws, which is 0 where the proposal is π. draws: N.
    """

    log_z: Tensor
    size: Tensor
    share: Tensor
    spread: Tensor
    draws: int

    @property
    def trusted(self) -> Tensor:
        """[B] bool: ESS/N >= 0.1 and no draw has more than half of the weight.

        A light check of what the draws show. Neither it nor any other sees mass that the proposal
        never reached: there log Ẑ is too low and the weights look even (Chatterjee and Diaconis,
        2018, on why the largest share is the better of the two).
        """
        return (self.size >= LOW_SIZE) & (self.share <= LARGE_SHARE)

    def note(self) -> str:
        """One sentence for the console and the metrics; it begins with the mean ESS/N."""
        bad = int((~self.trusted).sum())
        text = f"mean ESS {self.size.mean():.2f} of the {self.draws} draws of a prompt"
        if not bad:
            return text
        return (
            f"{text}; the weights of {bad} of {len(self.size)} prompts are NOT to be trusted (ESS "
            f"below {LOW_SIZE:g} of the draws, or one with over {LARGE_SHARE:g} of the weight): "
            "their answers repeat few draws and log Z is underestimated; draw more, or train a "
            "gflownet as the proposal"
        )


def diagnose(log_w_BN: Tensor) -> Diagnosis:
    """Judge the weights of independent draws from one proposal."""
    log_w_BN, draws = log_w_BN.double(), log_w_BN.shape[1]
    share_B = log_w_BN.softmax(1).max(1).values
    spread_B = log_w_BN.var(1, correction=0)
    return Diagnosis(log_mean(log_w_BN), effective_size(log_w_BN) / draws, share_B, spread_B, draws)
