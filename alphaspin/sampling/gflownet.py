"""A correction of token-level decoding to the exact geometric mixture: GFlowNet fine-tuning.

The target is π(y) ∝ R(y) = Π_i π_i(y)^{w_i} over whole answers y. The sampler q is token-level
decoding of the mixture with what an adapter θ adds to the base, token by token,

    q(v|z) ∝ Π_i π_i(v|z)^{w_i} · π_θ(v|z) / π_base(v|z)        (`stepper.corrected`)

so that the adapter learns only how the flows of what may follow differ, which is less than the
mixture itself by far, and nothing at all at the last token before the cap, where token-level
decoding is exact. An adapter that is q by itself must learn the mixed policies' logits too, which
only the noise of sampled answers teaches it. A token costs a pass for each policy and one more.

Every prefix z of an answer is a state that may end, with the flow F(z) = R(z⊤) / q(⊤|z), and q
samples from π where

    r_i = log R(z_{1:i}⊤) - log q(⊤|z_{1:i}) - Σ_{k<=i} log q(z_k|z_<k)

is the same in all states of all answers to a prompt; it is then log Z(x), also in the empty state:
no separate parameter. The loss is the weighted mean of (r_i - r_j)² over pairs of states
(`alphaspin_kernels.subtb_loss`).

The cap. After `cap` tokens decoding is forced to stop: there log q(⊤|z) = 0, and so is the factor
of ⊤ in R. An answer cut there is the sequence without ⊤, as everywhere in this project.

Several end tokens. Each ends an answer of its own, with its own R, and F(z) is the same for all of
them: R(z e) / q(e|z). The balance is written, in each state, for one e drawn from q(e|z, some end
token), so that all are learned, each as often as it matters. (Their sum in the place of ⊤ would
leave the choice among them untrained.)

Sources: Hu et al., "Amortizing intractable inference in large language models" (2310.04363); Madan
et al. (2209.12782). Unlike the published code: exact boundary at the cap, O(L) loss, one scoring
pass for the rewards of all prefixes, an end token for each state, and the correction.

Shape suffixes: B answers, L tokens, S = L + 1 states, E end tokens, K = 1 + E, N rows (all tokens
of all answers; the state before token k is the row of token k), P policies, H hidden size.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from alphaspin_kernels import linear_logprob, subtb_loss
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alphaspin.foundation import rng
from alphaspin.foundation.artefacts import commit, remove, stands
from alphaspin.foundation.batched import batched
from alphaspin.foundation.runs import Metrics
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import collate
from alphaspin.model.distributed import Team
from alphaspin.model.repeatable import backward
from alphaspin.model.routing import POLICY
from alphaspin.model.stepper import Policy, corrected
from alphaspin.model.tree import Tokens, Tree
from alphaspin.sampling import mixture
from alphaspin.sampling.answer import Answer, Draw
from alphaspin.sampling.decode import Request, decode, invert, uniforms
from alphaspin.sampling.settings import GFlowNetConfig, SamplingConfig
from alphaspin.training.loop import Loop, learning_rate, run

TEMPERATURES = (0.5, 2.0)
WARMUP, ANNEAL = 0.1, 0.5  # shares of the steps
ROWS = 1024  # whose mixed logits are held at once
REPLAY = "replay.safetensors"


@dataclass(frozen=True, slots=True)
class Trajectory:
    """An answer, and log_r_LK [L, K]: Σ_i w_i log π_i of its tokens (column 0) and of every end
    token in their place; fp32 on the CPU."""

    answer: Answer
    log_r_LK: Tensor

    @property
    def reward(self) -> float:
        """log R(y)."""
        return float(self.log_r_LK[:, 0].sum())


@dataclass(frozen=True, slots=True)
class Task:
    """What a sampler is trained for; `folder` gets `adapter/` and, until then, `checkpoints/`.

    weights: adapter name, or None for the base, to weight; they sum to 1. prompts: token ids, all
    different. cap: most tokens of an answer.
    """

    weights: Policy
    prompts: Sequence[Tokens]
    cap: int
    stop_ids: frozenset[int]
    config: GFlowNetConfig
    seed: int
    iteration: int
    stage: str
    folder: Path


# Scoring


def hidden_states(
    backbone: Backbone, names: Sequence[str | None], trees: Sequence[Tree], stop_ids: frozenset[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of policies, in one pass: hidden states [P, N, H] that predict; targets [N, K], each token
    and every end token in its place, in ascending order; each answer token's prediction [M]."""
    batch = collate([(name, trees) for name in names], layout=backbone.layout).to(backbone.device)
    targets_N = batch.targets.view(len(names), -1)[0]
    stops_E = torch.tensor(sorted(stop_ids), device=backbone.device)
    targets_NK = torch.cat([targets_N[:, None], stops_E.expand(len(targets_N), -1)], 1)
    entries_M = batch.entries.view(len(names), -1)[0]
    return backbone(batch).view(len(names), len(targets_N), -1), targets_NK, entries_M


