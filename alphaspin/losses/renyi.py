"""The Rényi divergences of demonstrations and answers: a family from likelihood to χ²."""

import torch
from torch import Tensor

from alphaspin.foundation.section import PerIterationWeight, PositiveFloat, at
from alphaspin.losses.base import Absolute, Pairs


def tilt(r: Tensor, t: float, clamp: float) -> Tensor:
    """(e^{tr} - 1)/t, and r at t = 0; beyond tr = clamp it goes on as a straight line."""
    if t == 0:
        return r
    x = t * r
    bounded = x.clamp(max=clamp)
    return (torch.expm1(bounded) + bounded.detach().exp() * (x - bounded)) / t


def renyi(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    order: float,
    clamp: float = 5.0,
) -> Tensor:
    """T_α(r_l) - T_{α-1}(r_w), with T_t(r) = (e^{tr} - 1)/t, T_0(r) = r and r = lp_θ - lp_ref.

    The variational form of the divergence of order α of the data p from the losers q: pointwise
    q e^{αr} = p e^{(α-1)r}, so e^r = p/q at any order, and with losers of the reference the optimum
    is p. The order says which pairs pull: their weights are e^{(α-1)r_w} and e^{αr_l}. α = 1 is
    e^{r_l} - r_w, maximum likelihood, as E e^{r_l} is 1 for any policy; ½ the Hellinger distance
    (both weights fall as a pair is learnt), 2 Pearson's χ². The Rényi divergence itself (Birrell et
    al., arXiv 2007.03814) takes logs of both expectations: the same optimum and directions, but
    weights that are normalised over a batch, so that a pair's loss would hang on its micro-batch.

    IRIS (Liao et al., arXiv 2604.20933) has by its abstract two such terms with exponential
    weights controlled by α, and moves α from sharp to smooth. Its equations could not be read here:
    the form without logs, the clamp and the default are ours, and its rule that adapts α to the gap
    is missing; `order` takes an entry for each iteration.

    Args:
        chosen: lp_θ(y_w); the others alike.
        rejected: lp_θ(y_l).
        ref_chosen: lp_ref(y_w).
        ref_rejected: lp_ref(y_l).
        order: α ≥ 0.
        clamp: largest exponent, in nats; beyond it a pair's pull no longer grows.
    """
    r_w, r_l = chosen - ref_chosen, rejected - ref_rejected
    return tilt(r_l, order, clamp) - tilt(r_w, order - 1, clamp)


class Renyi(Absolute):
    """A divergence of order α, from likelihood (1) to χ² (2) (after arXiv 2604.20933)."""

    kind: str = "renyi"
    order: PerIterationWeight = (0.5,)
    """Order α, per iteration: ½ Hellinger, 1 likelihood, 2 Pearson's χ²."""
    clamp: PositiveFloat = 5.0
    """Largest exponent of a weight, in nats."""

    def loss(self, pairs: Pairs, lengths_B2: Tensor, iteration: int) -> Tensor:
        """As `renyi`."""
        del lengths_B2
        return renyi(*pairs, order=at(self.order, iteration), clamp=self.clamp)

    def title(self) -> str:
        """With its α."""
        return f"Rényi loss of order α = {', '.join(f'{order:g}' for order in self.order)}"
