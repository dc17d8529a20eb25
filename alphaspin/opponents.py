"""Who plays iteration t: which earlier iterates answer the prompts, and how prompts are shared.

Iterates are numbered t = 0, 1, …; `BASE` (-1) stands for the base model, and so does every
π_k with k < 0. At iteration t the iterates 0 … t-1 exist.
"""

from typing import Literal

from alphaspin.config import PerIterationInt, at
from alphaspin.rng import generator

BASE = -1


def opponents(iteration: int, history: int | Literal["inf"]) -> list[int]:
    """The distinct opponents of iteration t, oldest first (arXiv 2404.04291, section 3.2).

    history h: π_{t-1} … π_{t-h}, with π_k = π_base for k < 0.
    history `inf` (fictitious play): π_0 … π_{t-1}; the base at t = 0.
    """
    if history == "inf":
        return list(range(iteration)) or [BASE]
    return sorted({max(iteration - k, BASE) for k in range(1, history + 1)})


def assign(examples: list[int], players: list[int]) -> list[int]:
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
