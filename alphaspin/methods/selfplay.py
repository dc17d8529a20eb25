"""The outer loop of self-play: answer, judge, score, train, evaluate; phase by phase, resumable.

    for t = 0, 1, …:
        answer      pairs of answers, and what they are worth (`Method.examples`)
        train       a new adapter π_t on them
        evaluate    held-out measures of π_t

The phases before training are the method's, one file each beside this one.

Each phase leaves durable artefacts and begins by looking for them. What is not there is computed
from what is, as a function of (seed, t, example), so a killed run that is started again ends with
the same bits as one that was never killed.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from alphaspin.evaluation import measures
from alphaspin.evaluation.record import Evaluation
from alphaspin.foundation import console
from alphaspin.foundation.artefacts import commit, recorded, stands
from alphaspin.methods.base import Sections
from alphaspin.methods.reference import reference_mode
from alphaspin.methods.session import Session
from alphaspin.model.backbone import WEIGHTS
from alphaspin.model.routing import POLICY
from alphaspin.model.scoring import OnlineReference
from alphaspin.model.tree import Tree
from alphaspin.training.example import Example, Objective
from alphaspin.training.trainer import Job, train


class Callback:
    """What a run tells while it goes on; a subclass overrides what it wants to hear.

    What is on disk from an earlier call is not told again, but for iterates and evaluations.
    """

    def on_step(self, stage: str, step: int, values: Mapping[str, float | str]) -> None:
        """A record of `metrics.jsonl`: a step of `train/t`, `control/t` or `gflownet/t`, …"""

    def on_phase(self, name: str, iteration: int, seconds: float) -> None:
        """A phase has ended: `opponents`, `responses`, `judge`, `reference`, `train`, …"""

    def on_iterate(self, iteration: int, adapter: Path) -> None:
        """Iterate t is on disk."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """The base, an iterate or the control has been measured."""


def teller(callbacks: Sequence[Callback]) -> Callable[[str, int, Mapping[str, float | str]], None]:
    """What hands the records of `Metrics` on to callbacks."""

    def tell(stage: str, step: int, values: Mapping[str, float | str]) -> None:
        for callback in callbacks:
            if stage.startswith("time/"):
                callback.on_phase(stage.removeprefix("time/"), step, float(values["seconds"]))
            else:
                callback.on_step(stage, step, values)

    return tell


def play(session: Session, callbacks: Sequence[Callback] = ()) -> list[Evaluation]:
    """All iterations, then the control; the evaluations in the order of the table."""
    callbacks = callbacks if session.team.main else ()
    config = session.config
    rows: list[Evaluation] = []
    base = None
    if session.heldout:
        base = evaluate(session, "base", session.run.path / "base", None, None, 0)
        rows.append(base)
        _told(callbacks, base)
    for t in range(config.selfplay.iterations):
        train_iterate(session, t)
        adapter = session.folder(t) / "adapter"
        for callback in callbacks:
            callback.on_iterate(t, adapter)
        if base:
            rows.append(evaluate(session, str(t), session.folder(t), adapter, base, t))
            _told(callbacks, rows[-1])
            console.note(f"t={t}: {measures.line(rows[-1])}")
    if config.control == "sft":
        for t in range(config.selfplay.iterations):
            folder = train_control(session, t)
            if base:
                adapter = folder / "adapter"
                rows.append(evaluate(session, f"sft {t}", folder, adapter, base, t))
                _told(callbacks, rows[-1])
    return rows


def _told(callbacks: Sequence[Callback], evaluation: Evaluation) -> None:
    for callback in callbacks:
        callback.on_evaluation(evaluation)


def train_iterate(session: Session, iteration: int) -> None:
    """Phases 1 to 3 of iteration t; nothing to do where its adapter is on disk."""
    config = session.config
    folder = session.folder(iteration)
    if session.finished(f"train/{iteration}", folder, origin(session, "train", iteration)):
        for shard in sorted((folder / "reference").glob("*")):
            # The base's log-probs serve later iterations too.
            session.cache.load(shard, otherwise="left out")
        return
    examples, objective = config.preference.examples(session, iteration)
    session.unload_iterates()
    online = None
    if examples and not examples[0].reference:
        joint = reference_mode(session, len(examples))[0] == "joint"
        policies = tuple(session.reference_policies(iteration))
        online = OnlineReference(policies, session.mix, joint)
    parent = config.preference.parent(iteration)
    before = session.folder(parent) / "adapter" if parent >= 0 else None
    with session.timed("train", iteration):
        fit(session, "train", iteration, folder, examples, objective, config, before, online)


def start_policy(session: Session, iteration: int, before: Path | None) -> None:
    """A policy adapter that continues `before`, or a fresh one."""
    if session.backbone.has_adapter(POLICY):
        session.backbone.remove_adapter(POLICY)
    seed = session.config.seed
    session.backbone.add_adapter(POLICY, session.config.lora, seed=seed, iteration=iteration)
    if before is not None and session.config.selfplay.warm_start:
        session.backbone.load_adapter(POLICY, before)


def fit(
    session: Session,
    stage: str,
    iteration: int,
    folder: Path,
    examples: list[Example],
    objective: Objective,
    config: Sections,
    before: Path | None,
    online: OnlineReference | None = None,
) -> None:
    """Train an adapter and make it durable as `folder`/adapter."""
    start_policy(session, iteration, before)
    made_of = origin(session, stage, iteration)
    job = Job(
        objective=objective,
        config=config.train,
        beta=config.preference.reward_scale(config, iteration),
        iteration=iteration,
        seed=config.seed,
        stage=f"{stage}/{iteration}",
        checkpoints=folder / "checkpoints",
        remedy=config.preference.remedy(config),
        online=online,
        made_of=made_of,
    )
    train(session.team, session.backbone, examples, job, session.metrics)
    with session.team.together():
        if session.team.main:
            with commit(folder / "adapter", made_of) as temporary:
                session.backbone.save_adapter(POLICY, temporary)
    session.finished(job.stage, folder, made_of)


def origin(session: Session, stage: str, iteration: int) -> dict[str, str]:
    """Hashes of the adapters of a stage that iteration t comes after, by name."""
    if stage == "train":
        return session.lineage(iteration)
    before = control_folder(session, iteration - 1) / "adapter"
    return {"control": recorded(before)[WEIGHTS]} if iteration else {}


def train_control(session: Session, iteration: int) -> Path:
    """Plain further SFT at equal cost: the same prompts, adapter, steps and tokens.

    A pair's two responses are two passes over the demonstration (a triplet's three, three), so that
    a step carries as many trained sequences as one of self-play.
    """
    config = session.config
    folder = control_folder(session, iteration)
    if session.finished(f"control/{iteration}", folder, origin(session, "control", iteration)):
        return folder
    chosen = session.examples(iteration)
    if config.selfplay.mixing and iteration:
        chosen += session.examples(iteration - 1)
    demos = [session.demonstrations[e] for e in chosen]
    mean_tokens = float(np.mean([len(demo.response) for demo in demos]))
    passes = config.preference.sequences(iteration)
    trees = [Tree(d.prompt, (d.response,)) for d in demos for _ in range(passes)]
    examples = [Example(tree, (0.0,)) for tree in trees]
    larger = config.train.model_copy(update={"batch_size": passes * config.train.batch_size})
    before = control_folder(session, iteration - 1) / "adapter" if iteration else None

    def objective(policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        """NLL divided by a constant, so that every token weighs the same."""
        del reference, lengths
        return -policy[:, 0] / mean_tokens

    with session.timed("control", iteration):
        fit(
            session,
            "control",
            iteration,
            folder,
            examples,
            objective,
            config.model_copy(update={"train": larger}),
            before,
        )
    return folder


def control_folder(session: Session, iteration: int) -> Path:
    """Artefacts of the control's iteration t."""
    return session.run.path / "control" / "sft" / str(iteration)


def evaluate(
    session: Session,
    name: str,
    folder: Path,
    adapter: Path | None,
    base: Evaluation | None,
    iteration: int,
) -> Evaluation:
    """Measures of the base or of an adapter on disk."""
    made_of = {"adapter": recorded(adapter)[WEIGHTS]} if adapter else {}
    if not session.team.from_main(lambda: stands(folder / "evaluation", made_of)):
        mine = session.heldout[session.team.rank :: session.team.world_size]
        answers = 2 * len(mine)  # sampled and greedy
        with (
            session.timed("evaluate", iteration),
            console.bar(f"evaluate {name}", answers, "answers") as advance,
        ):
            if adapter is not None:
                session.backbone.load_adapter("evaluated", adapter)
            evaluation = measures.evaluate(
                session.bench(),
                name,
                "evaluated" if adapter is not None else None,
                base,
                session.config.preference.reward_scale(session.config, iteration),
                advance,
                session.judge,
            )
            with session.team.together():
                if session.team.main:
                    with commit(folder / "evaluation", made_of) as temporary:
                        evaluation.save(temporary / "evaluation.json")
        if adapter is not None:
            session.backbone.remove_adapter("evaluated")
    return Evaluation.load(folder / "evaluation" / "evaluation.json")
