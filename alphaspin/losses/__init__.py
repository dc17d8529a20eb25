"""Losses of pairs by name. One more is a file beside these and a line here."""

from alphaspin.foundation.kinds import Table
from alphaspin.losses.base import Loss
from alphaspin.losses.chi2 import ChiSquared
from alphaspin.losses.dpo import DPO
from alphaspin.losses.hinge import Hinge
from alphaspin.losses.ipo import IPO
from alphaspin.losses.renyi import Renyi
from alphaspin.losses.slic import SLiC
from alphaspin.losses.space import SPACE

LOSSES: dict[str, type[Loss]] = {
    "dpo": DPO,
    "ipo": IPO,
    "hinge": Hinge,
    "slic": SLiC,
    "space": SPACE,
    "chi2": ChiSquared,
    "renyi": Renyi,
}
LOSS = Table("loss.kind", "loss", Loss, LOSSES, "dpo")