def _logps(backbone: Backbone, hidden_NH: Tensor, targets_NK: Tensor) -> Tensor:
    head = backbone.head
    return linear_logprob(
        hidden_NH,
        head.weight,
        targets_NK,
        bias=head.bias,
        softcap=backbone.softcap,
        temperature=1 / backbone.scale,
    )


def sampler_logps(
    backbone: Backbone, weights: Policy, trees: Sequence[Tree], stop_ids: frozenset[int]
) -> Tensor:
    """log q of each token and of every end token in its place, [M, K] fp32; with a graph to the
    policy adapter, the other policies without one and without dropout."""
    policy = corrected(weights, POLICY)
    fixed = {name: weight for name, weight in policy.items() if name != POLICY and weight}
    backbone.eval()
    with torch.no_grad():
        fixed_PNH, *_ = hidden_states(backbone, list(fixed), trees, stop_ids)
    backbone.train()
    own_PNH, targets_NK, entries_M = hidden_states(backbone, [POLICY], trees, stop_ids)
    weight_P = [*fixed.values(), policy[POLICY]]
    hidden_PNH = torch.cat([fixed_PNH, own_PNH])
    if not backbone.softcap and hidden_PNH.dtype in {torch.float32, torch.float64}:
        mixed_NH = torch.einsum("p,pnh->nh", hidden_PNH.new_tensor(weight_P), hidden_PNH)
        return _logps(backbone, mixed_NH, targets_NK)[entries_M]

    # A capped head is not linear, and a mixed state would be rounded to 16 bits, which the states
    # that the sampler decodes with are not: mix logits, and in the backward pass once more.
    def rows(hidden_PNH: Tensor, targets_NK: Tensor) -> Tensor:
        parts = zip(weight_P, map(backbone.logits, hidden_PNH), strict=True)
        logits_NV = torch.stack([weight * logits_NV for weight, logits_NV in parts]).sum(0)
        return logits_NV.log_softmax(1).gather(1, targets_NK)

    chunks = zip(hidden_PNH.split(ROWS, 1), targets_NK.split(ROWS), strict=True)
    parts = [checkpoint(rows, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(parts)[entries_M]


def tree_of(prompt: Tokens, answers: Sequence[Answer]) -> Tree:
    """A prompt and its answers."""
    return Tree(prompt, tuple(answer.tokens for answer in answers))


@torch.no_grad()
def trajectories(
    backbone: Backbone, task: Task, prompts: Sequence[Tokens], answers: Sequence[Sequence[Answer]]
) -> list[list[Trajectory]]:
    """The answers with their rewards at every prefix: one pass without a graph for all π_i."""
    backbone.eval()
    trees = [tree_of(prompt, group) for prompt, group in zip(prompts, answers, strict=True)]
    hidden_PNH, targets_NK, entries_M = hidden_states(
        backbone, list(task.weights), trees, task.stop_ids
    )
    logps_PNK = torch.stack([_logps(backbone, hidden, targets_NK) for hidden in hidden_PNH])
    weight_P = torch.tensor(list(task.weights.values()), device=logps_PNK.device)
    log_r_MK = torch.einsum("p,pnk->nk", weight_P, logps_PNK)[entries_M].cpu()
    lengths = [len(answer.tokens) for group in answers for answer in group]
    parts = iter(log_r_MK.split(lengths))
    return [[Trajectory(answer, next(parts)) for answer in group] for group in answers]


# The loss


def balance(
    log_q_MK: Tensor,
    log_r_MK: Tensor,
    end_M: Tensor,
    lengths_B: Tensor,
    truncated_B: Tensor,
    lam: float,
) -> Tensor:
    """Sub-trajectory balance of some answers, scalar float64, nats squared.

    Args:
        log_q_MK: log q of the tokens (column 0) and of every end token, with a graph.
        log_r_MK: Σ_i w_i log π_i of the same.
        end_M: which end token stands for ⊤ in each state, from 0.
        lengths_B: tokens of each answer, its end token included.
        truncated_B: bool, whether it was cut at the cap.
        lam: λ.
    """

    def rows(values_M: Tensor) -> Tensor:
        parts = values_M.double().split(lengths_B.tolist())
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)

    def ends(values_MK: Tensor) -> Tensor:
        # One state more than tokens: the forced stop at the cap, where log p(⊤) = 0.
        return torch.nn.functional.pad(rows(values_MK.gather(1, 1 + end_M[:, None])[:, 0]), (0, 1))

    log_r_BL = rows(log_r_MK[:, 0])
    before_LL = torch.ones_like(log_r_BL[:1]).expand(log_r_BL.shape[1], -1).triu()
    sums_BL = log_r_BL @ before_LL  # as cumsum, which on GPUs adds in no order of its own
    log_r_BS = torch.nn.functional.pad(sums_BL, (1, 0)) + ends(log_r_MK)
    # A whole answer's last token is ⊤ itself: it leads to no state.
    states_B = lengths_B - (~truncated_B).long()
    return subtb_loss(rows(log_q_MK[:, 0]), ends(log_q_MK), log_r_BS, states_B, lam)


def pair_weight(states: Sequence[int], lam: float) -> float:
    """Σ_{i<j} λ^(j-i-1) over answers with states 0 … n: the weight of a loss in a larger mean."""
    return sum(sum((n - d) * lam**d for d in range(n)) for n in states)


# Replay


def edit_distance(a: Tokens, b: Tokens) -> int:
    """Levenshtein distance of two token sequences.

    Columns of the table of distances as bit vectors of differences: O(len(b)) operations on
    integers of len(a) bits. Source: Hyyrö, "A bit-vector algorithm for computing Levenshtein and
    Damerau edit distances" (2003), figure 5.
    """
    if not len(a):
        return len(b)
    where: defaultdict[int, int] = defaultdict(int)
    for i, token in enumerate(a):
        where[int(token)] |= 1 << i
    full, top = (1 << len(a)) - 1, 1 << (len(a) - 1)
    rises, falls, distance = full, 0, len(a)  # of the column, downwards
    for token in b:
        equal = where.get(int(token), 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
        right_up, right_down = falls | (full & ~(diagonal | rises)), rises & diagonal
        distance += bool(right_up & top) - bool(right_down & top)
        right_up, right_down = (right_up << 1 | 1) & full, (right_down << 1) & full
        rises, falls = right_down | (full & ~(diagonal | right_up)), right_up & diagonal
    return distance


def _near(one: Trajectory, other: Trajectory, share: float) -> bool:
    a, b = one.answer.tokens, other.answer.tokens
    limit = share * max(len(a), len(b))
    return abs(len(a) - len(b)) <= limit and edit_distance(a, b) <= limit


class Replay:
    """By prompt, the answers with the highest reward, none nearly equal to another."""

    def __init__(self, capacity: int, near: float):
        """Start empty; see `gflownet.replay` and `gflownet.near`."""
        self._capacity, self._near = capacity, near
        self._kept: defaultdict[int, list[Trajectory]] = defaultdict(list)

    def __len__(self) -> int:
        """Answers of all prompts."""
        return sum(map(len, self._kept.values()))

    def add(self, prompt: int, found: Sequence[Trajectory]) -> None:
        """Offer new answers: the best of all stay, save those nearly equal to a better one."""
        kept: list[Trajectory] = []
        # Stable: of equal rewards the older stays.
        for offered in sorted([*self._kept[prompt], *found], key=lambda t: -t.reward):
            if len(kept) < self._capacity and not any(_near(offered, t, self._near) for t in kept):
                kept.append(offered)
        self._kept[prompt] = kept

    def draw(self, prompt: int, count: int, generator: np.random.Generator) -> list[Trajectory]:
        """At most `count` of a prompt's answers, uniformly without repetition."""
        kept = self._kept[prompt]
        return [kept[i] for i in generator.permutation(len(kept))[:count]]

    def save(self, folder: Path) -> None:
        """Write all into a file of its own."""
        entries = [(p, t) for p in sorted(self._kept) for t in self._kept[p]]
        empty = torch.zeros(0, 0)
        tensors = {
            "prompt": torch.tensor([p for p, _ in entries], dtype=torch.int64),
            "length": torch.tensor([len(t.answer.tokens) for _, t in entries], dtype=torch.int64),
            "truncated": torch.tensor([t.answer.truncated for _, t in entries], dtype=torch.bool),
            "tokens": torch.tensor([i for _, t in entries for i in t.answer.tokens]).int(),
            "log_r": torch.cat([t.log_r_LK for _, t in entries] or [empty]),
        }
        save_file(tensors, folder / REPLAY)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self._kept.clear()
        data = load_file(folder / REPLAY)
        lengths = data["length"].tolist()
        for prompt, tokens, cut, log_r in zip(
            data["prompt"].tolist(),
            data["tokens"].split(lengths),
            data["truncated"].tolist(),
            data["log_r"].split(lengths),
            strict=True,
        ):
            answer = Answer(tokens.numpy(), cut)
            self._kept[prompt].append(Trajectory(answer, log_r.clone()))


# Training


def train_sampler(backbone: Backbone, task: Task, metrics: Metrics, team: Team) -> Path:
    """Train the policy adapter to correct the mixture; the folder of the finished adapter.

    Nothing is done where it is there already; else training goes on from the newest checkpoint
    that verifies. The mixture's adapters must be loaded. Several processes do the same work; one of
    them writes.

    Raises:
        TrainingStopped: the loss or the gradient is not finite; raised before the update.
        Interrupted: a signal came; the step was finished and saved.
    """
    done = task.folder / "adapter"
    made_of = {str(name): backbone.adapter_ids[name] for name in task.weights}
    inputs = made_of | {"form": "correction"}  # it once was the sampler by itself
    if not team.from_main(lambda: stands(done, inputs)):
        _train(backbone, task, metrics, team, inputs)
        with team.together():
            if team.main:
                with commit(done, inputs) as temporary:
                    backbone.save_adapter(POLICY, temporary)
    if team.main:
        remove(task.folder / "checkpoints")
    return done


def _train(
    backbone: Backbone, task: Task, metrics: Metrics, team: Team, made_of: dict[str, str]
) -> None:
    config = task.config
    if backbone.has_adapter(POLICY):
        backbone.remove_adapter(POLICY)
    backbone.add_adapter(POLICY, config.lora, seed=task.seed, iteration=task.iteration)
    replay = Replay(config.replay, config.near)
    per_epoch = math.ceil(len(task.prompts) / config.batch_size)
    total = per_epoch * config.epochs

    def gradient(step: int) -> dict[str, float]:
        epoch, batch = divmod(step, per_epoch)
        generator = rng.generator(task.seed, task.iteration, f"gflownet/order/{epoch}")
        order = generator.permutation(len(task.prompts))
        chosen = [*map(int, order[batch * config.batch_size : (batch + 1) * config.batch_size])]
        fresh, replayed = behave(backbone, task, replay, chosen, step)
        temperature = reward_temperature(step, total, config.reward_temperature)
        values = accumulate(backbone, task, chosen, fresh, replayed, temperature, step)
        for prompt, found in zip(chosen, fresh, strict=True):
            replay.add(prompt, found)
        values |= {"reward_temperature": temperature, "replay": float(len(replay))}
        return values | {"stop": float(sum(team.gather(team.interrupted)))}

    loop = Loop(
        task.stage,
        task.folder / "checkpoints",
        config.checkpoint_every,
        total,
        lambda step: learning_rate(step, total, config.lr, WARMUP, "linear"),
        gradient,
        config.clip,
        kept=replay,
        made_of=made_of,
    )
    parameters = backbone.policy_parameters().values()
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    run(team, backbone, optimizer, loop, metrics)


def reward_temperature(step: int, total: int, start: float) -> float:
    """T at step 0 … total-1: from `start` linearly to 1 in the first half, exactly 1 after it."""
    return 1 + (start - 1) * max(0.0, 1 - step / (ANNEAL * total))


def behave(
    backbone: Backbone, task: Task, replay: Replay, chosen: Sequence[int], step: int
) -> tuple[list[list[Trajectory]], list[list[Trajectory]]]:
    """A step's answers by prompt: sampled now (a third of them from q itself, first), replayed."""
    quarter = task.config.answers // 4
    requests: list[Request] = []
    policy = corrected(task.weights, POLICY)
    for prompt in chosen:
        key = (task.seed, task.iteration, f"gflownet/temperature/{step}", prompt)
        warm = rng.generator(*key).uniform(*TEMPERATURES, size=2 * quarter).tolist()
        for k, temperature in enumerate([1.0] * quarter + warm):
            draw = Draw(task.seed, task.iteration, f"gflownet/{step}/{k}", prompt)
            requests.append(Request(task.prompts[prompt], policy, task.cap, draw, temperature))
    sampling = SamplingConfig(batch_size=len(requests))
    answers = decode(backbone, requests, stop_ids=task.stop_ids, config=sampling)
    sampled = list(batched(answers, 3 * quarter))
    fresh = trajectories(backbone, task, [task.prompts[p] for p in chosen], sampled)
    replayed: list[list[Trajectory]] = []
    for prompt in chosen:
        generator = rng.generator(task.seed, task.iteration, f"gflownet/replay/{step}", prompt)
        replayed.append(replay.draw(prompt, quarter, generator))
    return fresh, replayed


def accumulate(
    backbone: Backbone,
    task: Task,
    chosen: Sequence[int],
    fresh: Sequence[Sequence[Trajectory]],
    replayed: Sequence[Sequence[Trajectory]],
    temperature: float,
    step: int,
) -> dict[str, float]:
    """Add the gradient of the step's loss to `.grad`, micro-batch by micro-batch; the metrics."""
    config = task.config
    groups = [[*new, *old] for new, old in zip(fresh, replayed, strict=True)]
    weight = pair_weight([_states(t) for group in groups for t in group], config.lam)
    loss, tokens, log_w = 0.0, 0, list[Tensor]()
    for number, part in enumerate(np.array_split(np.arange(len(chosen)), config.accumulation)):
        if not len(part):
            continue
        batch = [t for i in part for t in groups[i]]
        lengths_B = torch.tensor([len(t.answer.tokens) for t in batch])
        trees = [tree_of(task.prompts[chosen[i]], [t.answer for t in groups[i]]) for i in part]
        key = f"gflownet/dropout/{step}"
        torch.manual_seed(rng.key(task.seed, task.iteration, key, number) % 2**63)
        log_q_MK = sampler_logps(backbone, task.weights, trees, task.stop_ids)
        log_r_MK = torch.cat([t.log_r_LK for t in batch]).to(log_q_MK.device)
        uniform_M = torch.cat([_end_uniforms(task, chosen[i], groups[i], step) for i in part])
        end_M = invert(log_q_MK.detach()[:, 1:].softmax(1), uniform_M.to(log_q_MK.device))
        truncated_B = torch.tensor([t.answer.truncated for t in batch])
        value = balance(
            log_q_MK,
            log_r_MK / temperature,
            end_M,
            lengths_B.to(log_q_MK.device),
            truncated_B.to(log_q_MK.device),
            config.lam,
        )
        share = pair_weight([_states(t) for t in batch], config.lam) / weight
        backward(share * value, backbone)
        loss += share * value.item()
        tokens += len(log_q_MK)
        gap_M = (log_r_MK - log_q_MK.detach())[:, 0].double()
        gap_B = torch.stack([rows.sum() for rows in gap_M.split(lengths_B.tolist())]).cpu()
        counts = [len(groups[i]) for i in part]
        log_w += [gap[: config.answers // 4] for gap in gap_B.split(counts)]
    found = mixture.diagnose(torch.stack(log_w))
    return {
        "loss": loss,
        "tokens": float(tokens),
        "log_w/variance": float(found.spread.mean()),
        "log_w/ess": float(found.size.mean()),
        "log_z": float(found.log_z.mean()),
    }


def _end_uniforms(task: Task, prompt: int, group: Sequence[Trajectory], step: int) -> Tensor:
    """What the end token of each row of a prompt's answers is drawn with."""
    rows = sum(len(t.answer.tokens) for t in group)
    return uniforms(task.seed, task.iteration, f"gflownet/end/{step}", prompt, rows)


def _states(t: Trajectory) -> int:
    return len(t.answer.tokens) - (not t.answer.truncated)
