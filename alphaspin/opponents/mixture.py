"""The reference's mixture as the opponent: α-SPIN whose rejected answers come from the very
distribution that its loss assumes, π_prev^α π_base^(1-α) with the α and π_prev of the reference.

Token by token is close to it; sequential Monte Carlo and an adapter that is trained for it in each
iteration sample from whole sequences' distribution.
"""

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
    """The reference's mixture answers, by an adapter trained for it, with the section gflownet."""

    opponent: str = "mixture-gflownet"
    sampler = "gflownet"
    uses = ("gflownet",)

    def needs(self, config: Any) -> tuple[Need, ...]:
        """Answers that can be weighed, a base that is whole, adapters that can be stacked."""
        alone = "each process trains the sampler by itself, with passes that the others would join"
        stack = "the sampler starts from adapters stacked along their rank, which these are not"
        return (
            *super().needs(config),
            WEIGHED,
            Need("train.sharding", ("none",), alone),
            Need("lora.target_parameters", ((),), stack),
        )
