"""One run in progress: what its phases share.

The iterates on disk, the answers of players, the log-probs of frozen policies. Each begins by
looking for what it left; all of it is a function of (seed, t, example).
"""

import hashlib
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from alphaspin.data.chat import ChatFormat
from alphaspin.data.demonstrations import Demonstration
from alphaspin.evaluation.measures import Bench
from alphaspin.foundation import console
from alphaspin.foundation.artefacts import commit, intact, recorded, remove, stands
from alphaspin.foundation.batched import batched
from alphaspin.foundation.runs import Metrics, Run
from alphaspin.judges.shared import TeamJudge
from alphaspin.losses.reference import mixture_reference
from alphaspin.methods.base import Sections
from alphaspin.model.backbone import WEIGHTS, Backbone, average_adapters
from alphaspin.model.distributed import Team
from alphaspin.model.scoring import ReferenceCache, score
from alphaspin.model.stepper import Policy, corrected
from alphaspin.model.tree import Tree
from alphaspin.opponents.base import EMA, Player, Shard, choose_prompts
from alphaspin.sampling.answer import Answer, Draw
from alphaspin.sampling.decode import Request, decode
from alphaspin.sampling.engine import OwnSampler
from alphaspin.sampling.gflownet import Task, train_sampler
from alphaspin.sampling.mixture import Setting, sample
from alphaspin.sampling.remote import ServerSampler


