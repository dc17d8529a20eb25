"""Start-up check: is every log-prob that this project computes the one that plain PEFT computes?

Packed trees, a last layer that asks for what predicts only, a joint pass, a cache of slots: each is
exact only for models whose layers do what it assumes. Instead of a list of such models, each way is
tried on the model at hand, with random adapters on all adapted modules, at a short length and near
the longest of the run, and held against plain passes of transformers and PEFT, one sequence at a
time. What differs is not used: the whole last layer takes the place of its part, padded rows that
of packed trees, launches that of CUDA graphs, the family's own cache that of ours, recomputation
that of both, and where nothing is left the model is refused.

How much may differ follows from the dtype: the plain passes are repeated with each adapted
module's output moved by one rounding, and that moves the log-probs as far as other orders of the
same sums do.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from alphaspin import __version__
from alphaspin.errors import InputError
from alphaspin.foundation import console
from alphaspin.foundation.artefacts import read_record, write_record
from alphaspin.model import varlen
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import Batch, collate
from alphaspin.model.routing import NOT_JOINT
from alphaspin.model.scoring import hidden_logps
from alphaspin.model.slots import KINDS, give_up
from alphaspin.model.stepper import Stepper
from alphaspin.model.tree import Tree

FILE = "verified.json"
NAMES = ("check-1", "check-2")
STEPS = 8  # tokens that the sampler decodes of each answer
TRIES = 3  # with other tokens and adapters, where something seems wrong
ROUNDINGS = 4  # draws of the rounding errors
MARGIN = 4.0  # of the plain passes' own scatter
LEAST = 2e-5  # nats a token that are always allowed: fp32 rounds a sum of 50 log-probs by as much
FLOPS = {"cpu": 2e12, "cuda": 2e15}  # of all passes together: under a minute
SHORT = 16  # tokens of the short tree


@dataclass(frozen=True)
class Verdict:
    """What was found about a model: reasons, empty where a way is right, and `longest` tokens.

    about: the model, the versions and settings that it holds for.
    """

    about: dict[str, Any]
    longest: int
    packed: str = ""
    last: str = ""
    joint: str = ""
    graphs: str = ""
    slots: str = ""
    own: str = ""

    def apply(self, backbone: Backbone) -> None:
        """Forbid what was found to be wrong."""
        if self.packed:
            backbone.layout, backbone.layout_reason = "padded", self.packed
        backbone.whole_reason = backbone.whole_reason or self.last
        for cache in KINDS[:-1]:
            reason = cast(str, getattr(self, cache))
            if backbone.cache == cache and reason:
                give_up(backbone, reason)
        if self.joint:
            backbone.forbid_joint(self.joint)

    def note(self) -> str | None:
        """How far it reaches, where that is less than the run may need."""
        wanted = self.about["longest"]
        if self.longest >= wanted:
            return None
        return (
            f"log-probs were held against plain PEFT up to {self.longest} tokens, not up to "
            f"{wanted}: that would take more than a minute"
        )

    @staticmethod
    def read(folder: Path) -> "Verdict | None":
        """The one that is kept in a run folder."""
        if not (folder / FILE).exists():
            return None
        try:
            found = read_record(folder / FILE, "the model is checked again")
            return Verdict(**{f.name: found[f.name] for f in fields(Verdict) if f.name in found})
        except (InputError, TypeError) as error:
            console.note(str(error))
            return None

    def keep(self, folder: Path) -> None:
        """Write it where `read` looks."""
        write_record(folder / FILE, asdict(self))


def verify(backbone: Backbone, like: str, *, longest: int, kept: Verdict | None = None) -> Verdict:
    """Try the ways of `backbone` to compute log-probs, and forbid those that are wrong.

    Args:
        backbone: its adapters and the random numbers of torch are left as they are.
        like: an adapter; the random ones have its form.
        longest: tokens of the run's longest sequence.
        kept: an earlier verdict, which is believed if it is about the same.

    Raises:
        InputError: padded rows, or answers by recomputation, differ from plain PEFT.
    """
    lora = backbone.peft_config(like)
    longest = min(longest, backbone.max_positions or longest)
    about = {
        "base": backbone.identity,
        "dtype": str(backbone.head.weight.dtype),
        "device": backbone.device.type,
        "longest": longest,
        "layout": backbone.layout,
        "whole": backbone.whole_reason,
        "cache": backbone.cache,
        "attention": varlen.on(backbone.device),
        "targets": [str(lora.target_modules), str(lora.target_parameters), lora.r],
        "versions": [torch.__version__, transformers.__version__, peft.__version__, __version__],
    }
    verdict = kept if kept and kept.about == about else _tried(backbone, like, longest, about)
    verdict.apply(backbone)
    return verdict


def _tried(backbone: Backbone, like: str, longest: int, about: dict[str, Any]) -> Verdict:
    """What is wrong with other tokens and adapters too.

    Rounding alone can send a token to another expert, and its log-prob then jumps: that is rare,
    and does not happen at each try.
    """
    wrong: dict[str, str] | None = None
    reached = 0
    for seed in range(TRIES):
        trial = _Trial(backbone, like, longest, seed)
        reached = trial.longest
        try:
            found = trial.run()
        except InputError:
            if seed + 1 == TRIES and wrong is None:
                raise
            continue
        wrong = {way: reason and (wrong or found)[way] for way, reason in found.items()}
        if not any(wrong.values()):
            break
    return Verdict(about, reached, **(wrong or {}))


class _Trial:
    """The sequences, their plain log-probs and how far rounding moves them.

    Sequences stand in the order policy, tree, response; a policy is one of NAMES or None.
    """

    def __init__(self, backbone: Backbone, like: str, longest: int, seed: int = 0):
        self.backbone, self.like, self.seed = backbone, like, seed
        random, tokens = np.random.default_rng(seed), backbone.ordinary_tokens
        # Of each sequence of the long tree: three policies, plain and in every other way.
        passes = 3 * (1 + 4) + ROUNDINGS
        size = sum(p.numel() for p in backbone.parameters())
        affordable = FLOPS.get(backbone.device.type, FLOPS["cpu"]) / (2 * size * passes)
        self.longest = max(8, min(longest, max(32, int(affordable))))
        half = self.longest // 2

        def draw(count: int, like: NDArray[np.int32] = tokens[:0]) -> NDArray[np.int32]:
            drawn = random.choice(tokens, count)
            drawn[: len(like)] = like
            return drawn

        short = min(SHORT, self.longest) // 3
        one, other = draw(short + 1), draw(half)
        self.trees = [  # both begin alike; the second tree's other answer is such a beginning
            Tree(draw(short), (one, draw(short - 1, one[: short // 2]))),
            Tree(draw(self.longest - half), (other, other[: min(3, half)])),
        ]
        self.policies: tuple[str | None, ...] = (*NAMES, None)
        self.sequences = [
            (policy, tree, answer)
            for policy in self.policies
            for tree in self.trees
            for answer in tree.responses
        ]

    @torch.no_grad()
    def run(self) -> dict[str, str]:
        """What is wrong with each way, or nothing.

        Raises:
            InputError: as `verify`.
        """
        backbone, training = self.backbone, self.backbone.training
        cache, cache_reason = backbone.cache, backbone.cache_reason
        backbone.eval()
        packed = last = joint = ""
        whole = backbone.whole_reason
        wrong: dict[str, str] = dict.fromkeys(KINDS[:-1], "")
        try:
            for number, name in enumerate(NAMES):
                backbone.random_adapter(name, self.like, len(NAMES) * self.seed + number)
            self.plain, self.allowed = self._plain()
            if backbone.layout == "packed":
                packed = self._differs(lambda: self._rows("packed"))
                if packed and not whole:
                    backbone.whole_reason = last = packed
                    packed = self._differs(lambda: self._rows("packed"))
            if backbone.layout == "padded" or packed:
                self._must(self._differs(lambda: self._rows("padded")), "padded rows")
            elif backbone.joint_problem() is None:
                joint = self._differs(self._joint)
            if packed:
                wrong["graphs"] = wrong["slots"] = packed
            for kind in KINDS[KINDS.index(cache) :]:
                backbone.cache = cast(Any, kind)
                if kind == "none":
                    self._must(self._differs(self._sampled, STEPS), "answers by recomputation")
                elif not wrong[kind]:
                    wrong[kind] = self._differs(self._sampled, STEPS)
                    if backbone.cache != kind:  # it has given itself up
                        wrong[kind] = backbone.cache_reason
                if not wrong.get(kind):
                    break
        finally:
            backbone.cache, backbone.cache_reason = cache, cache_reason
            backbone.whole_reason = whole
            for name in NAMES:
                if backbone.has_adapter(name):
                    backbone.remove_adapter(name)
            backbone.train(training)
        last = "" if packed else last  # then it is not that which is wrong
        return {"packed": packed, "last": last, "joint": joint or packed, **wrong}

    def _must(self, reason: str, way: str) -> None:
        if reason:
            family = self.backbone.family
            settings = "" if "lora.target" in reason else "; no setting here makes them right"
            raise InputError(
                f"{self.backbone.path}: the log-probs of {way} are not those of transformers and "
                f"PEFT for this model of type {family} ({reason}){settings}"
            )

    def _plain(self) -> tuple[list[Tensor], list[float]]:
        """Log-probs [L] of each sequence, and the root of their mean square that is allowed.

        One policy's scatter stands for all of them, the larger of a tree's answers for both.
        """
        values: list[Tensor] = []
        scatter: dict[int, float] = {}  # by tree
        for policy in self.policies:
            with self.backbone.plain(policy) as hidden_of:
                for _, tree, answer in (s for s in self.sequences if s[0] == policy):
                    ids = torch.from_numpy(np.concatenate([tree.prompt, answer])).long()
                    ids_S = ids.to(self.backbone.device)
                    value_L = self._alone(hidden_of(ids_S[None], None), ids_S, len(answer))
                    values.append(value_L)
                    if policy != NAMES[0]:
                        continue
                    moved_DL = torch.stack(
                        [
                            self._alone(hidden_of(ids_S[None], draw), ids_S, len(answer)) - value_L
                            for draw in range(ROUNDINGS)
                        ]
                    )
                    size = float(moved_DL.square().mean().sqrt())
                    scatter[id(tree)] = max(size, scatter.get(id(tree), 0.0))
        return values, [max(LEAST, MARGIN * scatter[id(tree)]) for _, tree, _ in self.sequences]

    def _alone(self, hidden_1SH: Tensor, ids_S: Tensor, count: int) -> Tensor:
        """Log-probs [L] of the last `count` tokens, from plain hidden states."""
        logits_LV = self.backbone.logits(hidden_1SH[0, -count - 1 : -1])
        return logits_LV.log_softmax(-1).gather(1, ids_S[-count:, None])[:, 0].float()

    def _rows(self, layout: Any) -> list[Tensor]:
        groups = [(policy, self.trees) for policy in self.policies]
        batch = collate(groups, layout=layout).to(self.backbone.device)
        return self._logps(self.backbone(batch), batch)

    def _joint(self) -> list[Tensor]:
        (first, *others) = self.policies
        batch, beside = (
            collate([(p, self.trees) for p in group], layout="packed").to(self.backbone.device)
            for group in ([first], others)
        )
        mine, theirs = self.backbone(batch, beside)
        return self._logps(mine, batch) + self._logps(theirs, beside)

    def _logps(self, hidden_NH: Tensor, batch: Batch) -> list[Tensor]:
        """Token by token, with the kernel that training uses."""
        each = replace(batch, lengths=torch.ones_like(batch.entries))
        found_M = hidden_logps(hidden_NH, self.backbone, each)
        return list(found_M.split(batch.lengths.tolist()))

    def _sampled(self) -> list[Tensor]:
        """Log-probs of the last STEPS tokens, decoded after what comes before them."""
        texts, answers, policies = [], [], []
        for policy, tree, answer in self.sequences:
            whole, steps = np.concatenate([tree.prompt, answer]), min(STEPS, len(answer))
            texts.append(whole[:-steps])
            answers.append(whole[-steps:])
            policies.append({policy: 1.0})
        stepper = Stepper(self.backbone)
        logits_NV = stepper.prefill(texts, policies).logits
        rows = list(range(len(texts)))
        found: list[list[Tensor]] = [[] for _ in texts]
        for step in range(STEPS):
            for row, i in enumerate(rows):
                if step < len(answers[i]):
                    logps_V = logits_NV[row].log_softmax(-1)
                    found[i].append(logps_V[int(answers[i][step])].float())
            if step == STEPS // 2:  # until here what has ended goes on, so that shapes stay
                kept = [row for row, i in enumerate(rows) if step + 1 < len(answers[i])]
                rows = [rows[row] for row in kept]
                stepper.select(kept)
            if not rows or step + 1 == STEPS:
                break
            tokens = [int(answers[i][min(step, len(answers[i]) - 1)]) for i in rows]
            logits_NV = stepper.step(torch.tensor(tokens, device=self.backbone.device)).logits
        return [torch.stack(parts) for parts in found]

    def _differs(self, way: Callable[[], Sequence[Tensor]], last: int | None = None) -> str:
        """What is wrong with a way, or nothing."""
        try:
            found = way()
        except InputError as error:
            return str(error).removeprefix(f"{NOT_JOINT}: ")
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return next(iter(str(error).splitlines()), repr(error))[:100]
        numbers = zip(self.sequences, found, self.plain, self.allowed, strict=True)
        for (policy, tree, answer), mine_L, plain_L, allowed in numbers:
            plain_L = plain_L if last is None else plain_L[-last:]
            error = float((mine_L - plain_L).square().mean().sqrt())
            if not error <= allowed:
                who = "an adapter's" if policy else "the base's"
                tokens = len(tree.prompt) + len(answer)
                return (
                    f"{who} log-probs of a sequence of {tokens} tokens differ by {error:.2g} nats "
                    f"a token, where rounding in this dtype explains {allowed:.2g}"
                )
        return ""
