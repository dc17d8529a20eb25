"""What a benchmark is, and what the ones beside this share: durable answers, verdicts, means.

Below RUN/evaluation, `answers-KEY/NAME/…` holds what a policy answered, by shard and turn, and
`KIND-KEY/NAME` its results; KEY is a hash of what they depend on. What is there is not made again,
so a killed benchmark goes on, and another judge is asked about the answers that are there.
"""

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from alphaspin.data.chat import ChatFormat
from alphaspin.data.files import Row, is_file, located, read_rows
from alphaspin.data.rows import Messages
from alphaspin.errors import InputError
from alphaspin.foundation import console
from alphaspin.foundation.artefacts import commit, stands
from alphaspin.foundation.kinds import Kind
from alphaspin.foundation.paths import check_there
from alphaspin.foundation.runs import SignalGuard
from alphaspin.judges.base import Comparison, Judge, JudgeConfig
from alphaspin.judges.cache import CachedJudge
from alphaspin.judges.shared import TeamJudge
from alphaspin.sampling.answer import Draw
from alphaspin.sampling.settings import SamplingConfig

if TYPE_CHECKING:
    from alphaspin.model.backbone import Backbone

LOADED = "evaluated"
"""Name under which the adapter in question is loaded."""

SHARD = 64
"""Dialogues whose answers are made durable together: what a killed benchmark repeats at most."""


class Entrant(Protocol):
    """A policy of a run."""

    @property
    def name(self) -> str:
        """`base`, `0`, `1`, …, `sft 0`, …"""
        ...

    @property
    def digest(self) -> str | None:
        """Hash of its adapter; None of the base."""
        ...

    def adapter(self) -> Path | None:
        """Folder of its adapter."""
        ...


Record = dict[str, Any]
"""What one policy did, as the report shows it. title. results: as lm-evaluation-harness has them,
by category or task, values as `METRIC,FILTER` with standard errors as `METRIC_stderr,FILTER`.
notes: sentences. radar: metrics to draw by category, each as {metric, title, high}. axes: the
categories."""


class Benchmark(Kind):
    """Questions of others, and how answers to them are counted."""

    kind: str
    judged: ClassVar[bool] = True
    """Whether a judge is asked."""

    @abstractmethod
    def run(self, contest: "Contest") -> dict[str, Record]:
        """What each policy did, by its name; all of it kept in the run folder.

        Raises:
            InputError: the questions cannot be used, or not with this judge.
            Interrupted: a signal came; the same call goes on from there.
            JudgeError: the judge's.
        """


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What the user says, turn by turn, and the temperature of the answers; 0 is greedy."""

    origin: str
    turns: tuple[str, ...]
    temperature: float


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one turn, and whether it was cut before its end."""

    text: str
    truncated: bool


def messages(turns: Sequence[str], replies: Sequence[Reply]) -> Messages:
    """The conversation up to the next answer."""
    found: Messages = []
    for number, turn in enumerate(turns[: len(replies) + 1]):
        found.append({"role": "user", "content": turn})
        if number < len(replies):
            found.append({"role": "assistant", "content": replies[number].text})
    return found


