"""SPACE: demonstrations and answers are told apart one by one, by noise contrast."""

import math

import torch.nn.functional as F
from torch import Tensor

from alphaspin.foundation.section import PositiveFloat
from alphaspin.losses.base import Absolute, Pairs


def space(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, mu: float = 1.0
) -> Tensor:
    """-log σ(r_w - log μ) - μ log σ(log μ - r_l), with r = lp_θ - lp_ref.

    SPACE (Wang et al., arXiv 2512.07175, where σ_μ(r) = 1/(1 + μe^-r)); noise-contrastive
    estimation (Gutmann and Hyvärinen, 2010) with the reference's answers as the noise, μ of them
    for a demonstration: σ(r - log μ) = π_θ/(π_θ + μπ_ref) is the probability that y is the
    demonstration. With losers of the reference the optimum is the data's distribution, for every
    μ. The paper draws μ answers per prompt; here the one that there is weighs μ, which has the same
    expectation.
    """
    shift = math.log(mu)
    real = F.logsigmoid(chosen - ref_chosen - shift)
    return -real - mu * F.logsigmoid(shift - (rejected - ref_rejected))


class SPACE(Absolute):
    """Noise contrast: each response classified by its own gain (arXiv 2512.07175)."""

    kind: str = "space"
    mu: PositiveFloat = 1.0
    """Noise ratio μ: answers of the reference for a demonstration; 1 in the paper."""

    def loss(self, pairs: Pairs, lengths_B2: Tensor, iteration: int) -> Tensor:
        """As `space`."""
        del lengths_B2, iteration
        return space(*pairs, mu=self.mu)

    def title(self) -> str:
        """With its μ."""
        return f"SPACE loss with μ = {self.mu:g}"
