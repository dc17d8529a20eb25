"""Earlier iterates as opponents: the last one, the last h, all of them."""

from typing import Annotated, Literal

from pydantic import Field

from alphaspin.losses.reference import ReferenceConfig
from alphaspin.opponents.base import BASE, Player, SelfPlayConfig


def opponents(iteration: int, history: int | Literal["inf"]) -> list[int]:
    """The distinct opponents of iteration t, oldest first (arXiv 2404.04291, section 3.2).

    history h: π_{t-1} … π_{t-h}, with π_k = π_base for k < 0.
    history `inf` (fictitious play): π_0 … π_{t-1}; the base at t = 0.
    """
    if history == "inf":
        return list(range(iteration)) or [BASE]
    return sorted({max(iteration - k, BASE) for k in range(1, history + 1)})


class Previous(SelfPlayConfig):
    """The previous iterate answers (SPIN, arXiv 2401.01335)."""

    opponent: str = "previous"

    def players(self, iteration: int, reference: ReferenceConfig) -> list[Player]:
        """π_{t-1}."""
        return [Player.single(iteration - 1)]

    def title(self, reference: ReferenceConfig) -> str:
        """As in a sentence."""
        return "the previous iterate"


class History(SelfPlayConfig):
    """The last `history` iterates answer, in equal shares."""

    opponent: str = "history"
    history: Annotated[int, Field(ge=1)] | Literal["inf"] = 1
    """Opponents of iteration t: the last `history` iterates in equal shares (the base counts for
    t < 0), or `inf` for fictitious play, all iterates so far."""

    def players(self, iteration: int, reference: ReferenceConfig) -> list[Player]:
        """As `opponents`."""
        return [Player.single(k) for k in opponents(iteration, self.history)]

    def title(self, reference: ReferenceConfig) -> str:
        """As in a sentence."""
        names = {1: "the previous iterate", "inf": "all iterates so far (fictitious play)"}
        shown = names.get(self.history, f"the last {self.history} iterates")
        return f"{shown} (history {self.history})"


class Fictitious(SelfPlayConfig):
    """All iterates so far answer, in equal shares (fictitious play)."""

    opponent: str = "fictitious"

    def players(self, iteration: int, reference: ReferenceConfig) -> list[Player]:
        """π_0 … π_{t-1}."""
        return [Player.single(k) for k in opponents(iteration, "inf")]

    def title(self, reference: ReferenceConfig) -> str:
        """As in a sentence."""
        return "all iterates so far (fictitious play)"
