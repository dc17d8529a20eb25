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

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from alphaspin import console
from alphaspin import evaluate as measures
from alphaspin.backbone import POLICY, WEIGHTS, Backbone, average_adapters
from alphaspin.batching import Tree
from alphaspin.config import Config
from alphaspin.data import ChatFormat, Demonstration
from alphaspin.distributed import Team
from alphaspin.gflownet import Task, train_sampler
from alphaspin.judges import Comparison, Judge, Matrix, Prompt, pick_pair, win_probabilities
from alphaspin.losses import (
    ignores_equal_pairs,
    mixture_reference,
    nash_md,
    pairwise,
    pointwise,
    regularised,
    reward_scale,
)
from alphaspin.mixture import Setting, diagnose, sample
from alphaspin.opponents import BASE, EMA, PLAYERS, Player, assign, choose_prompts
from alphaspin.remote import engine
from alphaspin.runs import (
    Interrupted,
    Metrics,
    Run,
    commit,
    remove,
    verifies,
)
from alphaspin.sampling import Answer, Draw, Policy, Request
from alphaspin.scoring import OnlineReference, ReferenceCache, batched, choose_mode, score
from alphaspin.trainer import REMEDY, Example, Job, Objective, train


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


@dataclass(frozen=True, slots=True)
class Shard:
    """Answers that are sampled and kept together.

    folder: where they are or will be. player: who answers. draws: (example, purpose) of each
    answer; together with t they fix its random numbers.
    """

    folder: Path
    player: Player
    draws: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class TeamJudge:
    """A judge that process 0 asks for all processes; a signal stops it after a group of verdicts.

    With a label it has a progress bar.
    """

    team: Team
    judge: Judge | None  # in process 0
    identity: str
    both_orders: bool
    label: str | None = None

    @classmethod
    def of(cls, team: Team, judge: Judge | None) -> "TeamJudge":
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


