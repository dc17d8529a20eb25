"""Identity preference optimisation: the squared distance of the margin from a target."""

from typing import Literal

from torch import Tensor

from alphaspin.foundation.section import PositiveFloat
from alphaspin.losses.base import Loss, Pairs, margin


def ipo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, tau: float
) -> Tensor:
    """(Δ - 1/(2τ))²  (Azar et al., arXiv 2310.12036, eq. 17).

    The paper sums log-probs over tokens. For the averaged variant the caller divides each
    log-prob by its number of tokens.
    """
    return (margin(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * tau)) ** 2


class IPO(Loss):
    """The squared distance of the margin from 1/(2τ)."""

    kind: str = "ipo"
    ipo_tau: PositiveFloat = 0.1
    """τ: the target of the margin is 1/(2τ) nats."""
    ipo_length: Literal["sum", "mean"] = "sum"
    """Log-probs summed over tokens (the paper) or averaged (several trainers)."""

    remedy = "a larger loss.ipo_tau"

    def loss(self, pairs: Pairs, lengths_B2: Tensor, iteration: int) -> Tensor:
        """As `ipo`."""
        del iteration
        if self.ipo_length == "mean":
            chosen, rejected = lengths_B2.unbind(1)
            pairs = Pairs(
                pairs.chosen / chosen,
                pairs.rejected / rejected,
                pairs.ref_chosen / chosen,
                pairs.ref_rejected / rejected,
            )
        return ipo(*pairs, tau=self.ipo_tau)

    def reward_scale(self, iteration: int) -> float:
        """τ, as in TRL."""
        return self.ipo_tau

    def title(self) -> str:
        """With its τ."""
        return f"IPO loss with τ = {self.ipo_tau:g}"
