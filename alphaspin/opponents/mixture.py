"""The reference's mixture as the opponent: α-SPIN whose rejected answers come from the very
distribution that its loss assumes, π_prev^α π_base^(1-α) with the α and π_prev of the reference.

Token by token is close to it; sequential Monte Carlo and an adapter that is trained for it in each
iteration sample from whole sequences' distribution. The arithmetic mixture needs no such thing: a
share α of the answers is the one's, the rest the other's.
"""

import itertools
import math
from typing import Any, ClassVar, Literal

from alphaspin.foundation.kinds import Need
from alphaspin.losses.reference import ReferenceConfig
from alphaspin.opponents.base import BASE, EMA, Player, SelfPlayConfig
from alphaspin.sampling.settings import WEIGHED

LOCAL = Need("sampling.engine", ("local",), "servers do not sample from mixtures")


class Mixture(SelfPlayConfig):
    """The reference's mixture answers."""

    sampler: ClassVar[Literal["token", "smc", "gflownet"]]

    def needs(self, config: Any) -> tuple[Need, ...]:
        """A geometric mixture."""
        why = "the opponent is a geometric mixture, the other is not"
        return (Need("reference.kind", ("geometric", "ema"), why),)

    def players(self, iteration: int, reference: ReferenceConfig) -> list[Player]:
        """One, of π_prev and the base."""
        previous = EMA if reference.kind == "ema" else iteration - 1
        previous = previous if iteration else BASE
        name = f"mixture-{self.sampler}"
        return [Player.mixture(name, previous, reference.alpha, self.sampler)]

    def title(self, reference: ReferenceConfig) -> str:
        """As in a sentence."""
        how = {
            "token": "drawn token by token",
            "smc": "by sequential Monte Carlo",
            "gflownet": "by a GFlowNet adapter",
        }
        return f"the reference's mixture, {how[self.sampler]}"


class ArithmeticMixture(SelfPlayConfig):
    """The reference's arithmetic mixture answers: π_prev a share α of the prompts, else the base.

    A prompt's answer is drawn from α π_prev + (1-α) π_base over whole answers, exactly: who gives
    it does not depend on the prompt, whose order is random.
    """

    opponent: str = "mixture-arithmetic"

    def needs(self, config: Any) -> tuple[Need, ...]:
        """An arithmetic mixture."""
        why = "the opponent is an arithmetic mixture, the other is not"
        return (Need("reference.kind", ("arithmetic",), why),)

    def players(self, iteration: int, reference: ReferenceConfig) -> list[Player]:
        """π_{t-1} and the base; one of them alone where the mixture is that."""
        parts = [(iteration - 1, reference.alpha), (BASE, 1 - reference.alpha)]
        return list(dict.fromkeys(Player.single(k) for k, share in parts if share))

    def deal(self, examples: list[int], iteration: int, reference: ReferenceConfig) -> list[Player]:
        """Shares of α and 1-α, to within one prompt."""
        players, alpha = self.players(iteration, reference), reference.alpha
        if len(players) == 1:
            return super().deal(examples, iteration, reference)
        previous, base = players
        counts = [math.floor(i * alpha) for i in range(len(examples) + 1)]
        return [
            previous if after > before else base for before, after in itertools.pairwise(counts)
        ]

    def title(self, reference: ReferenceConfig) -> str:
        """As in a sentence."""
        return f"the reference's mixture, {reference.alpha:g} of the answers π_prev's"


class TokenMixture(Mixture):
    """The reference's mixture answers, drawn token by token, which is close to it."""

    opponent: str = "mixture-token"
    sampler = "token"

    def needs(self, config: Any) -> tuple[Need, ...]:
        """The local sampler."""
        return (*super().needs(config), LOCAL)


class SMCMixture(Mixture):
    """The reference's mixture answers, by sequential Monte Carlo, with `sampling.particles`."""

    opponent: str = "mixture-smc"
    sampler = "smc"
    uses = ("sampling.particles",)

    def needs(self, config: Any) -> tuple[Need, ...]:
        """The local sampler, and answers that can be weighed."""
        return (*super().needs(config), LOCAL, WEIGHED)


class GFlowNetMixture(Mixture):
    """The reference's mixture answers, corrected by an adapter, with the section gflownet."""

    opponent: str = "mixture-gflownet"
    sampler = "gflownet"
    uses = ("gflownet",)

    def needs(self, config: Any) -> tuple[Need, ...]:
        """The local sampler, answers that can be weighed, a base that is whole."""
        alone = "each process trains the sampler by itself, with passes that the others would join"
        return (
            *super().needs(config),
            LOCAL,
            WEIGHED,
            Need("train.sharding", ("none",), alone),
        )
