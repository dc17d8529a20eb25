"""An opponent of your own: `--selfplay.opponent opponents:league --selfplay.rounds 3`."""

from alphaspin.foundation.section import PositiveInt
from alphaspin.losses.reference import ReferenceConfig
from alphaspin.opponents.base import BASE, Player


def league(iteration: int, reference: ReferenceConfig, *, rounds: PositiveInt = 2) -> list[Player]:
    """The base, the previous iterate, and every `rounds`-th one before it, in equal shares."""
    del reference
    earlier = range(iteration - 1, -1, -rounds)
    return [Player.single(k) for k in (BASE, *reversed(earlier))]
