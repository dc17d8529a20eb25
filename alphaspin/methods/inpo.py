"""INPO (Zhang et al., arXiv 2407.00617): mirror descent with the base as its anchor."""

from __future__ import annotations

from alphaspin.methods.base import Sections, iterations
from alphaspin.methods.mirror import MirrorStep


class INPO(MirrorStep):
    """Iterative Nash policy optimisation: steps towards the equilibrium with a KL to the base."""

    def deed(self, config: Sections, model: str) -> list[str]:
        """With its η and τ."""
        first = f"{iterations(config)}INPO on {model}: {self.how(config)}"
        return [first, *super().deed(config, model)]
