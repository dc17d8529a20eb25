"""A reward model as the judge; `models.RewardModelJudge` says how it is asked."""

from alphaspin.foundation.paths import Source, check_there
from alphaspin.foundation.section import PositiveInt
from alphaspin.judges.base import Judge, JudgeConfig


class RewardModel(JudgeConfig):
    """A sequence classifier with one output, Bradley-Terry between two of its rewards."""

    kind: str = "reward_model"
    model: Source
    """Folder or hub id."""
    batch_size: PositiveInt = 16
    """Texts per pass."""

    free = frozenset({"batch_size"})

    def load(self, pattern: str | None) -> Judge:
        """Onto this machine's device."""
        del pattern
        from alphaspin.judges.models import RewardModelJudge

        check_there("judge.model", self.model)
        return RewardModelJudge(self.model, batch_size=self.batch_size)

    def title(self) -> str:
        """With its name."""
        return f"reward_model {self.model}"
