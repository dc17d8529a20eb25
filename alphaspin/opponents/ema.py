"""The moving average of the iterates' adapters as the opponent."""

from typing import Any

from alphaspin.foundation.kinds import Need
from alphaspin.losses.reference import NO_AVERAGE, ReferenceConfig
from alphaspin.opponents.base import BASE, EMA, Player, SelfPlayConfig


class MovingAverage(SelfPlayConfig):
    """The moving average of the adapters answers, with `reference.ema_decay`."""

    opponent: str = "ema"

    def needs(self, config: Any) -> tuple[Need, ...]:
        """Adapters that can be averaged."""
        return (Need("selfplay.warm_start", (True,), NO_AVERAGE),)

    def players(self, iteration: int, reference: ReferenceConfig) -> list[Player]:
        """ema_t."""
        return [Player.single(EMA if iteration else BASE)]

    def title(self, reference: ReferenceConfig) -> str:
        """As in a sentence."""
        return f"the moving average of the iterates (decay {reference.ema_decay:g})"
