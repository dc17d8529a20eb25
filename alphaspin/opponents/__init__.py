"""Opponents by name (`selfplay.opponent`). One more is a class in a file here and a line below."""

from alphaspin.foundation.kinds import Table
from alphaspin.opponents.base import SelfPlayConfig
from alphaspin.opponents.ema import MovingAverage
from alphaspin.opponents.iterates import Fictitious, History, Previous
from alphaspin.opponents.mixture import (
    ArithmeticMixture,
    GFlowNetMixture,
    SMCMixture,
    TokenMixture,
)

OPPONENTS: dict[str, type[SelfPlayConfig]] = {
    "previous": Previous,
    "history": History,
    "fictitious": Fictitious,
    "ema": MovingAverage,
    "mixture-token": TokenMixture,
    "mixture-smc": SMCMixture,
    "mixture-gflownet": GFlowNetMixture,
    "mixture-arithmetic": ArithmeticMixture,
}
OPPONENT = Table("selfplay.opponent", "selfplay", SelfPlayConfig, OPPONENTS, "history")
