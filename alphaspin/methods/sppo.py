"""SPPO (Wu et al., arXiv 2405.00675): a response gains what its win probability is worth."""

from __future__ import annotations

from torch import Tensor

from alphaspin.losses.sppo import sppo
from alphaspin.methods.base import Sections, iterations
from alphaspin.methods.judged import Pointwise


class SPPO(Pointwise):
    """Sampled answers against each other, as a judge compares them (arXiv 2405.00675)."""

    def loss(
        self, policy_BK: Tensor, reference_BK: Tensor, win_BK: Tensor, base_BK: Tensor | None
    ) -> Tensor:
        """As `losses.sppo`."""
        del base_BK
        return sppo(policy_BK, reference_BK, win_BK, eta=self.eta).mean(1)

    def deed(self, config: Sections, model: str) -> list[str]:
        """With its η."""
        first = f"{iterations(config)}SPPO on {model}: η = {self.eta:g}"
        return [first, *super().deed(config, model)]
