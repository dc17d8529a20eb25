"""The reference policy: a mixture of the previous iterate and the base."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from alphaspin.foundation.section import Fraction, Section

NO_AVERAGE = "the average of adapters that started from different random matrices means nothing"


class ReferenceConfig(Section):
    """The reference policy π_ref of iteration t."""

    kind: Literal["geometric", "arithmetic", "ema"] = "geometric"
    """`geometric`: π_prev^α π_base^(1-α) (α-SPIN). `arithmetic`: α π_prev + (1-α) π_base.
    `ema`: geometric, with the moving average of the adapters in the place of π_prev."""
    alpha: Fraction = 1.0
    """Weight α of the previous iterate: 1 is SPIN, 0 is DPO against the base. With `sppo` and
    `rspo`, which need a normalised reference, log Z(x) is estimated from the K responses."""
    mode: Literal["auto", "cached", "online", "joint"] = "auto"
    """When π_ref is computed. `cached`: before training, once per pair, and kept on disk. `online`:
    at each step, previous and base in one pass. `joint`: at each step, in the policy's own pass,
    which gathers sharded weights once for all three. `auto`: the cheapest for the pass at hand."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """ema_t = decay · ema_{t-1} + (1-decay) · adapter_{t-1}, for `kind: ema`."""


def mixture_reference(
    prev: Tensor,
    base: Tensor,
    *,
    alpha: float,
    kind: str = "geometric",
    log_z: Tensor | None = None,
) -> Tensor:
    """Log-prob of the mixture of two policies, up to log Z(x) where geometric.

    geometric: α lp_prev + (1-α) lp_base - log_z  (α-SPIN, Alami et al., arXiv 2404.04291,
        section 3). Unnormalised without `log_z`: log Z(x) cancels in losses of a difference of two
        responses to one prompt, and only there. A pointwise loss aims |log Z(x)| nats too low
        on every response without it.
    arithmetic: log(α e^{lp_prev} + (1-α) e^{lp_base}), the paper's future work. Normalised.

    At α = 0 and 1 (Z = 1) the absent policy is not touched: its log-prob of -inf would turn into
    NaN.

    Args:
        prev: lp of the previous iterate.
        base: lp of the base.
        alpha: weight α of the previous iterate.
        kind: `geometric` or `arithmetic`.
        log_z: log Z(x) of each response's prompt in nats, or its estimate from importance weights;
            used by `geometric` with 0 < α < 1.
    """
    if alpha == 1:
        return prev
    if alpha == 0:
        return base
    if kind == "geometric":
        mixed = alpha * prev + (1 - alpha) * base
        return mixed if log_z is None else mixed - log_z
    assert kind == "arithmetic", kind
    return torch.logaddexp(prev + math.log(alpha), base + math.log1p(-alpha))
