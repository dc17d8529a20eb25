"""A judge of several processes: one asks, all learn the verdicts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alphaspin.errors import Interrupted
from alphaspin.foundation import console
from alphaspin.judges.base import Comparison, Judge

if TYPE_CHECKING:
    from alphaspin.model.distributed import Team


@dataclass(frozen=True)
class TeamJudge:
    """A judge that process 0 asks for all processes; a signal stops it after a group of verdicts.

    With a label it has a progress bar.
    """

    team: "Team"
    judge: Judge | None  # in process 0
    identity: str
    both_orders: bool
    label: str | None = None

    @classmethod
    def of(cls, team: "Team", judge: Judge | None) -> "TeamJudge":
        """`judge` is there in process 0."""
        identity, both_orders = team.gather(judge and [judge.identity, judge.both_orders])[0]
        return cls(team, judge, identity, both_orders)

    def compare(self, pairs: Sequence[Comparison]) -> Iterator[Mapping[int, float]]:
        """All verdicts, each of them durable as soon as process 0 had it."""

        def ask() -> list[list[float]]:
            assert self.judge
            found: list[list[float]] = []
            with (
                console.bar(self.label, len(pairs), "verdicts")
                if self.label
                else nullcontext(lambda items, tokens: None)
            ) as advance:
                for group in self.judge.compare(pairs):
                    advance(len(group), 0)
                    found += [[index, verdict] for index, verdict in group.items()]
                    if self.team.interrupted:
                        raise Interrupted
            return found

        yield {int(index): verdict for index, verdict in self.team.from_main(ask)}
