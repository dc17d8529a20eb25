"""Losses of pairs by name. One more is a file beside these and a line here."""

from alphaspin.foundation.kinds import Table
from alphaspin.losses.base import Loss
from alphaspin.losses.dpo import DPO
from alphaspin.losses.hinge import Hinge
from alphaspin.losses.ipo import IPO
from alphaspin.losses.slic import SLiC

LOSSES: dict[str, type[Loss]] = {"dpo": DPO, "ipo": IPO, "hinge": Hinge, "slic": SLiC}
LOSS = Table("loss.kind", "loss", Loss, LOSSES, "dpo")
