"""Settings of the outer loop."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from alphaspin.foundation.section import PerIterationInt, PositiveInt, Section, refuse_unused

Opponent = Literal[
    "previous",
    "history",
    "fictitious",
    "ema",
    "mixture-token",
    "mixture-smc",
    "mixture-gflownet",
]


class SelfPlayConfig(Section):
    """The outer loop: who plays against whom, and on which prompts."""

    iterations: PositiveInt = 3
    """Number of iterations (t = 0, 1, …); the papers' T plus one."""
    opponent: Opponent = "history"
    """Who answers: the `previous` iterate, the last `history` of them, all so far (`fictitious`),
    the moving average of their adapters (`ema`, with `reference.ema_decay`), or the mixture that is
    the reference: token by token (`mixture-token`, close to it), by sequential Monte Carlo
    (`mixture-smc`, with `sampling.particles`), or by an adapter that is trained for it in each
    iteration (`mixture-gflownet`, with the section `gflownet`)."""
    history: Annotated[int, Field(ge=1)] | Literal["inf"] = 1
    """Opponents of iteration t: the last `history` iterates in equal shares (the base counts for
    t < 0), or `inf` for fictitious play, all iterates so far."""
    prompts: PerIterationInt = (50_000,)
    """Prompts that get a sampled answer, per iteration; never more than the data holds."""
    mixing: bool = False
    """Train on the previous iteration's pairs as well (the public SPIN code's "mixing")."""
    warm_start: bool = True
    """A new iterate starts from the previous adapter; otherwise from a fresh one."""

    @model_validator(mode="after")
    def _used(self) -> "SelfPlayConfig":
        users = {"history": ("history",)}
        refuse_unused(self, "selfplay.opponent", self.opponent, users, "selfplay.")
        return self
