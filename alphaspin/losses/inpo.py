"""A step of mirror descent on a preference game: the pair's margin drawn to what it should win."""

from torch import Tensor

from alphaspin.losses.base import margin
from alphaspin.losses.reference import mixture_reference


def inpo(
    policy_B2: Tensor, prev_B2: Tensor, anchor_B2: Tensor, gap_B: Tensor, *, eta: float, tau: float
) -> Tensor:
    """(Δ - ηg)², with Δ the margin over π_prev^(1-ητ) π_anchor^(ητ).

    INPO (Zhang et al., arXiv 2407.00617): IPO against a mixture. With g = P̂(y_w) - P̂(y_l), the win
    rates against an opponent μ, or with P(y_w ≻ y_l) - ½ where both are drawn from μ = π_prev, the
    optimum over all pairs is the mirror step π ∝ π_prev^(1-ητ) π_anchor^(ητ) e^{ηP̂}; log Z(x)
    cancels. The paper's η is 1/η here (7.5e-3 there, with τ a third of it), and its g is ½: the
    winner of a pair, drawn with the odds P.

    INPO anchors at the base, and finds the equilibrium regularised with τ. COMAL (Liu et al., arXiv
    2410.23223) moves the anchor to the last iterate now and then, and finds the game's own. EGPO
    (Zhou et al., arXiv 2503.08942) takes each step twice, the second time with μ what the first
    led to.

    Args:
        policy_B2: lp_θ of (y_w, y_l).
        prev_B2: lp of the policy that the step starts from.
        anchor_B2: lp of the policy that it is regularised towards.
        gap_B: g.
        eta: η, in nats for a certain win, as in `sppo`.
        tau: τ, weight of the KL to the anchor against win probabilities; ητ ≤ 1.
    """
    reference_B2 = mixture_reference(prev_B2, anchor_B2, alpha=1 - eta * tau)
    return (margin(*policy_B2.unbind(1), *reference_B2.unbind(1)) - eta * gap_B) ** 2
