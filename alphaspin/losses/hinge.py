"""The hinge loss of the margin."""

import torch
from torch import Tensor

from alphaspin.foundation.section import PerIterationFloat, at
from alphaspin.losses.base import Loss, Pairs, margin


def hinge(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> Tensor:
    """max(0, 1 - βΔ): the reference-relative hinge; often cited as SLiC, which has none."""
    return torch.relu(1 - beta * margin(chosen, rejected, ref_chosen, ref_rejected))


class Hinge(Loss):
    """The hinge loss of the margin to the reference."""

    kind: str = "hinge"
    beta: PerIterationFloat = (0.1,)
    """Inverse temperature β, per iteration."""

    remedy = "a larger loss.beta"

    def loss(self, pairs: Pairs, lengths_B2: Tensor, iteration: int) -> Tensor:
        """As `hinge`."""
        return hinge(*pairs, beta=at(self.beta, iteration))

    def reward_scale(self, iteration: int) -> float:
        """β."""
        return at(self.beta, iteration)

    def title(self) -> str:
        """With its β."""
        return f"hinge loss with β = {', '.join(f'{beta:g}' for beta in self.beta)}"
