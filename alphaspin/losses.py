"""Losses of self-play: pure functions of per-sequence log-probabilities.

Every argument is a tensor [B] of `lp(y) = Σ_k log π(y_k | x, y_<k)` in nats, summed over the
response including its end token; every result is [B], before any mean. `w` is the winner (the
demonstration), `l` the loser (what an earlier iterate answered). Gradients flow
wherever the arguments carry them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from alphaspin.config import LossConfig, at


def margin(policy_w: Tensor, policy_l: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
    """Δ = (lp_θ(y_w) - lp_ref(y_w)) - (lp_θ(y_l) - lp_ref(y_l)).

    The normaliser of an unnormalised reference, such as log Z(x) of the geometric mixture, cancels.
    """
    return (policy_w - ref_w) - (policy_l - ref_l)


def dpo(
    policy_w: Tensor,
    policy_l: Tensor,
    ref_w: Tensor,
    ref_l: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-(1-ε) log σ(βΔ) - ε log σ(-βΔ)  (Rafailov et al., arXiv 2305.18290, eq. 7).

    ε > 0 is conservative DPO (Mitchell, 2023): the share of pairs assumed to be labelled the wrong
    way round. TRL's `sigmoid` has no such term; its `robust` is another, unbiased one.
    """
    logit = beta * margin(policy_w, policy_l, ref_w, ref_l)
    loss = -F.logsigmoid(logit)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logit)
    return loss


def ipo(policy_w: Tensor, policy_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, tau: float) -> Tensor:
    """(Δ - 1/(2τ))²  (Azar et al., arXiv 2310.12036, eq. 17).

    The paper sums log-probs over tokens. For the averaged variant the caller divides each
    log-prob by its number of tokens.
    """
    return (margin(policy_w, policy_l, ref_w, ref_l) - 1 / (2 * tau)) ** 2


def hinge(
    policy_w: Tensor, policy_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float
) -> Tensor:
    """max(0, 1 - βΔ): the reference-relative hinge; often cited as SLiC, which has none."""
    return torch.relu(1 - beta * margin(policy_w, policy_l, ref_w, ref_l))


def slic(policy_w: Tensor, policy_l: Tensor, *, delta: float, lam: float) -> Tensor:
    """max(0, δ - lp_θ(y_w) + lp_θ(y_l)) - λ lp_θ(y_w)  (Zhao et al., arXiv 2210.01790)."""
    return torch.relu(delta - policy_w + policy_l) - lam * policy_w


def mixture_reference(
    prev: Tensor, base: Tensor, *, alpha: float, kind: str = "geometric"
) -> Tensor:
    """Log-prob of the mixture of two policies, up to log Z(x) where geometric.

    geometric: α lp_prev + (1-α) lp_base  (α-SPIN, Alami et al., arXiv 2404.04291, section 3).
        Unnormalised: log Z(x) cancels in losses of a difference of two responses to one prompt, and
        only there.
    arithmetic: log(α e^{lp_prev} + (1-α) e^{lp_base}), the paper's future work.

    At α = 0 and 1 the absent policy is not touched: its log-prob of -inf would turn into NaN.
    """
    if alpha == 1:
        return prev
    if alpha == 0:
        return base
    if kind == "geometric":
        return alpha * prev + (1 - alpha) * base
    assert kind == "arithmetic", kind
    return torch.logaddexp(prev + math.log(alpha), base + math.log1p(-alpha))


def pairwise(
    config: LossConfig,
    iteration: int,
    policy: Tensor,
    reference: Tensor,
    lengths: Tensor,
) -> Tensor:
    """The configured loss of each pair at iteration t.

    Args:
        config: kind and coefficients.
        iteration: t, which selects β.
        policy: lp_θ of (winner, loser), [B, 2] fp32.
        reference: lp_ref of the same, [B, 2] fp32.
        lengths: tokens of the same, [B, 2].

    Returns:
        [B]: loss, plus `nll_weight` times the winner's negative log-likelihood per token (as in
        Pang et al., arXiv 2404.19733, eq. 1).
    """
    scale = lengths if config.kind == "ipo" and config.ipo_length == "mean" else 1
    w, l = (policy / scale).unbind(1)  # noqa: E741 - the paper's name
    four = (w, l, *(reference / scale).unbind(1))
    beta = at(config.beta, iteration)
    match config.kind:
        case "dpo":
            loss = dpo(*four, beta=beta, label_smoothing=config.label_smoothing)
        case "ipo":
            loss = ipo(*four, tau=config.ipo_tau)
        case "hinge":
            loss = hinge(*four, beta=beta)
        case "slic":
            loss = slic(w, l, delta=config.slic_delta, lam=config.slic_lambda)
    if config.nll_weight:
        loss = loss - config.nll_weight * policy[:, 0] / lengths[:, 0]
    return loss


def reward_scale(config: LossConfig, iteration: int) -> float:
    """Factor of lp_θ - lp_ref in the rewards that are logged: β, or τ for `ipo`, as in TRL."""
    return config.ipo_tau if config.kind == "ipo" else at(config.beta, iteration)


def ignores_equal_pairs(config: LossConfig) -> bool:
    """Whether a pair with loser = winner has exactly zero gradient and need not be computed."""
    return config.nll_weight == 0 and not (config.kind == "slic" and config.slic_lambda > 0)
