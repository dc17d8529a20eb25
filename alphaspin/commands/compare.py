"""`alphaspin evaluate RUN`: base, iterates and control on held-out prompts, or on a benchmark.

Evaluations are kept in RUN/evaluation/heldout-KEY/NAME, where KEY is a hash of what they depend on:
base, prompts, sampling, judge. What is there is not measured again, and where only the judge
differs, the answers that are there are judged.
"""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator

from alphaspin.commands.inputs import load_data, load_heldout
from alphaspin.commands.job import check_lengths
from alphaspin.commands.options import EvaluateOptions
from alphaspin.commands.played import Played, Policy
from alphaspin.config import Config
from alphaspin.data.chat import ChatFormat
from alphaspin.data.demonstrations import Demonstration, shared
from alphaspin.errors import InputError
from alphaspin.evaluation import measures
from alphaspin.evaluation.benchmarks.base import LOADED, Contest, Record
from alphaspin.evaluation.measures import Bench
from alphaspin.evaluation.record import Evaluation
from alphaspin.foundation import console
from alphaspin.foundation.artefacts import commit, make_folder, stands, verifies, write_record
from alphaspin.foundation.runs import Run, SignalGuard
from alphaspin.judges.cache import CachedJudge
from alphaspin.judges.shared import TeamJudge
from alphaspin.model.backbone import Backbone
from alphaspin.model.distributed import Team
from alphaspin.report import page as report


def run(played: Played, options: EvaluateOptions) -> list[Evaluation]:
    """Measure what is asked for, print the tables, and put them into the report.

    Returns:
        The evaluations; none where a benchmark is asked for.

    Raises:
        InputError: a policy, the data, the judge or a benchmark cannot be used.
        Interrupted: a signal came; the same call goes on from there.
        JudgeError: the judge's.
    """
    guard = SignalGuard()
    try:
        # The lock: verdicts are appended to a file that a training process may be writing to.
        with contextlib.closing(Run(played.path, played.manifest["identity"])):
            policies = played.policies(options.chosen())
            backbone, chat = played.load(Accelerator().device)
            if options.benchmark:
                contest = Contest(
                    make_folder(played.path / "evaluation"),
                    policies,
                    backbone,
                    chat,
                    played.config,
                    options,
                    guard,
                    played.path / "verdicts",
                )
                _tell(played, options.benchmark.run(contest))
                rows = []
            else:
                rows = _compare(played, policies, backbone, chat, options, guard)
    finally:
        guard.restore()
    if (played.path / "summary.json").exists():
        console.note(f"report: {report.write(played.path)}")
    else:
        console.note(f"{played.path}: the report is written when the run ends")
    return rows


def _tell(played: Played, records: dict[str, Record]) -> None:
    """Print a benchmark's table and notes."""
    title = next(iter(records.values()))["title"]
    console.table(
        f"{played.config.name}: {title}", ["task", "metric", *records], report.task_rows(records)
    )
    for note in report.task_notes(records):
        console.note(note)


def _compare(
    played: Played,
    policies: list[Policy],
    backbone: Backbone,
    chat: ChatFormat,
    options: EvaluateOptions,
    guard: SignalGuard,
) -> list[Evaluation]:
    config = played.config
    heldout = _prompts(played, chat, options)
    check_lengths(config, backbone, heldout)
    measures.checked_answers(heldout, config.evaluate.answer)
    cached = CachedJudge(options.judge.load(config.evaluate.answer), played.path / "verdicts")
    bench = Bench.of(config, backbone, chat, heldout, Team(backbone.device, guard))
    scale = config.preference.reward_scale
    base_inputs = bench.inputs(None, scale(config, 0))
    key = hashlib.sha256(f"{base_inputs} {cached.identity}".encode()).hexdigest()[:8]
    comparison = _Comparison(
        make_folder(played.path / "evaluation" / f"heldout-{key}"),
        bench,
        lambda t: scale(config, t),
        replace(TeamJudge.of(bench.team, cached), label="judge"),
    )
    source = options.heldout or played.config.heldout or f"set aside from {played.config.data}"
    about = {"heldout": source, "prompts": len(heldout), "judge": cached.identity}
    write_record(comparison.folder / "about.json", about)
    rows: list[Evaluation] = []
    for policy in policies:
        rows.append(comparison.evaluate(policy, rows[0] if rows else None))
        guard.check()
    console.text(f"{len(heldout)} held-out prompts: {source}")
    title = f"{played.config.name}: held-out measures"
    console.table(title, measures.header(judged=True), [measures.row(row) for row in rows])
    title = "win rates with 95 % intervals; diversity of the answers"
    console.table(title, measures.COMPARED, [measures.comparison(row) for row in rows])
    console.text(f"judge {cached.identity}")
    return rows


