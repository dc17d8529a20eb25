"""Direct preference optimisation: the logistic loss of the margin."""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from alphaspin.foundation.section import PerIterationFloat, at
from alphaspin.losses.base import Loss, Pairs, margin


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-(1-ε) log σ(βΔ) - ε log σ(-βΔ)  (Rafailov et al., arXiv 2305.18290, eq. 7).

    ε > 0 is conservative DPO (Mitchell, 2023): the share of pairs assumed to be labelled the wrong
    way round. TRL's `sigmoid` has no such term; its `robust` is another, unbiased one.
    """
    logit = beta * margin(chosen, rejected, ref_chosen, ref_rejected)
    loss = -F.logsigmoid(logit)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logit)
    return loss


class DPO(Loss):
    """The logistic loss of the margin, SPIN's (arXiv 2401.01335) and α-SPIN's."""

    kind: str = "dpo"
    beta: PerIterationFloat = (0.1,)
    """Inverse temperature β, per iteration."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """ε: the share of pairs taken to be labelled the wrong way round."""

    remedy = "a larger loss.beta"

    def loss(self, pairs: Pairs, lengths_B2: Tensor, iteration: int) -> Tensor:
        """As `dpo`."""
        beta = at(self.beta, iteration)
        return dpo(*pairs, beta=beta, label_smoothing=self.label_smoothing)

    def reward_scale(self, iteration: int) -> float:
        """β."""
        return at(self.beta, iteration)

    def title(self) -> str:
        """With its β."""
        return f"logistic (DPO) loss with β = {', '.join(f'{beta:g}' for beta in self.beta)}"
