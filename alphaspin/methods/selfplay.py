"""The outer loop of self-play: answer, judge, score, train, evaluate; phase by phase, resumable.

    for t = 0, 1, …:
        opponents   y_l ~ an earlier iterate, for each prompt of iteration t
        reference   lp_prev and lp_base of winners y_w and losers y_l, in one pass, cached
        train       a new adapter π_t on (y_w, y_l) against π_ref ∝ π_prev^α π_base^(1-α)
        evaluate    held-out measures of π_t

With `method: sppo` and `rspo` (arXiv 2405.00675 and 2503.00030) a judge takes the place of the
demonstrations, and the first phases are

        responses   y_1 … y_K ~ π_prev for each prompt
        judge       P(y_i ≻ y_j) of all pairs; the best and the worst response of each prompt
        reference   lp_prev of the two, and lp_base for `rspo`, in one pass, cached; with a mixture
                    as the reference (α < 1) those of all K, for log Z(x)

`nash_md` (arXiv 2312.00886, section 7) has y ~ π_prev, y' from the mixture of π_prev and the base,
and P(y ≻ y'). Its gradient holds on policy: π_t starts as π_prev and makes one pass over the
responses. It is exact at the first step of an iteration and slightly off policy at later ones, so
`selfplay.prompts` = `train.batch_size` is strictly on policy, with many iterations.

Each phase leaves durable artefacts and begins by looking for them. What is not there is computed
from what is, as a function of (seed, t, example), so a killed run that is started again ends with
the same bits as one that was never killed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from alphaspin.config import Config
from alphaspin.data.demonstrations import Demonstration
from alphaspin.evaluation import measures
from alphaspin.foundation import console
from alphaspin.foundation.runs import commit, verifies
from alphaspin.losses.equations import ignores_equal_pairs, pairwise, reward_scale
from alphaspin.methods.preference import judged_pairs, mirror_descent
from alphaspin.methods.session import Session, Shard
from alphaspin.model.batching import Tree
from alphaspin.model.routing import POLICY
from alphaspin.model.scoring import OnlineReference, batched, choose_mode
from alphaspin.opponents.base import PLAYERS, assign
from alphaspin.sampling.decode import Answer
from alphaspin.training.trainer import REMEDY, Example, Job, Objective, train

REMEDIES = {
    kind: f"consider loss.nll_weight, {setting} or a smaller train.lr"
    for kind, setting in {
        "dpo": "a larger loss.beta",
        "hinge": "a larger loss.beta",
        "ipo": "a larger loss.ipo_tau",
        "slic": "a larger loss.slic_lambda",
    }.items()
}
"""Against log-probs of winners and losers that fall together, by the loss of `spin`."""


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

    def on_evaluation(self, evaluation: measures.Evaluation) -> None:
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


def play(session: Session, callbacks: Sequence[Callback] = ()) -> list[measures.Evaluation]:
    """All iterations, then the control; the evaluations in the order of the table."""
    callbacks = callbacks if session.team.main else ()
    config = session.config
    rows: list[measures.Evaluation] = []
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


def _told(callbacks: Sequence[Callback], evaluation: measures.Evaluation) -> None:
    for callback in callbacks:
        callback.on_evaluation(evaluation)


def train_iterate(session: Session, iteration: int) -> None:
    """Phases 1 to 3 of iteration t; nothing to do where its adapter is on disk."""
    config = session.config
    folder = session.folder(iteration)
    if session.finished(f"train/{iteration}", folder):
        for shard in sorted((folder / "reference").glob("*")):
            session.cache.load(shard)  # the base's log-probs serve later iterations too
        return
    match config.method:
        case "spin":
            examples, objective = demonstrated_pairs(session, iteration)
        case "sppo" | "rspo":
            examples, objective = judged_pairs(session, iteration)
        case "nash_md":
            examples, objective = mirror_descent(session, iteration)
    session.unload_iterates()
    online = None
    if examples and not examples[0].reference:
        joint = reference_mode(session, len(examples))[0] == "joint"
        policies = tuple(session.reference_policies(iteration))
        online = OnlineReference(policies, session.mix, joint)
    before = session.folder(iteration - 1) / "adapter" if iteration else None
    with session.timed("train", iteration):
        fit(session, "train", iteration, folder, examples, objective, config, before, online)


def demonstrated_pairs(session: Session, iteration: int) -> tuple[list[Example], Objective]:
    """Phases 1 and 2 of `spin`: demonstrations against opponents' answers, and the loss."""
    config = session.config
    with session.timed("opponents", iteration):
        duels = sample_duels(session, iteration)
        if config.selfplay.mixing and iteration:
            duels += sample_duels(session, iteration - 1)
    mode, reason = reference_mode(session, len(duels))
    if config.reference.mode == "auto":
        console.note(f"t={iteration}: reference {mode}, {reason}")
    references: list[tuple[float, ...]] = [()] * len(duels)
    if mode == "cached":
        with session.timed("reference", iteration):
            references = score_reference(session, iteration, [duel.tree() for duel in duels])
    skip = ignores_equal_pairs(config.loss)
    examples = [
        Example(duel.tree(), reference, informative=not (skip and duel.equal()))
        for duel, reference in zip(duels, references, strict=True)
    ]
    equal = sum(duel.equal() for duel in duels)
    cut = sum(duel.loser.truncated for duel in duels)
    console.note(
        f"t={iteration}: {len(duels)} pairs, {equal} of them with loser = winner (no gradient "
        f"from the pair), {cut} losers cut at the length cap"
    )

    def objective(policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        return pairwise(config.loss, iteration, policy, reference, lengths)

    return examples, objective


@dataclass(frozen=True, slots=True)
class Duel:
    """A demonstration (the winner), and what an opponent answered (the loser)."""

    demonstration: Demonstration
    loser: Answer

    def tree(self) -> Tree:
        """Prompt, winner, loser."""
        return Tree(self.demonstration.prompt, (self.demonstration.response, self.loser.tokens))

    def equal(self) -> bool:
        """Whether the loser is the winner, token for token."""
        return np.array_equal(self.demonstration.response, self.loser.tokens)


def sample_duels(session: Session, iteration: int) -> list[Duel]:
    """The pairs of iteration t; answers that are not on disk are sampled now."""
    config = session.config
    examples = session.examples(iteration)
    players = PLAYERS[config.selfplay.opponent](config, iteration)
    assigned = assign(examples, players)
    folder = session.folder(iteration) / "opponents"
    shards: list[Shard] = []
    for player in players:
        mine = [e for e, p in zip(examples, assigned, strict=True) if p == player]
        for number, part in enumerate(batched(mine, config.sampling.shard_size)):
            draws = [(example, "sample") for example in part]
            shards.append(Shard(folder / f"{player.name}-{number:05d}", player, draws))
    found = dict(session.answers(iteration, shards, "opponents"))
    return [Duel(session.demonstrations[example], found[example]) for example in examples]


def reference_mode(session: Session, pairs: int) -> tuple[str, str]:
    """`reference.mode` with `auto` resolved, and why."""
    joint = session.backbone.joint_problem() is None
    return choose_mode(session.config, pairs, sharded=session.team.sharded, joint=joint)


def score_reference(session: Session, iteration: int, trees: list[Tree]) -> list[tuple[float, ...]]:
    """lp_ref of (winner, loser) for each pair."""
    logps = session.frozen_logps(iteration, trees, session.reference_policies(iteration))
    return [tuple(row) for row in session.mix(*logps).tolist()]


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
    config: Config,
    before: Path | None,
    online: OnlineReference | None = None,
) -> None:
    """Train an adapter and make it durable as `folder`/adapter."""
    start_policy(session, iteration, before)
    job = Job(
        objective=objective,
        config=config.train,
        beta=reward_scale(config, iteration),
        iteration=iteration,
        seed=config.seed,
        stage=f"{stage}/{iteration}",
        checkpoints=folder / "checkpoints",
        remedy=REMEDIES[config.loss.kind] if config.method == "spin" else REMEDY,
        online=online,
    )
    train(session.team, session.backbone, examples, job, session.metrics)
    with session.team.together():
        if session.team.main:
            with commit(folder / "adapter") as temporary:
                session.backbone.save_adapter(POLICY, temporary)
    session.finished(job.stage, folder)


