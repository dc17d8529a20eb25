"""Who plays iteration t: which earlier iterates answer the prompts, and how prompts are shared.

Iterates are numbered t = 0, 1, …; `BASE` (-1) stands for the base model, and so does every π_k with
k < 0. At iteration t the iterates 0 … t-1 exist.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, create_model

from alphaspin.foundation.kinds import Kind, settings_of
from alphaspin.foundation.rng import generator
from alphaspin.foundation.section import PerIterationInt, at
from alphaspin.losses.reference import ReferenceConfig

T = TypeVar("T")

BASE = -1
EMA = -2
"""The moving average of the adapters of the iterates so far."""


@dataclass(frozen=True, slots=True)
class Player:
    """Who answers: a geometric mixture Π_k π_k^w_k of iterates, most often of one.

    name: names the shards of its answers. members: (iterate, `BASE` or `EMA`; its weight w_k), the
    weights summing to 1. sampler: how answers are drawn, which makes a difference to a mixture:
    token by token, or from whole sequences' distribution.
    """

    name: str
    members: tuple[tuple[int, float], ...]
    sampler: Literal["token", "smc", "gflownet"] = "token"

    @classmethod
    def single(cls, iterate: int) -> "Player":
        """One iterate, the base or the average, alone."""
        names = {BASE: "base", EMA: "ema"}
        return cls(names.get(iterate, f"iterate-{iterate}"), ((iterate, 1.0),))

    @classmethod
    def mixture(
        cls,
        name: str,
        iterate: int,
        weight: float,
        sampler: Literal["token", "smc", "gflownet"] = "token",
    ) -> "Player":
        """π_iterate^weight · π_base^(1-weight); one of them alone where the mixture is that."""
        if weight == 0 or iterate == BASE:
            return cls.single(BASE)
        if weight == 1:
            return cls.single(iterate)
        return cls(name, ((iterate, weight), (BASE, 1 - weight)), sampler)


@dataclass(frozen=True, slots=True)
class Shard:
    """Answers that are sampled and kept together.

    folder: where they are or will be. player: who answers. draws: (example, purpose) of each
    answer; together with t they fix its random numbers.
    """

    folder: Path
    player: Player
    draws: Sequence[tuple[int, str]]


class SelfPlayConfig(Kind):
    """The outer loop: who plays against whom, and on which prompts."""

    opponent: str
    iterations: Annotated[int, Field(gt=0, le=10_000)] = 3
    """Number of iterations (t = 0, 1, …); the papers' T plus one."""
    prompts: PerIterationInt = (50_000,)
    """Prompts that get a sampled answer, per iteration; never more than the data holds."""
    mixing: bool = False
    """Train on the previous iteration's pairs as well (the public SPIN code's "mixing")."""
    warm_start: bool = True
    """A new iterate starts from the previous adapter; otherwise from a fresh one."""

    @abstractmethod
    def players(self, iteration: int, reference: ReferenceConfig) -> list[Player]:
        """The distinct players of iteration t, among whom its prompts are dealt out."""

    def deal(self, examples: list[int], iteration: int, reference: ReferenceConfig) -> list[Player]:
        """Who answers each example of iteration t: equal shares of the players."""
        return assign(examples, self.players(iteration, reference))

    @abstractmethod
    def title(self, reference: ReferenceConfig) -> str:
        """Who they are, for the report."""

    @classmethod
    def of_function(cls, function: Callable[..., Any], name: str) -> type[Self]:
        """The opponent that `function(iteration, reference, *, …)` gives as a list of players."""

        def players(
            self: SelfPlayConfig, iteration: int, reference: ReferenceConfig
        ) -> list[Player]:
            chosen = {key: getattr(self, key) for key in settings}
            return function(iteration, reference, **chosen)

        settings = settings_of(function)
        kind = create_model(function.__name__, __base__=cls, **settings)
        kind.players, kind.title = players, lambda self, reference: name
        return kind


def assign(examples: list[int], players: Sequence[T]) -> list[T]:
    """One opponent per example; shares of distinct opponents differ by one prompt at most.

    `examples` are in the seeded order of `choose_prompts`, so dealing them out in turn is random
    with respect to the data.
    """
    return [players[i % len(players)] for i in range(len(examples))]


def choose_prompts(total: int, prompts: PerIterationInt, iteration: int, seed: int) -> list[int]:
    """Indices of the demonstrations that iteration t uses, in random order, without repetition.

    Iterations walk through one endless shuffled stream, so each sees fresh prompts until the data
    is used up and then starts over; a function of (seed, t) alone.

    Args:
        total: demonstrations in the data.
        prompts: wanted per iteration (never more than `total` are returned).
        iteration: t.
        seed: the run's seed.
    """
    start = sum(min(at(prompts, k), total) for k in range(iteration))
    count = min(at(prompts, iteration), total)
    chosen: list[int] = []
    seen: set[int] = set()
    lap, offset = divmod(start, total)
    # A window that crosses into the next lap may meet an example twice: the second is passed over.
    while len(chosen) < count:
        lap_order = generator(seed, lap, "prompts").permutation(total)
        for example in map(int, lap_order[offset:]):
            if example not in seen and len(chosen) < count:
                seen.add(example)
                chosen.append(example)
        lap, offset = lap + 1, 0
    return chosen
