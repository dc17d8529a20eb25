"""PairRM (Jiang et al., arXiv 2306.02561); `models.PairRMJudge` says how it is asked."""

from alphaspin.foundation.paths import Source, check_there
from alphaspin.foundation.section import PositiveInt
from alphaspin.judges.base import Judge, JudgeConfig


class PairRM(JudgeConfig):
    """PairRM, which sees both responses at once."""

    kind: str = "pairrm"
    model: Source | None = None
    """Folder or hub id; llm-blender/PairRM-hf where it is not set."""
    batch_size: PositiveInt = 16
    """Pairs per pass."""

    free = frozenset({"batch_size"})

    def load(self, pattern: str | None) -> Judge:
        """Onto this machine's device."""
        del pattern
        from alphaspin.judges.models import PairRMJudge

        if self.model:
            check_there("judge.model", self.model)
        return PairRMJudge(self.model or "llm-blender/PairRM-hf", batch_size=self.batch_size)

    def title(self) -> str:
        """With its name."""
        return f"pairrm {self.model or ''}".strip()
