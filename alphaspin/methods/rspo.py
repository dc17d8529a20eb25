"""RSPO (Tang et al., arXiv 2503.00030): SPPO with a regulariser towards the base."""

from __future__ import annotations

from pydantic import ValidationInfo, model_validator
from torch import Tensor

from alphaspin.foundation.section import RECORDED, NonNegativeFloat, PositiveFloat, refuse_unused
from alphaspin.losses.rspo import Regulariser, rspo
from alphaspin.methods.base import Sections, iterations
from alphaspin.methods.judged import Pointwise


class RSPO(Pointwise):
    """SPPO with a regulariser towards the base (arXiv 2503.00030)."""

    regulariser: Regulariser = "reverse_kl"
    """R, towards the base."""
    lam: NonNegativeFloat = 0.5
    """λ; published: 0.5 for `reverse_kl`, 0.1 for `forward_kl` and `forward_reverse`."""
    clamp: PositiveFloat | None = None
    """Largest exponent of the importance ratios, in nats; `None` is the published one (7 for
    `forward_kl`, 10 for `forward_reverse` and `chi2`)."""
    reverse_weight: NonNegativeFloat = 5.0
    """Weight of the reverse KL in `forward_reverse`."""

    scores_base = True

    @model_validator(mode="after")
    def _used(self, info: ValidationInfo) -> RSPO:
        users = {
            "clamp": ("forward_kl", "forward_reverse", "chi2"),
            "reverse_weight": ("forward_reverse",),
        }
        if info.context is not RECORDED:
            chosen = self.regulariser
            refuse_unused(self, "preference.regulariser", chosen, users, "preference.")
        return self

    def loss(
        self, policy_B2: Tensor, reference_B2: Tensor, win_B2: Tensor, base_B2: Tensor | None
    ) -> Tensor:
        """As `losses.rspo`."""
        assert base_B2 is not None
        return rspo(
            policy_B2,
            reference_B2,
            base_B2,
            win_B2,
            eta=self.eta,
            lam=self.lam,
            regulariser=self.regulariser,
            clamp=self.clamp,
            reverse_weight=self.reverse_weight,
        ).mean(1)

    def deed(self, config: Sections, model: str) -> list[str]:
        """With its η and R."""
        how = f"η = {self.eta:g}, {self.regulariser} with λ = {self.lam:g}"
        first = f"{iterations(config)}RSPO on {model}: {how}"
        return [first, *super().deed(config, model)]
