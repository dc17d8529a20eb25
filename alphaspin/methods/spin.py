"""SPIN and α-SPIN: demonstrations against what earlier iterates answer.

    opponents   y_l ~ an earlier iterate, for each prompt of iteration t
    reference   lp_prev and lp_base of both responses, in one pass, cached
    train       π_t on (y_w, y_l) against π_ref ∝ π_prev^α π_base^(1-α)

SPIN (Chen et al., arXiv 2401.01335) is α = 1; α-SPIN Alami et al., arXiv 2404.04291.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from alphaspin.data.demonstrations import Demonstration
from alphaspin.foundation import console
from alphaspin.foundation.batched import batched
from alphaspin.losses.base import Absolute
from alphaspin.losses.dpo import DPO
from alphaspin.methods.base import Method, Sections, iterations
from alphaspin.methods.reference import reference_mode, score_reference
from alphaspin.model.tree import Tree
from alphaspin.opponents.base import BASE, EMA, Player, Shard
from alphaspin.opponents.mixture import ArithmeticMixture
from alphaspin.sampling.answer import Answer
from alphaspin.training.example import REMEDY, Example, Objective

if TYPE_CHECKING:
    from alphaspin.methods.session import Session


class Spin(Method):
    """Demonstrations against sampled answers; settings in loss, reference and selfplay."""

    uses = ("loss", "reference", "selfplay.opponent", "selfplay.history", "selfplay.mixing")
    judged = False

    def examples(self, session: Session, iteration: int) -> tuple[list[Example], Objective]:
        """As `demonstrated_pairs`."""
        return demonstrated_pairs(session, iteration)

    def reward_scale(self, config: Sections, iteration: int) -> float:
        """The loss's."""
        return config.loss.reward_scale(iteration)

    def remedy(self, config: Sections) -> str:
        """The loss's."""
        own = f"{config.loss.remedy} or " if config.loss.remedy else ""
        return f"consider loss.nll_weight, {own}a smaller train.lr" if own else REMEDY

    def warning(self, config: Sections) -> str | None:
        """As `contraction_note` and `noise_note`."""
        return contraction_note(config) or noise_note(config)

    def deed(self, config: Sections, model: str) -> list[str]:
        """Loss, reference, opponents."""
        loss, reference = config.loss, config.reference
        name = "SPIN" if reference.alpha == 1 else "α-SPIN"
        used = f"reference α = {reference.alpha:g} ({reference.kind})" if loss.has_reference else ""
        return [
            f"{iterations(config)}{name} on {model}: {loss.title()}",
            used,
            f"opponents from {config.selfplay.title(reference)}",
        ]


def contraction_note(config: Sections) -> str | None:
    """Whether β lies outside the bound of the tabular theory (`docs/theory.md`, section 1).

    The iteration `e_{t+1} = (α - 1/β) e_t + (1-α) e_base` contracts for β > 1/(1+α), and with the
    mixture as the opponent `e_{t+1} = (1 - 1/β)(α e_t + (1-α) e_base)` does for β > α/(1+α). The
    bounds hold for the logistic loss at its population optimum, reference geometric, opponent
    π_{t-1} or the exact mixture; finite training of a network stays far from that optimum: a
    warning, not an error.
    """
    alpha = config.reference.alpha
    if config.reference.kind == "arithmetic":
        return None
    consistent = config.selfplay.opponent.startswith("mixture")
    bound, formula = (alpha, "α") if consistent else (1, "1")
    bound, formula = bound / (1 + alpha), f"{formula}/(1+α)"
    if not isinstance(config.loss, DPO) or (low := min(config.loss.beta)) > bound:
        return None
    return (
        f"β = {low:g} is not above {formula} = {bound:.3g}: an iteration that is trained to its "
        "optimum would overshoot (docs/theory.md); few steps at a small rate, as in the papers, "
        "keep it in check"
    )