@dataclass(slots=True)
class Session:
    """One run in progress: what all phases share; the phases run in all processes alike."""

    config: Sections
    run: Run
    backbone: Backbone
    chat: ChatFormat
    demonstrations: list[Demonstration]
    heldout: list[Demonstration]
    team: Team
    metrics: Metrics
    cache: ReferenceCache
    judge: TeamJudge | None = None
    engine: ServerSampler | OwnSampler | None = None
    """What answers in the place of the local sampler."""

    def folder(self, iteration: int) -> Path:
        """Artefacts of iteration t."""
        return self.run.path / "iterations" / str(iteration)

    def lineage(self, iteration: int) -> dict[str, str]:
        """Hash of the iterates before t, which all that is made in iteration t is made from."""
        before = [recorded(self.folder(k) / "adapter")[WEIGHTS] for k in range(iteration)]
        return {"iterates": hashlib.sha256("".join(before).encode()).hexdigest()}

    def bench(self) -> Bench:
        """What its evaluations share; of a sharded base the engine answers here too."""
        bench = Bench.of(self.config, self.backbone, self.chat, self.heldout, self.team)
        if self.engine is None or not self.team.sharded:
            return bench
        awake = self.engine.awake if isinstance(self.engine, OwnSampler) else nullcontext
        name = self.config.sampling.engine
        return replace(bench, ask=self.engine.decode, awake=awake, engine=name)

    def examples(self, iteration: int) -> list[int]:
        """The demonstrations that iteration t uses, as indices in random order."""
        total, prompts = len(self.demonstrations), self.config.selfplay.prompts
        return choose_prompts(total, prompts, iteration, self.config.seed)

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
        return self.load_iterate(self.config.preference.parent(iteration))

    def make_average(self, iteration: int) -> None:
        """Make the moving average of the adapters 0 … t-1 and keep it, where it is not on disk."""
        folder = self.folder(iteration) / "ema"
        made_of = self.lineage(iteration)
        if not stands(folder, made_of):
            # ema_1 = adapter_0; ema_t = decay · ema_{t-1} + (1 - decay) · adapter_{t-1}
            self.backbone.load_adapter("ema", self.folder(0) / "adapter")
            average = self.backbone.adapter_state("ema")
            for k in range(1, iteration):
                self.backbone.load_adapter("ema", self.folder(k) / "adapter")
                average = average_adapters(
                    average, self.backbone.adapter_state("ema"), self.config.reference.ema_decay
                )
            self.backbone.set_adapter_state("ema", average)
            with commit(folder, made_of) as temporary:
                self.backbone.save_adapter("ema", temporary)

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
        made_of = self.lineage(iteration)
        count = sum(len(shard.draws) for shard in shards)
        with (
            self.awake(shards, made_of),
            console.bar(f"t={iteration} {kind}", count, "answers") as advance,
        ):

            def present(number: int, shard: Shard) -> None:
                del number
                advance(len(shard.draws), 0)

            def make(number: int, shard: Shard) -> None:
                if stands(shard.folder, made_of):
                    present(number, shard)
                else:
                    answers = self.drawn(iteration, shard.player, shard.draws, advance)
                    with commit(shard.folder, made_of) as temporary:
                        _save_answers(temporary, [e for e, _ in shard.draws], answers)

            self.team.each(shards, make, present)
        for shard in shards:
            yield from load_answers(shard.folder)

    def awake(
        self, shards: Sequence[Shard], made_of: dict[str, str]
    ) -> AbstractContextManager[Any]:
        """The run's own engine, awake where one of the shards is to be sampled."""
        engine, team = self.engine, self.team
        if isinstance(engine, OwnSampler) and team.from_main(
            lambda: any(not stands(shard.folder, made_of) for shard in shards)
        ):
            return engine.awake()
        return nullcontext()

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
        cap, stops = config.text.response_limit, self.chat.stop_token_ids
        if player.sampler == "smc":
            size = config.sampling.batch_size
            setting = Setting(policy, config.sampling.particles, cap, stops, size)
            answers, weights = sample(
                self.backbone, setting, prompts, noise, method="smc", progress=advance
            )
            console.note(f"t={iteration}: {weights.note()}")
            return answers
        if player.sampler == "gflownet":
            policy = corrected(policy, f"sampler-{iteration}")
        requests = [Request(p, policy, cap, d) for p, d in zip(prompts, noise, strict=True)]
        ask = self.engine.decode if self.engine else decode
        return ask(
            self.backbone,
            requests,
            stop_ids=stops,
            config=config.sampling,
            progress=advance,
        )

    def load_sampler(self, iteration: int, player: Player) -> None:
        """The adapter that corrects the mixture's sampler at iteration t, trained now if need be.

        It learns on the prompts of the iteration, `gflownet.prompts` of them at most.
        """
        config, folder = self.config, self.folder(iteration) / "sampler"
        examples = self.examples(iteration)
        prompts = {(p := self.demonstrations[e].prompt).tobytes(): p for e in examples}
        task = Task(
            {self.load_member(k, iteration): w for k, w in player.members},
            list(prompts.values())[: config.gflownet.prompts],
            config.text.response_limit,
            self.chat.stop_token_ids,
            config.gflownet,
            config.seed,
            iteration,
            f"sampler/{iteration}",
            folder,
        )
        adapter = train_sampler(self.backbone, task, self.metrics, self.team)
        self.team.from_main(
            lambda: self.run.record_adapter(task.stage, adapter / WEIGHTS, self.metrics)
        )
        self.backbone.load_adapter(f"sampler-{iteration}", adapter)

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

    def frozen_logps(
        self, iteration: int, trees: Sequence[Tree], policies: Sequence[str | None]
    ) -> list[Tensor]:
        """lp of each pair under each policy, [pairs, 2]; what the cache lacks is computed now."""
        config = self.config
        wanted, policies = policies, list(dict.fromkeys(policies))  # at t = 0 they are one
        hashes = {name or "base": self.backbone.adapter_ids[name] for name in policies}
        shards = list(batched(trees, config.sampling.shard_size))
        folder, made_of = self.folder(iteration) / "reference", self.lineage(iteration)
        expected = 0
        with console.bar(f"t={iteration} reference", len(trees), "pairs") as advance:

            def read(number: int, shard: Sequence[Tree]) -> None:
                self.cache.load(folder / f"{number:05d}", made_of)
                advance(len(shard), 0)

            def make(number: int, shard: Sequence[Tree]) -> None:
                # What repeats from an earlier shard stands in that one, whoever computes it.
                nonlocal expected
                for earlier in shards[expected:number]:
                    self.cache.expect(hashes.values(), earlier)
                expected = number
                path = folder / f"{number:05d}"
                if self.cache.load(path, made_of) and not self._incomplete(policies, shard):
                    advance(len(shard), 0)
                    return
                scored = score(
                    self.backbone,
                    self.cache,
                    policies,
                    shard,
                    config.train.scored_together,
                    progress=advance,
                )
                self.cache.save(path, *scored, hashes, made_of)

            self.team.each(shards, make, read)

        def lookup(policy: str | None) -> Tensor:
            identity = self.backbone.adapter_ids[policy]
            return torch.tensor([self.cache.lookup(identity, tree) for tree in trees])

        return [lookup(policy) for policy in wanted]

    def _incomplete(self, policies: Sequence[str | None], trees: Sequence[Tree]) -> bool:
        """Whether the cache lacks a log-prob: a shard may verify and be of other tokens."""
        ids = [self.backbone.adapter_ids[policy] for policy in policies]
        return any(self.cache.missing(identity, trees) for identity in ids)

    def finished(self, stage: str, folder: Path, made_of: dict[str, str]) -> bool:
        """Whether a stage's adapter is on disk; its hash is then recorded or compared."""

        def look() -> bool:
            adapter = folder / "adapter"
            known = stage in self.run.manifest["adapters"]
            if known and intact(adapter):  # an exchanged one is refused
                self.run.record_adapter(stage, adapter / WEIGHTS, self.metrics)
            if not stands(adapter, made_of, silent=known):
                return False
            if not known:
                self.run.record_adapter(stage, adapter / WEIGHTS, self.metrics)
            remove(folder / "checkpoints")
            return True

        return self.team.from_main(look)

    @contextmanager
    def timed(self, phase: str, iteration: int) -> Generator[None]:
        """Record how long a phase took, in seconds."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.metrics.write(f"time/{phase}", iteration, {"seconds": round(seconds, 3)})


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


def load_answers(folder: Path) -> Iterator[tuple[int, Answer]]:
    """A durable shard of opponents' answers: (number of the demonstration, answer)."""
    data = load_file(folder / "answers.safetensors")
    ends = data["length"].cumsum()
    parts = np.split(data["tokens"], ends[:-1])
    for example, tokens, cut in zip(data["example"], parts, data["truncated"], strict=True):
        yield int(example), Answer(tokens, bool(cut))