@dataclass(slots=True)
class SelfPlay:
    """One run in progress: what all phases share; the phases run in all processes alike."""

    config: Config
    run: Run
    backbone: Backbone
    chat: ChatFormat
    demonstrations: list[Demonstration]
    heldout: list[Demonstration]
    team: Team
    metrics: Metrics
    cache: ReferenceCache
    judge: TeamJudge | None = None

    # The iterates

    def folder(self, iteration: int) -> Path:
        """Artefacts of iteration t."""
        return self.run.path / "iterations" / str(iteration)

    def load_iterate(self, iteration: int) -> str | None:
        """The name under which iterate t is loaded; None for the base (t < 0)."""
        if iteration < 0:
            return None
        name = f"iterate-{iteration}"
        if not self.backbone.has_adapter(name):
            self.backbone.load_adapter(name, self.folder(iteration) / "adapter")
        return name

    def load_member(self, member: int, iteration: int) -> str | None:
        """The name under which a player's iterate, or the average, is loaded."""
        if member != EMA:
            return self.load_iterate(member)
        self.backbone.load_adapter("ema", self.folder(iteration) / "ema")
        return "ema"

    def unload_iterates(self) -> None:
        """Forget the frozen adapters, which training does not need."""
        for name in list(self.backbone.adapter_ids):
            if name is not None:
                self.backbone.remove_adapter(name)

    def load_reference_adapter(self, iteration: int) -> str | None:
        """The adapter that stands for "previous" in the reference: π_{t-1}, or the average."""
        if self.config.reference.kind == "ema" and iteration:
            self.team.from_main(lambda: self.make_average(iteration))
            return self.load_member(EMA, iteration)
        return self.load_iterate(iteration - 1)

    def make_average(self, iteration: int) -> None:
        """Make the moving average of the adapters 0 … t-1 and keep it, where it is not on disk."""
        folder = self.folder(iteration) / "ema"
        if not verifies(folder):
            # ema_1 = adapter_0; ema_t = decay · ema_{t-1} + (1 - decay) · adapter_{t-1}
            self.backbone.load_adapter("ema", self.folder(0) / "adapter")
            average = self.backbone.adapter_state("ema")
            for k in range(1, iteration):
                self.backbone.load_adapter("ema", self.folder(k) / "adapter")
                average = average_adapters(
                    average, self.backbone.adapter_state("ema"), self.config.reference.ema_decay
                )
            self.backbone.set_adapter_state("ema", average)
            with commit(folder) as temporary:
                self.backbone.save_adapter("ema", temporary)

    # Phase 1: opponents answer

    def duels(self, iteration: int) -> list[Duel]:
        """The pairs of iteration t; answers that are not on disk are sampled now."""
        config = self.config
        examples = choose_prompts(
            len(self.demonstrations), config.selfplay.prompts, iteration, config.seed
        )
        players = PLAYERS[config.selfplay.opponent](config, iteration)
        assigned = assign(examples, players)
        folder = self.folder(iteration) / "opponents"
        shards: list[Shard] = []
        for player in players:
            mine = [e for e, p in zip(examples, assigned, strict=True) if p == player]
            for number, part in enumerate(batched(mine, config.sampling.shard_size)):
                draws = [(example, "sample") for example in part]
                shards.append(Shard(folder / f"{player.name}-{number:05d}", player, draws))
        found = dict(self.answers(iteration, shards, "opponents"))
        return [Duel(self.demonstrations[example], found[example]) for example in examples]

    def answers(
        self, iteration: int, shards: Sequence[Shard], kind: str
    ) -> Iterator[tuple[int, Answer]]:
        """The answers of iteration t's shards, sampled now where their folders do not hold them.

        Returns:
            (example, answer) in the order of the shards and their `draws`.
        """
        if any(member == EMA for shard in shards for member, _ in shard.player.members):
            self.team.from_main(lambda: self.make_average(iteration))
        for player in {shard.player for shard in shards if shard.player.sampler == "gflownet"}:
            self.load_sampler(iteration, player)
        count = sum(len(shard.draws) for shard in shards)
        with console.bar(f"t={iteration} {kind}", count, "answers") as advance:

            def present(number: int, shard: Shard) -> None:
                del number
                advance(len(shard.draws), 0)

            def make(number: int, shard: Shard) -> None:
                if verifies(shard.folder):
                    present(number, shard)
                else:
                    answers = self.drawn(iteration, shard.player, shard.draws, advance)
                    with commit(shard.folder) as temporary:
                        _save_answers(temporary, [e for e, _ in shard.draws], answers)

            self.team.each(shards, make, present)
        for shard in shards:
            yield from _load_answers(shard.folder)

    def drawn(
        self,
        iteration: int,
        player: Player,
        draws: Sequence[tuple[int, str]],
        advance: console.Advance,
    ) -> list[Answer]:
        """What `answers` has drawn: a function of the player, the prompts and their draws."""
        config = self.config
        policy: Policy = {self.load_member(k, iteration): w for k, w in player.members}
        prompts = [self.demonstrations[e].prompt for e, _ in draws]
        noise = [Draw(config.seed, iteration, why, e) for e, why in draws]
        cap, stops = config.text.max_response_tokens, self.chat.stop_token_ids
        if player.sampler == "smc":
            size = config.sampling.batch_size
            setting = Setting(policy, config.sampling.particles, cap, stops, size)
            answers, weights = sample(
                self.backbone, setting, prompts, noise, method="smc", progress=advance
            )
            console.note(f"t={iteration}: {weights.note()}")
            return answers
        if player.sampler == "gflownet":
            policy = {f"sampler-{iteration}": 1.0}
        requests = [Request(p, policy, cap, d) for p, d in zip(prompts, noise, strict=True)]
        return engine(config.sampling, self.chat)(
            self.backbone,
            requests,
            stop_ids=stops,
            config=config.sampling,
            progress=advance,
        )

    def load_sampler(self, iteration: int, player: Player) -> None:
        """The adapter that samples from the exact mixture at iteration t, trained now if need be.

        It learns on the prompts of the iteration, `gflownet.prompts` of them at most.
        """
        config, folder = self.config, self.folder(iteration) / "sampler"
        examples = choose_prompts(
            len(self.demonstrations), config.selfplay.prompts, iteration, config.seed
        )
        prompts = {(p := self.demonstrations[e].prompt).tobytes(): p for e in examples}
        task = Task(
            {self.load_member(k, iteration): w for k, w in player.members},
            list(prompts.values())[: config.gflownet.prompts],
            config.text.max_response_tokens,
            self.chat.stop_token_ids,
            config.gflownet,
            config.seed,
            iteration,
            f"sampler/{iteration}",
            folder,
        )
        adapter = train_sampler(self.backbone, task, self.metrics, self.team)
        self.team.from_main(lambda: self.run.record_adapter(task.stage, adapter / WEIGHTS))
        self.backbone.load_adapter(f"sampler-{iteration}", adapter)

    # Phase 2: the reference

    def score_reference(self, iteration: int, trees: list[Tree]) -> list[tuple[float, ...]]:
        """lp_ref of (winner, loser) for each pair."""
        logps = self.frozen_logps(iteration, trees, self.reference_policies(iteration))
        return [tuple(row) for row in self.mix(*logps).tolist()]

    def reference_policies(self, iteration: int) -> list[str | None]:
        """The policies that the reference is a mixture of, loaded."""
        alpha = self.config.reference.alpha
        previous = self.load_reference_adapter(iteration)
        # At α = 1 the base takes no part, at α = 0 the previous iterate; at t = 0 they are one.
        return list(dict.fromkeys([previous] * (alpha > 0) + [None] * (alpha < 1)))

    def mix(self, *logps: Tensor) -> Tensor:
        """lp_ref from the log-probs of `reference_policies`."""
        reference = self.config.reference
        kind = "arithmetic" if reference.kind == "arithmetic" else "geometric"
        return mixture_reference(logps[0], logps[-1], alpha=reference.alpha, kind=kind)

    def reference_mode(self, pairs: int) -> tuple[str, str]:
        """`reference.mode` with `auto` resolved, and why."""
        return choose_mode(self.config, pairs, sharded=self.team.sharded)

    def frozen_logps(
        self, iteration: int, trees: Sequence[Tree], policies: Sequence[str | None]
    ) -> list[Tensor]:
        """lp of each pair under each policy, [pairs, 2]; what the cache lacks is computed now."""
        config = self.config
        wanted, policies = policies, list(dict.fromkeys(policies))  # at t = 0 they are one
        hashes = {name or "base": self.backbone.adapter_ids[name] for name in policies}
        shards = list(batched(trees, config.sampling.shard_size))
        folder = self.folder(iteration) / "reference"
        expected = 0
        with console.bar(f"t={iteration} reference", len(trees), "pairs") as advance:

            def read(number: int, shard: Sequence[Tree]) -> None:
                self.cache.load(folder / f"{number:05d}")
                advance(len(shard), 0)

            def make(number: int, shard: Sequence[Tree]) -> None:
                # What repeats from an earlier shard stands in that one, whoever computes it.
                nonlocal expected
                for earlier in shards[expected:number]:
                    self.cache.expect(hashes.values(), earlier)
                expected = number
                path = folder / f"{number:05d}"
                if self.cache.load(path) and not self._incomplete(policies, shard):
                    advance(len(shard), 0)
                    return
                scored = score(
                    self.backbone, self.cache, policies, shard, config.train, progress=advance
                )
                self.cache.save(path, *scored, hashes)

            self.team.each(shards, make, read)

        def lookup(policy: str | None) -> Tensor:
            identity = self.backbone.adapter_ids[policy]
            return torch.tensor([self.cache.lookup(identity, tree) for tree in trees])

        return [lookup(policy) for policy in wanted]

    def _incomplete(self, policies: Sequence[str | None], trees: Sequence[Tree]) -> bool:
        """Whether the cache lacks a log-prob: a shard may verify and be of other tokens."""
        ids = [self.backbone.adapter_ids[policy] for policy in policies]
        return any(self.cache.missing(identity, trees) for identity in ids)

    # Phase 3: training

    def start_policy(self, iteration: int, before: Path | None) -> None:
        """A policy adapter that continues `before`, or a fresh one."""
        if self.backbone.has_adapter(POLICY):
            self.backbone.remove_adapter(POLICY)
        seed = self.config.seed
        self.backbone.add_adapter(POLICY, self.config.lora, seed=seed, iteration=iteration)
        if before is not None and self.config.selfplay.warm_start:
            self.backbone.load_adapter(POLICY, before)

    def fit(
        self,
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
        self.start_policy(iteration, before)
        job = Job(
            objective=objective,
            config=config.train,
            beta=reward_scale(config, iteration),
            iteration=iteration,
            seed=config.seed,
            stage=f"{stage}/{iteration}",
            checkpoints=folder / "checkpoints",
            remedy=REMEDY if config.method == "spin" else "consider a smaller train.lr",
            online=online,
        )
        train(self.team, self.backbone, examples, job, self.metrics)
        with self.team.together():
            if self.team.main:
                with commit(folder / "adapter") as temporary:
                    self.backbone.save_adapter(POLICY, temporary)
        self.finished(job.stage, folder)

    def finished(self, stage: str, folder: Path) -> bool:
        """Whether a stage's adapter is on disk; its hash is then recorded or compared."""

        def look() -> bool:
            if not verifies(folder / "adapter"):
                return False
            self.run.record_adapter(stage, folder / "adapter" / WEIGHTS)
            remove(folder / "checkpoints")
            return True

        return self.team.from_main(look)

    def train_iterate(self, iteration: int) -> None:
        """Phases 1 to 3 of iteration t; nothing to do where its adapter is on disk."""
        config = self.config
        folder = self.folder(iteration)
        if self.finished(f"train/{iteration}", folder):
            for shard in sorted((folder / "reference").glob("*")):
                self.cache.load(shard)  # the base's log-probs serve later iterations too
            return
        match config.method:
            case "spin":
                examples, objective = self.demonstrated_pairs(iteration)
            case "sppo" | "rspo":
                examples, objective = self.judged_pairs(iteration)
            case "nash_md":
                examples, objective = self.mirror_descent(iteration)
        self.unload_iterates()
        online = None
        if examples and not examples[0].reference:
            joint = self.reference_mode(len(examples))[0] == "joint"
            policies = tuple(self.reference_policies(iteration))
            online = OnlineReference(policies, self.mix, joint)
        before = self.folder(iteration - 1) / "adapter" if iteration else None
        with self.timed("train", iteration):
            self.fit("train", iteration, folder, examples, objective, config, before, online)

    def demonstrated_pairs(self, iteration: int) -> tuple[list[Example], Objective]:
        """Phases 1 and 2 of `spin`: demonstrations against opponents' answers, and the loss."""
        config = self.config
        with self.timed("opponents", iteration):
            duels = self.duels(iteration)
            if config.selfplay.mixing and iteration:
                duels += self.duels(iteration - 1)
        mode, reason = self.reference_mode(len(duels))
        if config.reference.mode == "auto":
            console.note(f"t={iteration}: reference {mode}, {reason}")
        references: list[tuple[float, ...]] = [()] * len(duels)
        if mode == "cached":
            with self.timed("reference", iteration):
                references = self.score_reference(iteration, [duel.tree() for duel in duels])
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

    # Phases 1 and 2 of the methods with a judge

    def judged_pairs(self, iteration: int) -> tuple[list[Example], Objective]:
        """The best and the worst of K responses of the current iterate, and the loss.

        Prompts whose responses all tie teach nothing and are left out.
        """
        config, settings = self.config, self.config.preference
        with self.timed("responses", iteration):
            responses = self.responses(iteration)
        with self.timed("judge", iteration):
            matrices = self.judged(iteration, list(responses), list(responses.values()))
        picked = [pick_pair(matrix, settings.labels) for matrix in matrices]
        chosen = [(e, pair) for e, pair in zip(responses, picked, strict=True) if pair]
        best, worst = [pair.p_best for _, pair in chosen], [pair.p_worst for _, pair in chosen]
        self.tell_pairs(iteration, responses, best, worst, len(responses) - len(chosen))
        with self.timed("reference", iteration):
            groups = [
                Tree(self.demonstrations[e].prompt, tuple(y.tokens for y in responses[e]))
                for e, _ in chosen
            ]
            sides = [(pair.best, pair.worst) for _, pair in chosen]
            trees, reference, base = self.pointwise_reference(iteration, groups, sides)
        facts = [torch.tensor([(pair.p_best, pair.p_worst) for _, pair in chosen])]
        facts += [base] * (config.method == "rspo")
        examples = [
            Example(
                tree, tuple(reference[i].tolist()), facts=tuple(tuple(f[i].tolist()) for f in facts)
            )
            for i, tree in enumerate(trees)
        ]
        loss = pointwise if config.method == "sppo" else regularised

        def objective(policy: Tensor, reference: Tensor, lengths: Tensor, *facts: Tensor) -> Tensor:
            del lengths
            return loss(settings, policy, reference, *facts)

        return examples, objective

    def pointwise_reference(
        self, iteration: int, groups: Sequence[Tree], sides: Sequence[tuple[int, int]]
    ) -> tuple[list[Tree], Tensor, Tensor]:
        """Each prompt's best and worst response, and their lp_ref and lp_base, [prompts, 2].

        A geometric mixture's log Z(x) shifts a pointwise loss. The K responses, drawn from π_{t-1},
        estimate it: log Ẑ(x) = log mean_k e^{α lp_prev + (1-α) lp_base - lp_{t-1}}(y_k), and all of
        them are scored for that.

        Args:
            iteration: t.
            groups: each prompt with its K responses.
            sides: which of them are the best and the worst.
        """
        config, alpha = self.config, self.config.reference.alpha
        pairs = [
            Tree(tree.prompt, (tree.responses[i], tree.responses[j]))
            for tree, (i, j) in zip(groups, sides, strict=True)
        ]
        previous = self.load_reference_adapter(iteration)
        if config.reference.kind == "arithmetic" or alpha in (0, 1) or not pairs:
            policies = [previous] + [None] * (alpha < 1 or config.method == "rspo")
            logps = self.frozen_logps(iteration, pairs, policies)
            prev, base = logps[0], logps[-1]
            mixed = mixture_reference(prev, base, alpha=alpha, kind=config.reference.kind)
            return pairs, mixed, base
        policies = [previous, None, self.load_iterate(iteration - 1)]
        prev, base, drawn = self.frozen_logps(iteration, groups, policies)
        weights = diagnose(mixture_reference(prev, base, alpha=alpha) - drawn)
        log_z = weights.log_z[:, None].float()
        console.note(f"t={iteration}: mean log Z {log_z.mean():.3f}; {weights.note()}")
        mixed = mixture_reference(prev, base, alpha=alpha, log_z=log_z)
        index = torch.tensor(sides)
        return pairs, mixed.gather(1, index), base.gather(1, index)

    def mirror_descent(self, iteration: int) -> tuple[list[Example], Objective]:
        """Nash-MD: responses of the iterate, judged against the mixture's, and the loss."""
        config, tau = self.config, self.config.preference.tau
        with self.timed("responses", iteration):
            responses = self.responses(iteration)
            opposed = self.responses(iteration, config.preference.mixture)
        with self.timed("judge", iteration):
            both = [[responses[e][0], opposed[e][0]] for e in responses]
            wins = [matrix[0, 1].item() for matrix in self.judged(iteration, list(responses), both)]
        self.tell_pairs(iteration, responses, wins, [1 - win for win in wins], wins.count(0.5))
        trees = [Tree(self.demonstrations[e].prompt, (y.tokens,)) for e, (y,) in responses.items()]
        with self.timed("reference", iteration):
            (base,) = self.frozen_logps(iteration, trees, [None])
        rows = zip(trees, base.tolist(), wins, strict=True)
        examples = [Example(tree, tuple(lp), facts=((win,),)) for tree, lp, win in rows]

        def objective(policy: Tensor, base: Tensor, lengths: Tensor, win: Tensor) -> Tensor:
            del lengths
            return nash_md(policy, base, win, tau=tau)[:, 0]

        return examples, objective

    def responses(self, iteration: int, mixture: float | None = None) -> dict[int, list[Answer]]:
        """K responses of π_{t-1} per prompt, by example; those not on disk are sampled now.

        Response k of an example is drawn from numbers of its own: a function of (seed, t, k,
        example). K = 1 for `nash_md`; with `mixture`, its m, from the mixture with the base.
        """
        config = self.config
        count = config.preference.responses if config.method != "nash_md" else 1
        kind, purpose = "responses", "response"
        player = Player.single(max(iteration - 1, BASE))
        if mixture is not None:
            kind, purpose = "opponents", "opponent"
            player = Player.mixture("mixture", iteration - 1, 1 - mixture)
        examples = choose_prompts(
            len(self.demonstrations), config.selfplay.prompts, iteration, config.seed
        )
        size = max(1, config.sampling.shard_size // count)
        folder = self.folder(iteration) / kind
        shards = [
            Shard(
                folder / f"{number:05d}",
                player,
                [(e, f"{purpose}/{k}") for e in part for k in range(count)],
            )
            for number, part in enumerate(batched(examples, size))
        ]
        result: dict[int, list[Answer]] = {e: [] for e in examples}
        for example, answer in self.answers(iteration, shards, kind):
            result[example].append(answer)
        return result

    def judged(
        self, iteration: int, examples: Sequence[int], answers: Sequence[Sequence[Answer]]
    ) -> list[Matrix]:
        """P(y_i ≻ y_j) of each example's answers.

        Verdicts are durable as they come: whatever stops this phase, none is asked twice.
        """
        assert self.judge
        demos = [self.demonstrations[e] for e in examples]
        texts = [[self.chat.decode(answer.tokens) for answer in group] for group in answers]
        prompts = [Prompt(demo.messages, demo.answer) for demo in demos]
        judge = replace(self.judge, label=f"t={iteration} judge")
        return win_probabilities(judge, prompts, texts)

    def tell_pairs(
        self,
        iteration: int,
        responses: Mapping[int, Sequence[Answer]],
        best: Sequence[float],
        worst: Sequence[float],
        ties: int,
    ) -> None:
        """What iteration t has to learn from, for the console, the metrics and the summary.

        `best` and `worst` are the win probabilities of the two sides of each pair.
        """
        answers = [answer for group in responses.values() for answer in group]
        values = {
            "prompts": len(responses),
            "pairs": len(best),
            "ties": ties,
            "truncated": sum(answer.truncated for answer in answers),
            "length": float(np.mean([len(answer.tokens) for answer in answers])),
            "p_best": float(np.mean(best)) if best else 0.5,
            "p_worst": float(np.mean(worst)) if worst else 0.5,
        }
        self.metrics.rewind("pairs", iteration - 1)
        self.metrics.write("pairs", iteration, values)
        console.note(
            f"t={iteration}: {len(best)} pairs with mean win probabilities {values['p_best']:.3f} "
            f"and {values['p_worst']:.3f}; {ties} prompts without a difference, "
            f"{values['truncated']} of {len(answers)} responses cut at the length cap, "
            f"{values['length']:.1f} tokens each"
        )
        if not best:
            text = f"no pair with a difference, π_{iteration} = π_{iteration - 1}"
            console.alarm(f"t={iteration}: {text}")
            self.metrics.write("pairs", iteration, {"alarm": text})

    def train_control(self, iteration: int) -> Path:
        """Plain further SFT at equal cost: the same prompts, adapter, steps and tokens.

        A pair's two responses are two passes over the demonstration, so that a step carries as many
        trained sequences as one of self-play.
        """
        config = self.config
        folder = self.control_folder(iteration)
        if self.finished(f"control/{iteration}", folder):
            return folder
        counts, seed = config.selfplay.prompts, config.seed
        chosen = choose_prompts(len(self.demonstrations), counts, iteration, seed)
        if config.selfplay.mixing and iteration:
            chosen += choose_prompts(len(self.demonstrations), counts, iteration - 1, seed)
        demos = [self.demonstrations[e] for e in chosen]
        mean_tokens = float(np.mean([len(demo.response) for demo in demos]))
        examples = [Example(Tree(d.prompt, (d.response,)), (0.0,)) for d in demos for _ in range(2)]
        doubled = config.train.model_copy(update={"batch_size": 2 * config.train.batch_size})
        before = self.control_folder(iteration - 1) / "adapter" if iteration else None

        def objective(policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
            """NLL divided by a constant, so that every token weighs the same."""
            del reference, lengths
            return -policy[:, 0] / mean_tokens

        with self.timed("control", iteration):
            self.fit(
                "control",
                iteration,
                folder,
                examples,
                objective,
                config.model_copy(update={"train": doubled}),
                before,
            )
        return folder

    def control_folder(self, iteration: int) -> Path:
        """Artefacts of the control's iteration t."""
        return self.run.path / "control" / "sft" / str(iteration)

    # Phase 4: evaluation

    def evaluate(
        self,
        name: str,
        folder: Path,
        adapter: Path | None,
        base: measures.Evaluation | None,
        iteration: int,
    ) -> measures.Evaluation:
        """Measures of the base or of an adapter on disk."""
        if not self.team.from_main(lambda: verifies(folder / "evaluation")):
            mine = self.heldout[self.team.index :: self.team.count]
            answers = 2 * len(mine)  # sampled and greedy
            with (
                self.timed("evaluate", iteration),
                console.bar(f"evaluate {name}", answers, "answers") as advance,
            ):
                if adapter is not None:
                    self.backbone.load_adapter("evaluated", adapter)
                evaluation = measures.evaluate(
                    name,
                    self.backbone,
                    "evaluated" if adapter is not None else None,
                    self.heldout,
                    self.chat,
                    self.config,
                    base,
                    iteration,
                    advance,
                    self.judge,
                    self.team,
                )
                with self.team.together():
                    if self.team.main:
                        with commit(folder / "evaluation") as temporary:
                            evaluation.save(temporary / "evaluation.json")
            if adapter is not None:
                self.backbone.remove_adapter("evaluated")
        return measures.Evaluation.load(folder / "evaluation" / "evaluation.json")

    @contextmanager
    def timed(self, phase: str, iteration: int) -> Generator[None]:
        """Record how long a phase took, in seconds."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.metrics.write(f"time/{phase}", iteration, {"seconds": round(seconds, 3)})

    def play(self) -> list[measures.Evaluation]:
        """All iterations, then the control; the evaluations in the order of the table."""
        config = self.config
        rows: list[measures.Evaluation] = []
        base = None
        if self.heldout:
            base = self.evaluate("base", self.run.path / "base", None, None, 0)
            rows.append(base)
        for t in range(config.selfplay.iterations):
            self.train_iterate(t)
            if base:
                adapter = self.folder(t) / "adapter"
                rows.append(self.evaluate(str(t), self.folder(t), adapter, base, t))
                console.note(f"t={t}: {measures.line(rows[-1])}")
        if config.control == "sft":
            for t in range(config.selfplay.iterations):
                folder = self.train_control(t)
                if base:
                    adapter = folder / "adapter"
                    rows.append(self.evaluate(f"sft {t}", folder, adapter, base, t))
        return rows


def _save_answers(folder: Path, examples: Sequence[int], answers: Sequence[Answer]) -> None:
    save_file(
        {
            "example": np.array(examples, np.int64),
            "length": np.array([len(answer.tokens) for answer in answers], np.int64),
            "truncated": np.array([answer.truncated for answer in answers], np.bool_),
            "tokens": np.concatenate([answer.tokens for answer in answers]),
        },
        folder / "answers.safetensors",
    )


def _load_answers(folder: Path) -> Iterator[tuple[int, Answer]]:
    data = load_file(folder / "answers.safetensors")
    ends = data["length"].cumsum()
    parts = np.split(data["tokens"], ends[:-1])
    for example, tokens, cut in zip(data["example"], parts, data["truncated"], strict=True):
        yield int(example), Answer(tokens, bool(cut))
