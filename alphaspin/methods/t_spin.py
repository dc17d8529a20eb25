"""T-SPIN (Wang et al., arXiv 2601.08198): triplets, of a demonstration and two answers.

    responses   y_l ~ π_{t-1} for each prompt
    opponents   y_0 ~ π_base, where β_t > 0
    train       π_t on y_w over y_l, and y_l over y_0; there is no reference

The paper draws y_0 once for each prompt. Here an iteration has prompts of its own, and draws it for
those; at t = 0, where y_l is the base's too, the published β is 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from alphaspin.foundation import console
from alphaspin.foundation.section import PerIterationWeight, PositiveFloat, at
from alphaspin.losses.t_spin import t_spin
from alphaspin.methods.base import Method, Sections, iterations
from alphaspin.methods.judged import sample_responses
from alphaspin.model.tree import Tree
from alphaspin.opponents.base import BASE, Player
from alphaspin.training.example import Example, Objective

if TYPE_CHECKING:
    from alphaspin.methods.session import Session


class TSpin(Method):
    """A demonstration over the previous iterate's answer, and that over the base's."""

    alpha: PositiveFloat = 1.0
    """α: scale of the log-probs, the weight of the paper's entropy."""
    beta: PerIterationWeight = (0.0, 0.1)
    """β, per iteration: weight of the previous iterate's advantage over the base; published: 0 at
    t = 0, then 0.1."""

    judged = False

    def sequences(self, iteration: int) -> int:
        """Three, and two where β_t is 0."""
        return 3 if at(self.beta, iteration) else 2

    def answers_per_prompt(self) -> int:
        """The previous iterate's, and the base's."""
        return 1 + any(self.beta)

    def reward_scale(self, config: Sections, iteration: int) -> float:
        """α."""
        return self.alpha

    def examples(self, session: Session, iteration: int) -> tuple[list[Example], Objective]:
        """Triplets, or pairs where β_t is 0, and the loss."""
        beta, alpha = at(self.beta, iteration), self.alpha
        with session.timed("responses", iteration):
            answers = sample_responses(session, iteration, 1)
            players = [answers]
            if beta:
                players.append(sample_responses(session, iteration, 1, Player.single(BASE)))
        examples: list[Example] = []
        for e in answers:
            demo = session.demonstrations[e]
            responses = (demo.response, *(player[e][0].tokens for player in players))
            equal = all(np.array_equal(demo.response, tokens) for tokens in responses)
            zeros = (0.0,) * len(responses)
            examples.append(Example(Tree(demo.prompt, responses), zeros, informative=not equal))
        console.note(
            f"t={iteration}: {len(examples)} {'triplets' if beta else 'pairs'}, "
            f"{sum(not e.informative for e in examples)} of them of one answer (no gradient)"
        )

        def objective(policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
            del reference, lengths
            chosen, rejected, *proto = policy.unbind(1)
            return t_spin(chosen, rejected, *(proto or [rejected]), alpha=alpha, beta=beta)

        return examples, objective

    def deed(self, config: Sections, model: str) -> list[str]:
        """With its α and β."""
        beta = ", ".join(f"{value:g}" for value in self.beta)
        first = f"{iterations(config)}T-SPIN on {model}: α = {self.alpha:g}, β = {beta}"
        return [first, "against the previous iterate and the base"]
