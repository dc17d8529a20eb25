"""Judges by name (`judge.kind`). One more is a file beside these and a line below."""

from alphaspin.foundation.kinds import Table
from alphaspin.judges.base import JudgeConfig
from alphaspin.judges.function import Function
from alphaspin.judges.pairrm import PairRM
from alphaspin.judges.reward_model import RewardModel
from alphaspin.judges.server import Server
from alphaspin.judges.verifiable import Verifiable
from alphaspin.judges.vllm import Served

JUDGES: dict[str, type[JudgeConfig]] = {
    "verifiable": Verifiable,
    "reward_model": RewardModel,
    "pairrm": PairRM,
    "server": Server,
    "vllm": Served,
    "callable": Function,
}
JUDGE = Table("judge.kind", "judge", JudgeConfig, JUDGES, "verifiable")
