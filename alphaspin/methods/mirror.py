"""What INPO, COMAL and EGPO share: an iteration is a step of mirror descent on the judge's game."""

from __future__ import annotations

from pydantic import model_validator
from torch import Tensor

from alphaspin.foundation.section import PositiveFloat
from alphaspin.judges.matrix import Labels
from alphaspin.losses.inpo import inpo
from alphaspin.methods.base import Sections
from alphaspin.methods.judged import Pointwise


class MirrorStep(Pointwise):
    """The margin of the best over the worst of K responses, drawn to what it should win."""

    labels: Labels = "hard"
    """What the margin should be, in units of η: ½ (`hard`, as published), P(best ≻ worst) - ½
    (`single`), or the difference of the two win rates P̂ (`soft`, `bradley_terry`)."""
    eta: PositiveFloat = 1 / 7.5e-3
    """η = 1/η of the papers: a certain win is worth η nats, as in `sppo`."""
    tau: PositiveFloat = 2.5e-3
    """τ: weight of the KL to the anchor, against win probabilities; ητ is the anchor's share."""

    uses = ("judge",)
    scores_base = True

    @model_validator(mode="after")
    def _share(self) -> MirrorStep:
        if self.eta * self.tau > 1:
            raise ValueError(
                f"preference.eta = {self.eta:g} times preference.tau = {self.tau:g} is over 1: the "
                "share of the anchor in the step's reference"
            )
        return self

    def loss(
        self, policy_BK: Tensor, reference_BK: Tensor, win_BK: Tensor, base_BK: Tensor | None
    ) -> Tensor:
        """As `losses.inpo`."""
        assert base_BK is not None
        gap = win_BK[:, 0] - win_BK[:, 1]
        if self.labels in ("hard", "single"):  # P - (1 - P) is twice P - ½
            gap = gap / 2
        return inpo(policy_BK, reference_BK, base_BK, gap, eta=self.eta, tau=self.tau)

    def how(self, config: Sections) -> str:
        """With its η and τ."""
        del config
        return f"η = {self.eta:g}, τ = {self.tau:g}"
