"""The χ² divergence of demonstrations and answers: rewards drawn to +1 and -1, by least squares."""

from torch import Tensor

from alphaspin.foundation.section import PerIterationFloat, at
from alphaspin.losses.base import Absolute, Pairs


def chi2(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> Tensor:
    """½(r_w - 1)² + ½(r_l + 1)², with r = β(lp_θ - lp_ref).

    Up to the constant 1 it is -(r_w - r_l) + ½(r_w² + r_l²), the variational form of the χ²
    divergence between the data p and its even mixture with the losers q (LS-IQ, Al-Hafez et al.,
    arXiv 2303.00599; LSGAN's targets). Its best reward (p - q)/(p + q) stays within ± 1, so that
    no pair pulls for ever; near p an iteration leaves 1 - 1/(2β) of the error in log π.

    SPIF (Li et al., arXiv 2602.01357) is such an objective by its abstract: the χ² divergence in
    variational form with bounded rewards, the policy its own implicit reward. Its equations could
    not be read here: the mixture in the square, the scale and the default β are ours.
    """
    return (
        0.5 * (beta * (chosen - ref_chosen) - 1) ** 2
        + 0.5 * (beta * (rejected - ref_rejected) + 1) ** 2
    )


class ChiSquared(Absolute):
    """Each response's reward drawn to +1 or -1, the χ² divergence (after arXiv 2602.01357)."""

    kind: str = "chi2"
    beta: PerIterationFloat = (0.5,)
    """Scale β of a response's gain, per iteration: the most it should gain or lose is 1/β nats."""

    remedy = "a larger loss.beta"

    def loss(self, pairs: Pairs, lengths_B2: Tensor, iteration: int) -> Tensor:
        """As `chi2`."""
        return chi2(*pairs, beta=at(self.beta, iteration))

    def reward_scale(self, iteration: int) -> float:
        """β."""
        return at(self.beta, iteration)

    def title(self) -> str:
        """With its β."""
        return f"χ² loss with β = {', '.join(f'{beta:g}' for beta in self.beta)}"
