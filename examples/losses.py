"""A loss of your own: `alphaspin-train --loss.kind losses:robust --loss.epsilon .2`, from here.

A function of four log-probs is a loss; its keyword-only arguments are its settings, checked and
shown by `--help`. `Symmetric` is the same as a class, which can say more of itself.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from alphaspin.foundation.section import PerIterationFloat, PositiveFloat, at
from alphaspin.losses.base import Loss, Pairs, margin


def robust(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: PositiveFloat = 0.1,
    epsilon: Annotated[float, Field(ge=0, lt=0.5)] = 0.1,
) -> Tensor:
    """[-(1-ε) log σ(βΔ) + ε log σ(-βΔ)] / (1-2ε)  (Chowdhury et al., arXiv 2403.00409)."""
    logit = beta * margin(chosen, rejected, ref_chosen, ref_rejected)
    return ((epsilon - 1) * F.logsigmoid(logit) + epsilon * F.logsigmoid(-logit)) / (
        1 - 2 * epsilon
    )


class Symmetric(Loss):
    """(1 - tanh(βΔ/2)), bounded, so that no pair counts for more than 2."""

    beta: PerIterationFloat = (0.1,)
    """Inverse temperature β, per iteration."""

    remedy = "a larger loss.beta"

    def loss(self, pairs: Pairs, lengths_B2: Tensor, iteration: int) -> Tensor:
        """Of the margin alone."""
        del lengths_B2
        return 1 - torch.tanh(at(self.beta, iteration) / 2 * margin(*pairs))

    def reward_scale(self, iteration: int) -> float:
        """β."""
        return at(self.beta, iteration)
