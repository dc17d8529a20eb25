"""RSPO (Tang et al., arXiv 2503.00030): SPPO with a regulariser towards the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationInfo, model_validator
from torch import Tensor

from alphaspin.foundation.section import RECORDED, NonNegativeFloat, PositiveFloat, refuse_unused
from alphaspin.losses.rspo import Regulariser, forward_answers, rspo
from alphaspin.methods.base import Sections, iterations
from alphaspin.methods.judged import Pointwise, Responses, sample_responses
from alphaspin.opponents.base import BASE, Player

if TYPE_CHECKING:
    from alphaspin.methods.session import Session


class RSPO(Pointwise):
    """SPPO with a regulariser towards the base (arXiv 2503.00030)."""

    regulariser: Regulariser = "reverse_kl"
    """R, towards the base."""
    lam: NonNegativeFloat = 0.5
    """λ; published: 0.5 for `reverse_kl`, 0.1 for `forward_kl` and `forward_reverse`."""
    clamp: PositiveFloat | None = None
    """Largest exponent of the importance ratios, in nats; `None` is the published one (7 for
    `forward_kl`, 10 for the others that have one)."""
    reverse_weight: NonNegativeFloat = 5.0
    """Weight of the reverse KL in `forward_reverse`."""

    scores_base = True

    @model_validator(mode="after")
    def _used(self, info: ValidationInfo) -> RSPO:
        users = {
            "clamp": ("forward_kl", "forward_reverse", "chi2", "chi2_smooth"),
            "reverse_weight": ("forward_reverse",),
        }
        if info.context is not RECORDED:
            chosen = self.regulariser
            refuse_unused(self, "preference.regulariser", chosen, users, "preference.")
        return self

    def beside(self, session: Session, iteration: int) -> Responses:
        """An answer of the base's own, for `forward_answers`."""
        if self.regulariser != "forward_answers":
            return {}
        return sample_responses(session, iteration, 1, Player.single(BASE))

    def answers_per_prompt(self) -> int:
        """K, and the base's."""
        return self.responses + (self.regulariser == "forward_answers")

    def sequences(self, iteration: int) -> int:
        """The pair, and the base's answer."""
        return 3 if self.regulariser == "forward_answers" else 2

    def loss(
        self, policy_BK: Tensor, reference_BK: Tensor, win_BK: Tensor, base_BK: Tensor | None
    ) -> Tensor:
        """As `losses.rspo`."""
        assert base_BK is not None
        pair = [tensor[:, :2] for tensor in (policy_BK, reference_BK, base_BK, win_BK)]
        loss_B = rspo(
            *pair,
            eta=self.eta,
            lam=self.lam,
            regulariser=self.regulariser,
            clamp=self.clamp,
            reverse_weight=self.reverse_weight,
        ).mean(1)
        for answer_B in policy_BK[:, 2:].unbind(1):
            loss_B = loss_B + forward_answers(answer_B, lam=self.lam)
        return loss_B

    def deed(self, config: Sections, model: str) -> list[str]:
        """With its η and R."""
        how = f"η = {self.eta:g}, {self.regulariser} with λ = {self.lam:g}"
        first = f"{iterations(config)}RSPO on {model}: {how}"
        return [first, *super().deed(config, model)]
