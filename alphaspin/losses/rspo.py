"""Regularised self-play policy optimisation: SPPO with a regulariser towards the base."""

from typing import Literal

from torch import Tensor

from alphaspin.losses.sppo import sppo

Regulariser = Literal[
    "reverse_kl",
    "forward_kl",
    "forward_reverse",
    "chi2",
    "entropy",
    "chi2_smooth",
    "cross_entropy",
    "forward_answers",
]
RSPO_CLAMP = {"forward_kl": 7.0, "forward_reverse": 10.0, "chi2": 10.0, "chi2_smooth": 10.0}
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
        chi2_smooth      σ(min(d, 10))                  `chisqsm1` of the public code
        cross_entropy    -lp_θ lp_base                  `reverseklnoent`: reverse KL, no entropy
        forward_answers  0; see `forward_answers`

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
        case "chi2_smooth":
            r = d.clamp(max=cap).sigmoid()
        case "cross_entropy":
            r = -policy * base
        case "forward_answers":
            return sppo(policy, ref, win_prob, eta=eta)
    return sppo(policy, ref, win_prob, eta=eta) + 2 * lam * r


def forward_answers(answer: Tensor, *, lam: float) -> Tensor:
    """-λ lp_θ(y_0), y_0 ~ base: the forward KL of the base from answers of its own, per prompt.

    The third regulariser of RSPO's public code (`sppo_forward`), which is added to the pair's loss.
    There it is a mean over positions, padding too, of the answer without its prompt; here the KL's
    own, the sum over the answer's tokens after its prompt.
    """
    return -lam * answer