@dataclass(slots=True)
class Contest:
    """Who takes part, and with what.

    folder: RUN/evaluation. config: the run's. options: of the command. verdicts: file of the
    judges' verdicts.
    """

    folder: Path
    entrants: Sequence[Entrant]
    backbone: "Backbone"
    chat: ChatFormat
    config: Any
    options: Any
    guard: SignalGuard
    verdicts: Path
    loaded: str | None = None

    def use(self, entrant: Entrant) -> str | None:
        """The entrant's adapter, loaded: its name in the backbone; None for the base."""
        folder = entrant.adapter()
        if folder and self.loaded != entrant.name:
            self.backbone.load_adapter(LOADED, folder)
            self.loaded = entrant.name
        return LOADED if folder else None

    def kept(self, place: str, entrant: Entrant, inputs: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, or returned before: JSON in an artefact of the folder."""
        folder = self.folder / place
        made_of = {"policy": entrant.digest or "base", "inputs": inputs}
        if not stands(folder, made_of):
            found = make()
            with commit(folder, made_of) as temporary:
                text = json.dumps(found, default=str)
                (temporary / "results.json").write_text(text, encoding="utf-8")
        self.guard.check()
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))

    def rows(self, key: str, source: str) -> list[Row]:
        """Rows of a JSON or JSONL file of questions, the first `--prompts` of them.

        Raises:
            InputError: there are none, or it is another kind of file.
        """
        check_there(key, source)
        if not is_file(source) or ".json" not in Path(source).name:
            raise InputError(f"{key} = {source}: needs a JSON or JSONL file")
        found = list(read_rows(source, "train"))[: self.options.prompts]
        for row, origin in found:
            if not isinstance(row, dict):
                raise InputError(f"{origin}: needs an object with keys and values")
        return found

    def judges(self) -> tuple[CachedJudge, CachedJudge | None]:
        """Who compares and, if there is one, who grades, with verdicts on disk."""
        config: JudgeConfig = self.options.judge
        judge, grader = config.counting(self.config.evaluate.answer)
        cached = CachedJudge(judge, self.verdicts)
        return cached, CachedJudge(grader, self.verdicts) if grader else None

    def ask(self, label: str, judge: Judge, pairs: Sequence[Comparison]) -> list[float]:
        """Its verdicts; NaN for a reply that cannot be read."""
        from alphaspin.model.distributed import Team

        team = Team(self.backbone.device, self.guard)
        asked = TeamJudge(team, judge, judge.identity, judge.both_orders, label)
        (found,) = asked.compare(pairs)
        return [found[i] for i in range(len(pairs))]

    def both_ways(
        self, label: str, judge: Judge, pairs: Sequence[Comparison]
    ) -> list[tuple[float, float]]:
        """P(first ≻ second) of each pair as asked in this order and, if it matters to the judge, in
        the other; ½ for equal responses, which are not asked about."""
        open_ = [i for i, p in enumerate(pairs) if p != p.swapped()]
        asked = [pairs[i] for i in open_]
        if judge.both_orders:
            asked += [pair.swapped() for pair in asked]
        verdicts = self.ask(label, judge, asked)
        there = verdicts[: len(open_)]
        back = [1 - p for p in verdicts[len(open_) :]] if judge.both_orders else there
        found = [(0.5, 0.5)] * len(pairs)
        for i, pair in zip(open_, zip(there, back, strict=True), strict=True):
            found[i] = pair
        return found

    def answers_key(self, dialogues: Sequence[Dialogue], max_tokens: int) -> str:
        """Hash of what answers depend on, the policy apart."""
        chat, backbone = self.chat, self.backbone
        content = [
            (backbone.identity, str(backbone.head.weight.dtype), self.config.seed, max_tokens),
            (sorted(chat.stop_token_ids), chat.template, chat.options),
            [
                (d.turns, d.temperature, chat.encode_prompt(messages(d.turns, [])))
                for d in dialogues
            ],
        ]
        return digest(content)

    def converse(
        self, entrant: Entrant, dialogues: Sequence[Dialogue], max_tokens: int
    ) -> list[list[Reply]]:
        """The entrant's answers to all turns of all dialogues, made durable by shard and turn.

        All entrants answer a turn from the same uniform numbers. An answer is cut where the model
        has no positions left for it and the turns after it.

        Raises:
            InputError: no position is left for an answer.
        """
        key = self.answers_key(dialogues, max_tokens)
        found: list[list[Reply]] = []
        with console.bar(f"answers {entrant.name}", len(dialogues), "dialogues") as advance:
            for start in range(0, len(dialogues), SHARD):
                part = dialogues[start : start + SHARD]
                replies: list[list[Reply]] = [[] for _ in part]
                for turn in range(max(len(one.turns) for one in part)):
                    place = f"answers-{key[:8]}/{entrant.name}/{start // SHARD:04d}-{turn + 1}"
                    make = partial(self._turn, entrant, part, replies, max_tokens, start)
                    said = self.kept(place, entrant, key, make)
                    for own, one in zip(replies, said, strict=True):
                        own += [Reply(**one)] if one else []
                advance(len(part), 0)
                found += replies
        return found

    def _turn(
        self,
        entrant: Entrant,
        part: Sequence[Dialogue],
        replies: Sequence[Sequence[Reply]],
        max_tokens: int,
        start: int,
    ) -> list[dict[str, Any] | None]:
        """The answers to the next turn of each dialogue; None where it has no more."""
        from alphaspin.sampling.decode import Request, decode

        loaded, turn = self.use(entrant), max(map(len, replies))
        going = [i for i, one in enumerate(part) if len(one.turns) > turn]
        requests: list[Request] = []
        for i in going:
            one = part[i]
            with located(one.origin):
                prompt = self.chat.encode_prompt(messages(one.turns, replies[i]))
                cap = self._room(one, len(prompt), turn, max_tokens)
            greedy = one.temperature == 0
            draw = None if greedy else Draw(self.config.seed, turn, "benchmark", start + i)
            policy = {loaded: 1.0}
            ids = np.array(prompt, np.int32)
            requests.append(Request(ids, policy, cap, draw, one.temperature or None))
        config = SamplingConfig(batch_size=self.config.sampling.batch_size)
        stops = self.chat.stop_token_ids
        answers = iter(decode(self.backbone, requests, stop_ids=stops, config=config))
        said: list[dict[str, Any] | None] = [None] * len(part)
        for i, answer in zip(going, answers, strict=True):
            text = self.chat.decode(answer.tokens)
            said[i] = {"text": text, "truncated": bool(answer.truncated)}
        return said

    def _room(self, one: Dialogue, prompt: int, turn: int, max_tokens: int) -> int:
        """The cap of an answer: what is left is shared with the turns that are still to come."""
        if (positions := self.backbone.max_positions) is None:
            return max_tokens
        later = [len(self.chat.encode_prompt(messages([t], []))) for t in one.turns[turn + 1 :]]
        room = (positions - prompt - sum(later)) // (len(later) + 1)
        if room < 1:
            raise InputError(
                f"the model's {positions} positions leave no room for an answer to turn {turn + 1}:"
                " leave the question out, or set a smaller benchmark.max_tokens"
            )
        return min(max_tokens, room)


def digest(content: Any) -> str:
    """SHA-256 of what JSON can hold, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def mean(metric: str, values: Sequence[Sequence[float]]) -> dict[str, float]:
    """The mean of all numbers and its standard error, by question: those of one belong together.

    NaN are left out. As the harness has them; nothing where there is none.
    """
    groups = [np.array([v for v in own if not math.isnan(v)]) for own in values]
    groups = [own for own in groups if len(own)]
    if not groups:
        return {}
    every = np.concatenate(groups)
    found = {f"{metric},none": float(every.mean())}
    if len(groups) > 1:
        sums = np.array([(own - every.mean()).sum() for own in groups])
        factor = len(groups) / (len(groups) - 1)
        error = math.sqrt(factor * float(sums @ sums)) / len(every)
        found[f"{metric}_stderr,none"] = error
    return found


def told_unread(count: int, asked: int, judge: str) -> Iterator[str]:
    """What is said of replies that could not be read."""
    if count:
        yield (
            f"{count} of {asked} replies of {judge} could not be read: they count neither for nor "
            "against anybody"
        )
