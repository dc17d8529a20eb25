"""AlpacaEval 2 (Dubois et al., arXiv 2404.04475): win rate against a reference's outputs, also at
equal length."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from alphaspin.data.files import located
from alphaspin.errors import InputError
from alphaspin.evaluation.benchmarks.base import (
    Benchmark,
    Contest,
    Dialogue,
    Record,
    digest,
    mean,
    messages,
    told_unread,
)
from alphaspin.evaluation.winrate import at_equal_length
from alphaspin.foundation.paths import Source, published
from alphaspin.foundation.section import NonNegativeFloat, PositiveInt
from alphaspin.judges.base import Comparison, Prompt


@dataclass(frozen=True, slots=True)
class _Asked:
    """A row of a file of outputs."""

    dialogue: Dialogue
    output: str
    generator: str
    difficulty: float | None


class AlpacaEval(Benchmark):
    """Win rate against the outputs of a reference model, as judged and at equal length."""

    kind: str = "alpaca-eval"
    outputs: Source
    """JSON or JSONL of rows `instruction`, `output`, `generator`: the reference's outputs in the
    public format. With a `difficulty` in every row (the public `instruction_difficulty`), the
    regression has its term."""
    temperature: NonNegativeFloat = 0.7
    """Of the answers; 0 is greedy."""
    max_tokens: PositiveInt = 2048
    """Longest answer."""

    def run(self, contest: Contest) -> dict[str, Record]:
        """Answers of all, then comparisons with the reference's in both orders."""
        rows = contest.rows("benchmark.outputs", self.outputs)
        asked = [self._asked(*row) for row in rows]
        if contest.options.judge.needs_answers:
            raise InputError(
                f"judge.kind = {contest.options.judge.kind} compares with demonstrated answers, "
                "and instructions have none: set --judge.kind server (with --judge.url and "
                "--judge.model), or another"
            )
        given = {one.difficulty is None for one in asked}
        if len(given) > 1:
            raise InputError(f"benchmark.outputs = {self.outputs}: difficulty in some rows only")
        judge, _ = contest.judges()
        dialogues = [one.dialogue for one in asked]
        names = ", ".join(dict.fromkeys(one.generator for one in asked))
        key = digest(
            [
                contest.answers_key(dialogues, self.max_tokens),
                [(one.output, one.generator, one.difficulty) for one in asked],
                judge.identity,
            ]
        )
        found: dict[str, Record] = {}
        for entrant in contest.entrants:
            replies = contest.converse(entrant, dialogues, self.max_tokens)
            pairs = [
                Comparison(Prompt(messages(one.dialogue.turns, [])), own[0].text, one.output)
                for one, own in zip(asked, replies, strict=True)
            ]
            both = contest.both_ways(f"pairs {entrant.name}", judge, pairs)
            verdicts = [(there + back) / 2 for there, back in both]
            read = [i for i, verdict in enumerate(verdicts) if not math.isnan(verdict)]
            lengths = [len(own[0].text) for own in replies]
            results: dict[str, Any] = mean("win rate", [[verdict] for verdict in verdicts])
            if read:
                gamma = None if given == {True} else [asked[i].difficulty or 0.0 for i in read]
                controlled = at_equal_length(
                    [verdicts[i] for i in read],
                    [lengths[i] for i in read],
                    [len(asked[i].output) for i in read],
                    gamma,
                )
                low, high = (f"{100 * end:.1f}" for end in controlled[1:])
                results["length-controlled,none"] = controlled.value
                results["length-controlled: 95 %,none"] = f"{low} to {high} %"
            results["length in characters,none"] = float(np.mean(lengths))
            unread = len(verdicts) - len(read)
            results["win rate: not read,none"] = unread
            cut = sum(own[0].truncated for own in replies)
            notes = [f"{cut} answers were cut before their end"] * bool(cut)
            if given == {True}:
                notes.append("length control without the difficulty of instructions: no row has it")
            record: Record = {
                "title": f"AlpacaEval, {len(asked)} instructions ({published(self.outputs)}), "
                f"against {names}",
                "results": {"all": results},
                "notes": [*notes, *told_unread(unread, len(verdicts), judge.identity)],
            }
            place = f"alpaca-eval-{key[:8]}/{entrant.name}"
            found[entrant.name] = contest.kept(place, entrant, key, partial(dict, record))
        return found

    def _asked(self, row: Mapping[str, Any], origin: str) -> _Asked:
        """A row.

        Raises:
            InputError: it is none; tells the key.
        """
        with located(origin):
            for key in ("instruction", "output"):
                if not isinstance(row.get(key), str) or (key == "instruction" and not row[key]):
                    raise InputError(f"{key}: needs a text")
            difficulty = row.get("difficulty")
            if isinstance(difficulty, bool) or not isinstance(difficulty, int | float | None):
                raise InputError(f"difficulty = {difficulty!r}: needs a number")
        dialogue = Dialogue(origin, (row["instruction"],), self.temperature)
        return _Asked(dialogue, row["output"], str(row.get("generator", "?")), difficulty)
