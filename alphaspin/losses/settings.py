"""Settings of losses and of the reference."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, model_validator

from alphaspin.foundation.section import (
    RECORDED,
    Fraction,
    NonNegativeFloat,
    PerIterationFloat,
    PositiveFloat,
    Section,
    refuse_unused,
)


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


class LossConfig(Section):
    """The pairwise loss on (winner, loser)."""

    kind: Literal["dpo", "ipo", "hinge", "slic"] = "dpo"
    """`dpo` (logistic), `ipo` (squared), `hinge` (reference-relative), `slic` (no reference)."""
    beta: PerIterationFloat = (0.1,)
    """Inverse temperature β of `dpo` and `hinge`, per iteration."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """ε of `dpo`: the share of pairs taken to be labelled the wrong way round."""
    ipo_tau: PositiveFloat = 0.1
    """τ of `ipo`: the target of the margin is 1/(2τ) nats."""
    ipo_length: Literal["sum", "mean"] = "sum"
    """`ipo` on log-probs summed over tokens (the paper) or averaged (several trainers)."""
    slic_delta: PositiveFloat = 1.0
    """Margin δ of `slic`, in nats."""
    slic_lambda: NonNegativeFloat = 0.0
    """Weight λ of the winner's log-prob in `slic`."""
    nll_weight: NonNegativeFloat = 0.0
    """Weight of the winner's negative log-likelihood per token, added to any loss."""

    @model_validator(mode="after")
    def _used(self, info: ValidationInfo) -> "LossConfig":
        if info.context is not RECORDED:
            refuse_unused(self, "loss.kind", self.kind, LOSS_KEYS, "loss.")
        return self


LOSS_KEYS: dict[str, tuple[str, ...]] = {
    "beta": ("dpo", "hinge"),
    "label_smoothing": ("dpo",),
    **dict.fromkeys(("ipo_tau", "ipo_length"), ("ipo",)),
    **dict.fromkeys(("slic_delta", "slic_lambda"), ("slic",)),
}
"""Settings of a loss that only some kinds look at."""