def _prompts(played: Played, chat: ChatFormat, options: EvaluateOptions) -> list[Demonstration]:
    """The run's own held-out prompts, or those of another file; the first `--prompts` of them."""
    if options.heldout:
        found = load_heldout(played.config, chat, options.heldout)
        _tell_trained_on(played.config, chat, found)
    else:
        found = played.heldout(chat)
    if not found:
        raise InputError("evaluate.prompts = 0: this run held out nothing; give --heldout FILE")
    if options.prompts and options.prompts > len(found):
        # More of the training data would have been trained on.
        raise InputError(
            f"prompts = {options.prompts}: there are {len(found)} held-out prompts; give "
            "--heldout FILE with more"
        )
    return found[: options.prompts]


def _tell_trained_on(config: Config, chat: ChatFormat, heldout: list[Demonstration]) -> None:
    """Say how many of other prompts than the run's own were trained on, if that can be told."""
    try:
        both = shared(load_data(config, chat)[0], heldout)
    except InputError as error:
        console.alarm(f"whether these prompts were trained on cannot be told: {error}")
        return
    if both:
        one, other = both[0]
        said = f"{len(both)} of {len(heldout)} held-out prompts were trained on"
        console.alarm(f"{said}: {one.origin} (as {other.origin})" + ", …" * (len(both) > 1))


@dataclass(slots=True)
class _Comparison:
    """What the policies of one comparison share."""

    folder: Path
    bench: Bench
    scale: Callable[[int], float]
    judge: TeamJudge

    def evaluate(self, policy: Policy, base: Evaluation | None) -> Evaluation:
        """A policy's evaluation, from disk where one with the same inputs is there."""
        loaded = LOADED if (adapter := policy.adapter()) else None
        if adapter:
            self.bench.backbone.load_adapter(LOADED, adapter)
        folder = self.folder / policy.name
        found = self._known(policy, loaded, folder) or self._measured(policy, loaded, base)
        if found.judge != self.judge.identity:
            found = measures.compared(found, base or found, self.bench.heldout, self.judge)
        made_of = {"policy": policy.digest or "base", "inputs": found.inputs}
        if not stands(folder, made_of):
            with commit(folder, made_of) as temporary:
                found.save(temporary / "evaluation.json")
        return found

    def _known(self, policy: Policy, loaded: str | None, folder: Path) -> Evaluation | None:
        """One with the same inputs: of this comparison, of the run, or of one by another judge."""
        wanted = self.bench.inputs(loaded, self.scale(policy.iteration))
        others = sorted(self.folder.parent.glob(f"heldout-*/{policy.name}"))
        for place in (folder, policy.folder / "evaluation", *others):
            if verifies(place):
                evaluation = Evaluation.load(place / "evaluation.json")
                if evaluation.inputs == wanted:
                    return evaluation
        return None

    def _measured(self, policy: Policy, loaded: str | None, base: Evaluation | None) -> Evaluation:
        count = 2 * len(self.bench.heldout)  # sampled and greedy
        with console.bar(f"evaluate {policy.name}", count, "answers") as advance:
            scale = self.scale(policy.iteration)
            return measures.evaluate(self.bench, policy.name, loaded, base, scale, advance)