def noise_note(config: Sections) -> str | None:
    """Whether a loss of absolute gains meets losers that are not its reference's.

    The data is its optimum where they are (`docs/theory.md`, section 1). Asked of iteration 2.
    """
    if not isinstance(config.loss, Absolute):
        return None
    reference, selfplay = config.reference, config.selfplay
    previous = EMA if reference.kind == "ema" else 1
    alone = {1.0: Player.single(previous), 0.0: Player.single(BASE)}.get(reference.alpha)
    if alone and selfplay.players(2, reference) == [alone]:
        return None
    if not alone and isinstance(selfplay, ArithmeticMixture):
        return None
    return (
        f"the losers of {config.loss.kind} are not drawn from its reference: the optimum of an "
        "iteration is then not the data's distribution"
    )


def demonstrated_pairs(session: Session, iteration: int) -> tuple[list[Example], Objective]:
    """Phases 1 and 2 of `spin`: demonstrations against opponents' answers, and the loss."""
    config = session.config
    with session.timed("opponents", iteration):
        pairs = sample_pairs(session, iteration)
        if config.selfplay.mixing and iteration:
            pairs += sample_pairs(session, iteration - 1)
    mode, reason = reference_mode(session, len(pairs))
    if config.reference.mode == "auto":
        console.note(f"t={iteration}: reference {mode}, {reason}")
    references: list[tuple[float, ...]] = [()] * len(pairs)
    if mode == "cached":
        with session.timed("reference", iteration):
            references = score_reference(session, iteration, [pair.tree() for pair in pairs])
    skip = config.loss.ignores_equal_pairs()
    examples = [
        Example(pair.tree(), reference, informative=not (skip and pair.equal()))
        for pair, reference in zip(pairs, references, strict=True)
    ]
    equal = sum(pair.equal() for pair in pairs)
    cut = sum(pair.rejected.truncated for pair in pairs)
    none = "" if isinstance(config.loss, Absolute) else " (no gradient from the pair)"
    console.note(
        f"t={iteration}: {len(pairs)} pairs, {equal} of them with rejected = chosen{none}, "
        f"{cut} rejected cut at the length cap"
    )

    if start := telling_start(pairs):
        console.note(
            f"t={iteration}: all chosen begin with {session.chat.tokenizer.decode(start)!r} and "
            "hardly any rejected does, so that this tells them apart: perhaps "
            "text.template_options has to put it into the prompt, as enable_thinking: false does"
        )

    def objective(policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        return config.loss(policy, reference, lengths, iteration)

    return examples, objective


@dataclass(frozen=True, slots=True)
class Pair:
    """A demonstration (chosen), and what an opponent answered (rejected)."""

    demonstration: Demonstration
    rejected: Answer

    def tree(self) -> Tree:
        """Prompt, chosen, rejected."""
        return Tree(self.demonstration.prompt, (self.demonstration.response, self.rejected.tokens))

    def equal(self) -> bool:
        """Whether rejected is chosen, token for token."""
        return np.array_equal(self.demonstration.response, self.rejected.tokens)


def telling_start(pairs: Sequence[Pair]) -> list[int]:
    """The tokens with which all winners begin, where at most 5 % of the losers do; of 16 pairs on,
    fewer may agree by chance."""
    if len(pairs) < 16:
        return []
    winners = [pair.demonstration.response.tolist() for pair in pairs]
    ends = zip(min(winners), max(winners), strict=False)  # in order: what they share, all do
    start = [low for low, _ in takewhile(lambda both: both[0] == both[1], ends)]
    same = sum(pair.rejected.tokens[: len(start)].tolist() == start for pair in pairs)
    return start if same <= 0.05 * len(pairs) else []


def sample_pairs(session: Session, iteration: int) -> list[Pair]:
    """The pairs of iteration t; answers that are not on disk are sampled now."""
    config = session.config
    examples = session.examples(iteration)
    players = config.selfplay.players(iteration, config.reference)
    assigned = config.selfplay.deal(examples, iteration, config.reference)
    folder = session.folder(iteration) / "opponents"
    shards: list[Shard] = []
    for player in players:
        mine = [e for e, p in zip(examples, assigned, strict=True) if p == player]
        for number, part in enumerate(batched(mine, config.sampling.shard_size)):
            draws = [(example, "sample") for example in part]
            shards.append(Shard(folder / f"{player.name}-{number:05d}", player, draws))
    found = dict(session.answers(iteration, shards, "opponents"))
    return [Pair(session.demonstrations[example], found[example]) for example in examples]
