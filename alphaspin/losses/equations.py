"""Losses of self-play: pure functions of per-sequence log-probabilities.

Every argument is a tensor [B] of `lp(y) = Σ_k log π(y_k | x, y_<k)` in nats, summed over the
response including its end token; every result is [B], before any mean. `w` is the winner (the
demonstration), `l` the loser (what an earlier iterate answered). Gradients flow
wherever the arguments carry them.

Pairwise losses (`dpo` … `slic`) take a difference of two responses. Pointwise ones (`sppo`, `rspo`,
`nash_md`) take one response and its win probability, of any shape: pass [B, 2] for a pair and
average. The normaliser log Z(x) of a reference cancels in the former only: the latter want
`mixture_reference(..., log_z=...)`.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from alphaspin.config import Config
from alphaspin.foundation.section import at
from alphaspin.losses.settings import LossConfig
from alphaspin.methods.settings import PreferenceConfig


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


def sppo(policy: Tensor, ref: Tensor, win_prob: Tensor, *, eta: float) -> Tensor:
    """(lp_θ - lp_ref - η(P̂ - ½))²  (SPPO, Wu et al., arXiv 2405.00675, eq. 4.7), per response.

    A pair's loss is the mean of its two responses', as in the public code (`loss_type: sppo`); some
    trainers sum them. Its other variants are other win probabilities, see `judges.pick_pair`.

    The ½ stands for log E_ref[e^{ηP̂}]/η, the step's own log Z(x), and the loss is minimal at
    π ∝ π_ref e^{ηP̂} exactly where the two agree. An unnormalised mixture as `ref` shifts the target
    by its own log Z(x): `mixture_reference(..., log_z=...)`.

    Args:
        policy: lp_θ(y), the only argument that should carry a gradient.
        ref: lp of the previous iterate.
        win_prob: P̂(y ≻ π_t | x) in [0, 1].
        eta: η = 1/β of the public code; 1000 in the paper.
    """
    return (policy - ref - eta * (win_prob - 0.5)) ** 2


Regulariser = Literal["reverse_kl", "forward_kl", "forward_reverse", "chi2", "entropy"]
RSPO_CLAMP = {"forward_kl": 7.0, "forward_reverse": 10.0, "chi2": 10.0}
"""Largest exponent, in nats, of the importance ratios in R, as published."""
RSPO_REVERSE_WEIGHT = 5.0
"""w of `forward_reverse`, as published."""


def rspo(
    policy: Tensor,
    ref: Tensor,
    base: Tensor,
    win_prob: Tensor,
    *,
    eta: float,
    lam: float,
    regulariser: Regulariser,
    clamp: float | None = None,
    reverse_weight: float = RSPO_REVERSE_WEIGHT,
) -> Tensor:
    """sppo + 2λR(y)  (RSPO, Tang et al., arXiv 2503.00030), per response.

    A pair's loss is the mean of its two responses', ½(sppo_w + sppo_l) + λ(R_w + R_l): the paper's
    R is summed over the pair, hence the 2. With d = lp_θ - lp_base:

        reverse_kl       d²                             published λ 0.5
        forward_kl       exp(min(-d, 7))                published λ 0.1
        forward_reverse  exp(min(-d, 10)) + 5 d²        published λ 0.1
        chi2             exp(min(d, 10))
        entropy          lp_θ²

    The ratios weigh responses sampled from the iterate; beyond the clamp the gradient of the
    exponential is 0. With `reverse_kl` the loss is, up to a constant, (1+2λ) times
    (lp_θ - mix)², where mix = a(lp_ref + η(P̂ - ½)) + (1-a) lp_base and a = 1/(1+2λ): an
    unnormalised geometric mixture, whose log Ẑ(x) is taken out by passing ref - log Ẑ(x)/a.
    Repeated to convergence it finds the Nash equilibrium regularised with τ = 2λ/η.

    Args:
        policy: lp_θ(y), the only argument that should carry a gradient.
        ref: lp of the previous iterate.
        base: lp of the base.
        win_prob: P̂(y ≻ π_t | x) in [0, 1].
        eta: as in `sppo`.
        lam: λ.
        regulariser: which R.
        clamp: largest exponent c in nats; None is the published one.
        reverse_weight: w of `forward_reverse`.
    """
    d = policy - base
    cap = RSPO_CLAMP.get(regulariser) if clamp is None else clamp
    match regulariser:
        case "reverse_kl":
            r = d**2
        case "forward_kl":
            r = (-d).clamp(max=cap).exp()
        case "forward_reverse":
            r = (-d).clamp(max=cap).exp() + reverse_weight * d**2
        case "chi2":
            r = d.clamp(max=cap).exp()
        case "entropy":
            r = policy**2
    return sppo(policy, ref, win_prob, eta=eta) + 2 * lam * r


def nash_md(policy: Tensor, base: Tensor, win_prob: Tensor, *, tau: float) -> Tensor:
    """-lp_θ(y) · stop(P(y ≻ y') - ½ - τ(lp_θ - lp_base))  (Munos et al., arXiv 2312.00886, sec. 7).

    A surrogate: its value means nothing, descending its gradient ascends the regularised
    preference. That holds on policy only: y ~ π_θ for every step, and y' from the mixture of π_θ
    and the base (`mixture_reference`; token by token in practice). With softmax logits of its own
    for every y, a natural gradient step of length η against y' ~ π^(1-ητ) π_base^(ητ) is the
    paper's tabular Nash-MD step. The baseline ½ leaves the expected gradient as it is, and so does
    log Z(x) of a reference: it needs no correction here, only more samples.

    Args:
        policy: lp_θ(y); its gradient is all that flows.
        base: lp_base(y).
        win_prob: P(y ≻ y' | x) in [0, 1], for one opponent's answer or averaged over several.
        tau: τ, the strength of the KL term.
    """
    return -policy * (win_prob - 0.5 - tau * (policy - base)).detach()


def mixture_reference(
    prev: Tensor,
    base: Tensor,
    *,
    alpha: float,
    kind: str = "geometric",
    log_z: Tensor | None = None,
) -> Tensor:
    """Log-prob of the mixture of two policies, up to log Z(x) where geometric.

    geometric: α lp_prev + (1-α) lp_base - log_z  (α-SPIN, Alami et al., arXiv 2404.04291,
        section 3). Unnormalised without `log_z`: log Z(x) cancels in losses of a difference of two
        responses to one prompt, and only there. A pointwise loss aims |log Z(x)| nats too low
        on every response without it.
    arithmetic: log(α e^{lp_prev} + (1-α) e^{lp_base}), the paper's future work. Normalised.

    At α = 0 and 1 (Z = 1) the absent policy is not touched: its log-prob of -inf would turn into
    NaN.

    Args:
        prev: lp of the previous iterate.
        base: lp of the base.
        alpha: weight α of the previous iterate.
        kind: `geometric` or `arithmetic`.
        log_z: log Z(x) of each response's prompt in nats, or its estimate from importance weights;
            used by `geometric` with 0 < α < 1.
    """
    if alpha == 1:
        return prev
    if alpha == 0:
        return base
    if kind == "geometric":
        mixed = alpha * prev + (1 - alpha) * base
        return mixed if log_z is None else mixed - log_z
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


def pointwise(
    config: PreferenceConfig, policy: Tensor, reference: Tensor, win_prob: Tensor
) -> Tensor:
    """The SPPO loss of each pair: the mean of its two responses', as in the public code.

    Args:
        config: η.
        policy: lp_θ of (best, worst), [B, 2] fp32.
        reference: lp of the previous iterate of the same.
        win_prob: the probability each is trained on, [B, 2].

    Returns:
        [B].
    """
    return sppo(policy, reference, win_prob, eta=config.eta).mean(1)


def regularised(
    config: PreferenceConfig, policy: Tensor, reference: Tensor, win_prob: Tensor, base: Tensor
) -> Tensor:
    """The RSPO loss of each pair, as `pointwise`; `base` is lp of the base, [B, 2]."""
    return rspo(
        policy,
        reference,
        base,
        win_prob,
        eta=config.eta,
        lam=config.lam,
        regulariser=config.regulariser,
        clamp=config.clamp,
        reverse_weight=config.reverse_weight,
    ).mean(1)


def reward_scale(config: Config, iteration: int) -> float:
    """Factor of lp_θ - lp_ref in the rewards that are logged.

    β, or τ for `ipo`, as in TRL; 1 for `slic`, which has none; 1/η for SPPO and RSPO, whose rewards
    so aim at P̂ - ½; τ for Nash-MD, whose reference is the base: what its KL term takes from P - ½.
    """
    if config.method == "nash_md":
        return config.preference.tau
    if config.method != "spin":
        return 1 / config.preference.eta
    loss = config.loss
    return {"ipo": loss.ipo_tau, "slic": 1.0}.get(loss.kind, at(loss.beta, iteration))


def ignores_equal_pairs(config: LossConfig) -> bool:
    """Whether a pair with loser = winner has exactly zero gradient and need not be computed."""
    return config.nll_weight == 0 and not (config.kind == "slic" and config.slic_lambda > 0)
