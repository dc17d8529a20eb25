"""MT-Bench (Zheng et al., arXiv 2306.05685): dialogues of two turns in eight categories."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from alphaspin.data.files import located
from alphaspin.errors import InputError
from alphaspin.evaluation.benchmarks.base import (
    Benchmark,
    Contest,
    Dialogue,
    Record,
    Reply,
    digest,
    mean,
    messages,
    told_unread,
)
from alphaspin.foundation.paths import Source, packaged, published
from alphaspin.foundation.section import PositiveInt
from alphaspin.judges.base import Comparison, Prompt

TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("stem", "humanities"), 0.1),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
}
"""Of answers by category, as in the public code (FastChat, `llm_judge`); others have its 0.7."""

OWN = "alphaspin's own questions, whose grades compare with those of other questions in nothing"


@dataclass(frozen=True, slots=True)
class Question:
    """A row of the public `question.jsonl`; a reference for each turn, or None."""

    category: str
    dialogue: Dialogue
    references: tuple[str | None, ...]


class MTBench(Benchmark):
    """Grades from 1 to 10 and win rates against the base, by category."""

    kind: str = "mt-bench"
    questions: Source | None = None
    """JSONL of rows `question_id`, `category`, `turns` and perhaps `reference` (a text a turn), as
    the public `question.jsonl` of FastChat's `llm_judge`. Without it a small set of our own."""
    grading: Literal["both", "single", "pairwise"] = "both"
    """Grades of single answers, which `judge.kind = server` gives and a callable with
    `judge.grades`; comparisons with the base's, which every judge makes; or both."""
    max_tokens: PositiveInt = 1024
    """Longest answer."""

    def run(self, contest: Contest) -> dict[str, Record]:
        """Answers of all, then grades and comparisons."""
        source = self.questions or str(packaged("benchmarks/mt-bench.jsonl"))
        rows = contest.rows("benchmark.questions", source)
        questions = [_question(*row) for row in rows]
        seen: dict[str, str] = {}
        for row, origin in rows:
            name = repr(row.get("question_id", origin))
            if (first := seen.setdefault(name, origin)) != origin:
                raise InputError(f"{origin}: question_id = {name} is that of {first}")
        if contest.options.judge.needs_answers and any(
            None in question.references for question in questions
        ):
            raise InputError(
                f"judge.kind = {contest.options.judge.kind} compares with references, which not "
                "all questions have: set --judge.kind server (with --judge.url and --judge.model), "
                "or another"
            )
        judge, grader = contest.judges()
        if self.grading == "single" and grader is None:
            raise InputError(
                f"benchmark.grading = single: judge.kind = {contest.options.judge.kind} gives no "
                "grades: take judge.kind = server, a callable with judge.grades, or pairwise"
            )
        grader = grader if self.grading != "pairwise" else None
        dialogues = [question.dialogue for question in questions]
        key = digest(
            [
                contest.answers_key(dialogues, self.max_tokens),
                [(question.category, question.references) for question in questions],
                [self.grading, judge.identity, grader and grader.identity],
            ]
        )
        title = f"MT-Bench, {len(questions)} questions ({published(self.questions or OWN)})"
        found: dict[str, Record] = {}
        base: list[list[Reply]] = []
        for entrant in contest.entrants:
            replies = contest.converse(entrant, dialogues, self.max_tokens)
            base = base or replies  # the first one
            record: Record = {"title": title, "notes": [], "radar": [], "results": {}}
            cut = sum(reply.truncated for own in replies for reply in own)
            record["notes"] += [f"{cut} answers were cut before their end"] * bool(cut)
            if grader:
                asked = [
                    Comparison(_prompt(q, own, turn), own[turn].text, "")
                    for q, own in zip(questions, replies, strict=True)
                    for turn in range(len(own))
                ]
                grades = contest.ask(f"grades {entrant.name}", grader, asked)
                _count(record, "grade", questions, grades, grader.identity)
                radar = {"metric": "grade,none", "title": "Grades, 1 to 10", "high": 10}
                record["radar"].append(radar)
            elif self.grading == "both":
                record["notes"].append(f"no grades: {judge.identity} only compares")
            if self.grading != "single" and replies is not base:
                pairs = [
                    Comparison(_prompt(q, own, k), own[k].text, other[k].text, _prompt(q, other, k))
                    for q, own, other in zip(questions, replies, base, strict=True)
                    for k in range(len(own))
                ]
                both = contest.both_ways(f"pairs {entrant.name}", judge, pairs)
                verdicts = list(map(_agreed, both))
                _count(record, "win rate", questions, verdicts, judge.identity)
                for name, value in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0)):
                    record["results"]["all"][f"{name},none"] = verdicts.count(value)
                radar = {"metric": "win rate,none", "title": "Win rate against the base", "high": 1}
                record["radar"].append(radar)
            record["axes"] = list(dict.fromkeys(question.category for question in questions))
            place = f"mt-bench-{key[:8]}/{entrant.name}"
            found[entrant.name] = contest.kept(place, entrant, key, partial(dict, record))
        return found


def _question(row: Mapping[str, Any], origin: str) -> Question:
    """A row as a question.

    Raises:
        InputError: it is none; tells the key.
    """
    with located(origin):
        category, turns = row.get("category"), row.get("turns")
        if not isinstance(category, str) or not category.strip():
            raise InputError("category: needs a text")
        if not turns or not isinstance(turns, list) or not all(map(_is_said, turns)):
            raise InputError("turns: needs a list of texts, what the user says turn by turn")
        references: Any = row.get("reference") or []
        references = [references] if isinstance(references, str) else references
        if not isinstance(references, list) or len(references) > len(turns):
            raise InputError(f"reference: needs a list of at most {len(turns)} texts, one a turn")
        known = [text if _is_said(text) else None for text in references]
        known += [None] * (len(turns) - len(known))
    dialogue = Dialogue(origin, tuple(turns), TEMPERATURES.get(category, 0.7))
    return Question(category, dialogue, tuple(known))


def _is_said(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())


def _prompt(question: Question, replies: Sequence[Reply], turn: int) -> Prompt:
    said = messages(question.dialogue.turns, replies[:turn])
    return Prompt(said, question.references[turn])


def _agreed(both: tuple[float, float]) -> float:
    """1 for a win in both orders, 0 for a loss in both, ½ for all else (section 3.4 of the paper);
    NaN where one could not be read."""
    if any(map(math.isnan, both)):
        return math.nan
    return 1.0 if min(both) > 0.5 else 0.0 if max(both) < 0.5 else 0.5


def _count(
    record: Record, metric: str, questions: Sequence[Question], values: list[float], judge: str
) -> None:
    """Means by category, over all, and by turn; and how many replies could not be read."""
    by_question: list[list[float]] = []
    rest = iter(values)
    for question in questions:
        by_question.append([next(rest) for _ in question.dialogue.turns])
    groups: dict[str, list[list[float]]] = {}
    for question, own in zip(questions, by_question, strict=True):
        groups.setdefault(question.category, []).append(own)
    groups["all"] = by_question
    for turn in range(max(map(len, by_question))):
        groups[f"turn {turn + 1}"] = [own[turn : turn + 1] for own in by_question]
    for name, group in groups.items():
        record["results"].setdefault(name, {}).update(mean(metric, group))
    unread = sum(map(math.isnan, values))
    record["results"]["all"][f"{metric}: not read,none"] = unread
    record["notes"] += told_unread(unread, len(values), judge)
