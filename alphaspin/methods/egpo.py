"""EGPO (Zhou et al., arXiv 2503.08942): every mirror step is taken twice, against what it leads to.

    iteration 2k      half a step: from π_k, against π_k, to π_{k+½}
    iteration 2k+1    the step:    from π_k, against π_{k+½}, to π_{k+1}

So iterate 2k+1 is π_{k+1}. The second look takes out the rotation around the equilibrium: the last
iterate converges at rates where a plain step circles or leaves. The paper takes single gradient
steps of its online IPO loss, whose tabular form is this mirror step; here each is trained for an
iteration. Both of a step's iterations have prompts of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from alphaspin.foundation.kinds import Need
from alphaspin.foundation.section import PositiveFloat
from alphaspin.judges.matrix import Labels, Pair, pick_extremes
from alphaspin.methods.base import Sections, iterations
from alphaspin.methods.judged import Responses, sample_responses, win_rates_against
from alphaspin.methods.mirror import MirrorStep
from alphaspin.opponents.base import Player

if TYPE_CHECKING:
    from alphaspin.methods.session import Session

EVEN = tuple(range(2, 1001, 2))


class EGPO(MirrorStep):
    """Extragradient: each step is taken again, against what it led to (arXiv 2503.08942)."""

    labels: Labels = "soft"
    """The margin is the difference of the two win rates P̂, in units of η: `soft` only."""
    eta: PositiveFloat = 5.0
    """η: a certain win is worth η nats, as in `sppo`."""
    tau: PositiveFloat = 0.1
    """τ: weight of the KL to the base, the paper's β; ητ is the base's share in a step."""

    @model_validator(mode="after")
    def _soft(self) -> EGPO:
        if self.labels != "soft":
            raise ValueError(f"preference.labels = {self.labels}: egpo has win rates only, `soft`")
        return self

    def parent(self, iteration: int) -> int:
        """π_k of both halves."""
        return iteration // 2 * 2 - 1

    def needs(self, config: Any) -> tuple[Need, ...]:
        """Whole steps."""
        says = "an even selfplay.iterations"
        whole = Need("selfplay.iterations", EVEN, "a step takes two", says)
        return (*super().needs(config), whole)

    def answers_per_prompt(self) -> int:
        """K, and as many of the opponent's in the second half."""
        return 2 * self.responses

    def pick(self, session: Session, iteration: int, responses: Responses) -> list[Pair | None]:
        """By win rates against π_{k+½} in the second half."""
        if iteration % 2 == 0:
            return super().pick(session, iteration, responses)
        half = Player.single(iteration - 1)
        rivals = sample_responses(session, iteration, self.responses, half)
        return [
            pick_extremes(rates)
            for rates in win_rates_against(session, iteration, responses, rivals)
        ]

    def deed(self, config: Sections, model: str) -> list[str]:
        """With its η and τ."""
        first = f"{iterations(config)}EGPO, two a step, on {model}: {self.how(config)}"
        return [first, *super().deed(config, model)]
