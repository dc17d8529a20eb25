"""SPPO (Wu et al., arXiv 2405.00675): a response gains what its win probability is worth."""

from __future__ import annotations

from torch import Tensor

from alphaspin.losses.sppo import sppo
from alphaspin.methods.base import Sections, iterations
from alphaspin.methods.judged import Pointwise


class SPPO(Pointwise):
    """Sampled answers against each other, as a judge compares them (arXiv 2405.00675)."""

    def loss(
        self, policy_B2: Tensor, reference_B2: Tensor, win_B2: Tensor, base_B2: Tensor | None
    ) -> Tensor:
        """As `losses.sppo`."""
        del base_B2
        return sppo(policy_B2, reference_B2, win_B2, eta=self.eta).mean(1)

    def deed(self, config: Sections, model: str) -> list[str]:
        """With its η."""
        first = f"{iterations(config)}SPPO on {model}: η = {self.eta:g}"
        return [first, *super().deed(config, model)]
