"""Methods by name. One more is a file beside these and a line below."""

from alphaspin.foundation.kinds import Table
from alphaspin.methods.base import Method
from alphaspin.methods.comal import COMAL
from alphaspin.methods.egpo import EGPO
from alphaspin.methods.inpo import INPO
from alphaspin.methods.nash_md import NashMD
from alphaspin.methods.rspo import RSPO
from alphaspin.methods.spin import Spin
from alphaspin.methods.sppo import SPPO
from alphaspin.methods.t_spin import TSpin

METHODS: dict[str, type[Method]] = {
    "spin": Spin,
    "sppo": SPPO,
    "rspo": RSPO,
    "nash_md": NashMD,
    "t_spin": TSpin,
    "inpo": INPO,
    "comal": COMAL,
    "egpo": EGPO,
}
METHOD = Table("method", "preference", Method, METHODS, "spin")
