"""COMAL (Liu et al., arXiv 2410.23223): INPO whose anchor follows, and so the unregularised game.

Rounds of `interval` iterations of INPO. The anchor of a round is the last iterate of the round
before, which is near the equilibrium of its regularised game; the base in the first.
"""

from __future__ import annotations

from alphaspin.foundation.section import PositiveFloat, PositiveInt
from alphaspin.methods.base import Sections, iterations
from alphaspin.methods.mirror import MirrorStep


class COMAL(MirrorStep):
    """INPO with the anchor moved to the last iterate now and then (arXiv 2410.23223)."""

    eta: PositiveFloat = 500.0
    """η = 1/η of the papers: a certain win is worth η nats, as in `sppo`."""
    tau: PositiveFloat = 0.002 / 3
    """τ: weight of the KL to the anchor, against win probabilities; ητ is the anchor's share."""
    interval: PositiveInt = 6
    """Iterations after which the last iterate becomes the anchor; 6 in the paper."""

    def anchor(self, iteration: int) -> int:
        """The last iterate of the round before."""
        return iteration // self.interval * self.interval - 1

    def deed(self, config: Sections, model: str) -> list[str]:
        """With its η, τ and rounds."""
        how = f"{self.how(config)}, the anchor moved every {self.interval}"
        first = f"{iterations(config)}COMAL on {model}: {how}"
        return [first, *super().deed(config, model)]