def train_control(session: Session, iteration: int) -> Path:
    """Plain further SFT at equal cost: the same prompts, adapter, steps and tokens.

    A pair's two responses are two passes over the demonstration, so that a step carries as many
    trained sequences as one of self-play.
    """
    config = session.config
    folder = control_folder(session, iteration)
    if session.finished(f"control/{iteration}", folder):
        return folder
    chosen = session.examples(iteration)
    if config.selfplay.mixing and iteration:
        chosen += session.examples(iteration - 1)
    demos = [session.demonstrations[e] for e in chosen]
    mean_tokens = float(np.mean([len(demo.response) for demo in demos]))
    examples = [Example(Tree(d.prompt, (d.response,)), (0.0,)) for d in demos for _ in range(2)]
    doubled = config.train.model_copy(update={"batch_size": 2 * config.train.batch_size})
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
            config.model_copy(update={"train": doubled}),
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
    base: measures.Evaluation | None,
    iteration: int,
) -> measures.Evaluation:
    """Measures of the base or of an adapter on disk."""
    if not session.team.from_main(lambda: verifies(folder / "evaluation")):
        mine = session.heldout[session.team.index :: session.team.count]
        answers = 2 * len(mine)  # sampled and greedy
        with (
            session.timed("evaluate", iteration),
            console.bar(f"evaluate {name}", answers, "answers") as advance,
        ):
            if adapter is not None:
                session.backbone.load_adapter("evaluated", adapter)
            evaluation = measures.evaluate(
                name,
                session.backbone,
                "evaluated" if adapter is not None else None,
                session.heldout,
                session.chat,
                session.config,
                base,
                iteration,
                advance,
                session.judge,
                session.team,
            )
            with session.team.together():
                if session.team.main:
                    with commit(folder / "evaluation") as temporary:
                        evaluation.save(temporary / "evaluation.json")
        if adapter is not None:
            session.backbone.remove_adapter("evaluated")
    return measures.Evaluation.load(folder / "evaluation" / "evaluation.json")
