"""Nash mirror descent: a policy gradient of a regularised win probability."""

from torch import Tensor


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
