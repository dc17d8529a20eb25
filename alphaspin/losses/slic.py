"""Sequence likelihood calibration: a margin between the two responses, without a reference."""

import torch
from torch import Tensor

from alphaspin.foundation.section import NonNegativeFloat, PositiveFloat
from alphaspin.losses.base import Loss, Pairs


def slic(chosen: Tensor, rejected: Tensor, *, delta: float, lam: float) -> Tensor:
    """max(0, δ - lp_θ(y_w) + lp_θ(y_l)) - λ lp_θ(y_w)  (Zhao et al., arXiv 2210.01790)."""
    return torch.relu(delta - chosen + rejected) - lam * chosen


class SLiC(Loss):
    """The hinge on the policy's own log-probs, without a reference."""

    kind: str = "slic"
    slic_delta: PositiveFloat = 1.0
    """Margin δ, in nats."""
    slic_lambda: NonNegativeFloat = 0.0
    """Weight λ of the chosen response's log-prob."""

    remedy = "a larger loss.slic_lambda"
    has_reference = False

    def loss(self, pairs: Pairs, lengths_B2: Tensor, iteration: int) -> Tensor:
        """As `slic`."""
        del lengths_B2, iteration
        return slic(pairs.chosen, pairs.rejected, delta=self.slic_delta, lam=self.slic_lambda)

    def ignores_equal_pairs(self) -> bool:
        """Not with λ."""
        return super().ignores_equal_pairs() and self.slic_lambda == 0

    def title(self) -> str:
        """With its δ and λ."""
        return f"SLiC loss with δ = {self.slic_delta:g}, λ = {self.slic_lambda:g}"
