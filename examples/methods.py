"""A method of your own: `--method methods:BestOfK --preference.responses 4`, from here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from torch import Tensor

from alphaspin.judges.matrix import win_rates
from alphaspin.methods.base import Method, Sections, iterations
from alphaspin.methods.judged import sample_responses, win_matrices
from alphaspin.model.tree import Tree
from alphaspin.training.example import Example, Objective

if TYPE_CHECKING:
    from alphaspin.methods.session import Session


class BestOfK(Method):
    """Likelihood of the best of K responses of the previous iterate (RAFT, arXiv 2304.06767)."""

    responses: Annotated[int, Field(ge=2)] = 4
    """Responses K per prompt."""

    uses = ("judge",)

    def answers_per_prompt(self) -> int:
        """K."""
        return self.responses

    def reward_scale(self, config: Sections, iteration: int) -> float:
        """lp itself: there is no reference."""
        return 1.0

    def examples(self, session: Session, iteration: int) -> tuple[list[Example], Objective]:
        """The best response of each prompt, by its win rate against the others."""
        answers = sample_responses(session, iteration, self.responses)
        matrices = win_matrices(session, iteration, list(answers), list(answers.values()))
        rates = [win_rates(matrix) for matrix in matrices]
        best = [group[r.index(max(r))] for group, r in zip(answers.values(), rates, strict=True)]
        demos = [session.demonstrations[e] for e in answers]
        trees = [Tree(d.prompt, (y.tokens,)) for d, y in zip(demos, best, strict=True)]

        def objective(policy_B1: Tensor, reference_B1: Tensor, lengths_B1: Tensor) -> Tensor:
            """-lp per token."""
            return -(policy_B1 / lengths_B1)[:, 0]

        return [Example(tree, (0.0,)) for tree in trees], objective

    def deed(self, config: Sections, model: str) -> list[str]:
        """With its K."""
        return [f"{iterations(config)}best of {self.responses} on {model}"]
