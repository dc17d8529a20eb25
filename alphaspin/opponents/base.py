"""Who plays iteration t: which earlier iterates answer the prompts, and how prompts are shared.

Iterates are numbered t = 0, 1, …; `BASE` (-1) stands for the base model, and so does every
π_k with k < 0. At iteration t the iterates 0 … t-1 exist.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from alphaspin.config import Config
from alphaspin.foundation.rng import generator
from alphaspin.foundation.section import PerIterationInt, at
from alphaspin.opponents.settings import Opponent

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


def opponents(iteration: int, history: int | Literal["inf"]) -> list[int]:
    """The distinct opponents of iteration t, oldest first (arXiv 2404.04291, section 3.2).

    history h: π_{t-1} … π_{t-h}, with π_k = π_base for k < 0.
    history `inf` (fictitious play): π_0 … π_{t-1}; the base at t = 0.
    """
    if history == "inf":
        return list(range(iteration)) or [BASE]
    return sorted({max(iteration - k, BASE) for k in range(1, history + 1)})


def _iterates(config: Config, iteration: int) -> list[Player]:
    return [Player.single(k) for k in opponents(iteration, config.selfplay.history)]


def _mixture(
    sampler: Literal["token", "smc", "gflownet"],
) -> Callable[[Config, int], list[Player]]:
    def players(config: Config, iteration: int) -> list[Player]:
        previous = EMA if config.reference.kind == "ema" else iteration - 1
        previous = previous if iteration else BASE
        alpha = config.reference.alpha
        return [Player.mixture(f"mixture-{sampler}", previous, alpha, sampler)]

    return players


PLAYERS: dict[Opponent, Callable[[Config, int], list[Player]]] = {
    "previous": lambda config, t: [Player.single(t - 1)],
    "history": _iterates,
    "fictitious": lambda config, t: [Player.single(k) for k in opponents(t, "inf")],
    "ema": lambda config, t: [Player.single(EMA if t else BASE)],
    "mixture-token": _mixture("token"),
    "mixture-smc": _mixture("smc"),
    "mixture-gflownet": _mixture("gflownet"),
}
"""The distinct players of iteration t by `selfplay.opponent`; prompts are dealt out among them.

The mixtures are those of the reference, π_prev^α π_base^(1-α) with its α and its π_prev: α-SPIN
whose losers come from the very distribution that its loss assumes.
"""


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
