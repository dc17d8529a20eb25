"""Nash-MD (Munos et al., arXiv 2312.00886, section 7): answers against those of a mixture.

y ~ π_prev, y' from the mixture of π_prev and the base, and P(y ≻ y'). The gradient holds on policy:
π_t starts as π_prev and makes one pass over the responses. It is exact at the first step of an
iteration and slightly off policy at later ones, so `selfplay.prompts` = `train.batch_size` is
strictly on policy, with many iterations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from alphaspin.foundation.kinds import Need
from alphaspin.foundation.section import Fraction, PositiveFloat
from alphaspin.losses.nash_md import nash_md
from alphaspin.methods.base import Method, Sections, iterations
from alphaspin.methods.judged import sample_responses, tell_pairs, win_matrices
from alphaspin.model.tree import Tree
from alphaspin.opponents.base import Player
from alphaspin.training.example import Example, Objective

if TYPE_CHECKING:
    from alphaspin.methods.session import Session


class NashMD(Method):
    """Sampled answers against those of a mixture with the base, as a judge compares them."""

    tau: PositiveFloat = 0.1
    """τ: weight of the KL to the base, against win probabilities."""
    mixture: Fraction = 0.25
    """m: share of the base's logits in the opponent's."""

    uses = ("judge",)

    def needs(self, config: Any) -> tuple[Need, ...]:
        """What keeps the gradient on policy, and a sampler that mixes."""
        why = "the gradient holds for responses of the policy that is trained"
        return (
            Need("train.epochs", (1,), why),
            Need("selfplay.warm_start", (True,), why),
            Need("sampling.engine", ("local",), "servers do not sample from mixtures"),
        )

    def answers_per_prompt(self) -> int:
        """One of each player's."""
        return 2

    def reward_scale(self, config: Sections, iteration: int) -> float:
        """τ: the reference is the base, and this what the KL takes from P - ½."""
        return self.tau

    def examples(self, session: Session, iteration: int) -> tuple[list[Example], Objective]:
        """Responses of the iterate, judged against the mixture's, and the loss."""
        tau = self.tau
        with session.timed("responses", iteration):
            responses = sample_responses(session, iteration, 1)
            rival = Player.mixture("mixture", iteration - 1, 1 - self.mixture)
            opposed = sample_responses(session, iteration, 1, rival)
        with session.timed("judge", iteration):
            both = [[responses[e][0], opposed[e][0]] for e in responses]
            wins = [
                matrix[0, 1].item()
                for matrix in win_matrices(session, iteration, list(responses), both)
            ]
        tell_pairs(session, iteration, responses, wins, [1 - win for win in wins], wins.count(0.5))
        trees = [
            Tree(session.demonstrations[e].prompt, (y.tokens,)) for e, (y,) in responses.items()
        ]
        with session.timed("reference", iteration):
            (base,) = session.frozen_logps(iteration, trees, [None])
        rows = zip(trees, base.tolist(), wins, strict=True)
        examples = [Example(tree, tuple(lp), extras=((win,),)) for tree, lp, win in rows]

        def objective(policy: Tensor, base: Tensor, lengths: Tensor, win: Tensor) -> Tensor:
            del lengths
            return nash_md(policy, base, win, tau=tau)[:, 0]

        return examples, objective

    def deed(self, config: Sections, model: str) -> list[str]:
        """With its τ and m."""
        return [
            f"{iterations(config)}Nash-MD on {model}: τ = {self.tau:g}",
            f"against the mixture with {self.mixture:g} of the base's logits",
        ]
