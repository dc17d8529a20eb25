"""The policy's training in one iteration: batches of examples, and their gradient.

Several processes share a step's micro-batches. Each adds up the gradients of its own, one sum over
the processes, of gradients and metrics in one vector, makes them everyone's, and all take the same
optimiser step. Where only an adapter is trained that is all there is to do: a wrapper like DDP sums
buckets as they become ready, which hides the cost of gradients that are large, and would leave the
metrics and the agreement to stop to collectives of their own. A micro-batch and its dropout noise
do not depend on who computes it, so the number of processes changes the order of summation and
nothing else, as long as it divides `train.accumulation`.

Shapes: B examples of a micro-batch, K responses each (chosen, rejected, and perhaps further ones).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alphaspin.foundation import rng
from alphaspin.foundation.runs import Metrics
from alphaspin.foundation.section import at
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import collate
from alphaspin.model.distributed import Team
from alphaspin.model.repeatable import backward
from alphaspin.model.routing import POLICY
from alphaspin.model.scoring import OnlineReference, Skip, sequence_logps
from alphaspin.training.example import REMEDY, Example, Objective
from alphaspin.training.loop import Loop, learning_rate, run
from alphaspin.training.settings import TrainConfig


@dataclass(frozen=True, slots=True)
class Job:
    """One iteration's training: what `train` needs besides the backbone and the examples."""

    objective: Objective
    config: TrainConfig
    beta: float  # scales the rewards that are logged, see `losses.reward_scale`
    iteration: int
    seed: int
    stage: str
    checkpoints: Path
    remedy: str = REMEDY  # against log-probs that fall together
    online: OnlineReference | None = None  # in place of the examples' references
    made_of: Mapping[str, str] = field(default_factory=dict[str, str])  # see `Loop`


def total_steps(examples: int, config: TrainConfig) -> int:
    """Optimiser steps of an iteration; the last batch of an epoch may be smaller."""
    steps = math.ceil(examples / config.batch_size) * config.epochs
    return min(steps, config.max_steps or steps)


def train(
    team: Team,
    backbone: Backbone,
    examples: Sequence[Example],
    job: Job,
    metrics: Metrics,
) -> None:
    """Train the policy adapter in place, as `loop.run`.

    Args:
        team: the processes that share the work; all call this alike.
        backbone: holds the policy's adapter, the same in all processes.
        examples: all of them, in every process.
        job: what to do with them.
        metrics: written by one process.
    """
    config = job.config
    total = total_steps(len(examples), config)
    per_epoch = math.ceil(len(examples) / config.batch_size)
    peak = at(config.lr, job.iteration)

    def gradient(step: int) -> dict[str, float]:
        epoch, batch = divmod(step, per_epoch)
        generator = rng.generator(job.seed, job.iteration, f"order/{epoch}")
        order = generator.permutation(len(examples))
        chosen = order[batch * config.batch_size : (batch + 1) * config.batch_size]
        return accumulate_gradients(team, backbone, [examples[i] for i in chosen], job, step)

    loop = Loop(
        job.stage,
        job.checkpoints,
        config.checkpoint_every,
        total,
        lambda step: learning_rate(step, total, peak, config.warmup, config.schedule),
        gradient,
        config.clip,
        job.remedy,
        made_of=job.made_of,
    )
    run(team, backbone, _optimizer(backbone.policy_parameters(), config), loop, metrics)


STATISTICS = (
    "loss",
    "tokens",
    "rewards/chosen",
    "logps/chosen",
    "rewards/rejected",
    "logps/rejected",
    "rewards/margins",
    "rewards/accuracies",
)
"""What is summed over a batch; the last four where an example has a rejected response too."""


def accumulate_gradients(
    team: Team, backbone: Backbone, examples: Sequence[Example], job: Job, step: int
) -> dict[str, float]:
    """Add the gradient of the batch's mean loss to `.grad`, micro-batch by micro-batch.

    Each micro-batch contributes (sum of its losses) / (examples in the whole batch), so the result
    does not depend on how the batch is split, nor on who computes what: afterwards `.grad` is the
    whole batch's in all processes.

    Returns:
        The batch's metrics under TRL's names: rewards are β (lp_θ - lp_ref), logps are sums over
        tokens in nats, both over informative pairs; `loss` is the mean over all pairs. `stop`: the
        number of processes that a signal reached.
    """
    config, objective, device = job.config, job.objective, team.device
    backbone.train()
    informative = [example for example in examples if example.informative]
    width = len(examples[0].tree.responses)
    names = STATISTICS if width > 1 else STATISTICS[:4]
    sums_S = torch.zeros(len(names), device=device)
    skip = Skip(config.skip_below, torch.zeros(2, device=device)) if config.skip_below else None
    # As many micro-batches for each process, and never larger ones than a single process has.
    number = math.ceil(config.accumulation / team.world_size) * team.world_size
    parts = [p for p in np.array_split(np.arange(len(informative)), number) if len(p)]
    for first in range(0, len(parts), team.world_size):
        number = first + team.rank
        counts = number < len(parts)
        if not counts and not team.sharded:
            break
        # A pass through a sharded base needs all processes: one without work repeats another's.
        part = [informative[i] for i in parts[number if counts else first]]
        trees = [example.tree for example in part]
        batch = collate([(POLICY, trees)], layout=backbone.layout).to(device)
        lengths_BK = batch.lengths.view(len(part), width)
        # Dropout noise is a function of the step too, not of what was drawn before.
        torch.manual_seed(rng.key(job.seed, job.iteration, f"dropout/{step}", number) % 2**63)
        if job.online is None:
            policy = sequence_logps(backbone, batch, skip if counts else None)
            reference = torch.tensor([e.reference for e in part], device=device)
        else:
            policy, reference = job.online.logps(backbone, batch, trees, skip if counts else None)
        policy_BK, reference_BK = policy.view(-1, width), reference.view(-1, width)
        extras = torch.tensor([e.extras for e in part], device=device).unbind(1)
        loss_B = objective(policy_BK, reference_BK, lengths_BK, *extras)
        backward(loss_B.sum() / len(examples) * counts, backbone)
        if counts:
            sums_S += _statistics(loss_B, policy_BK, reference_BK, lengths_BK, job.beta)
    others = torch.tensor([float(team.interrupted)], device=device)
    others = torch.cat([others, skip.sums]) if skip else others
    gradients = [p.grad for p in backbone.policy_parameters().values() if p.grad is not None]
    if team.world_size > 1:
        total = torch.cat([*(gradient.flatten() for gradient in gradients), sums_S, others])
        team.sum(total)
        sizes = [gradient.numel() for gradient in gradients]
        *summed, sums_S, others = total.split([*sizes, len(names), len(others)])
        for gradient, whole in zip(gradients, summed, strict=True):
            gradient.copy_(whole.view_as(gradient))
    values = dict(zip(names, sums_S.tolist(), strict=True))
    idle = len(examples) - len(informative)
    if idle:
        zeros, ones = torch.zeros(1, width), torch.ones(1, width)
        values["loss"] += objective(zeros, zeros, ones).item() * idle
    if not informative:
        values = {"loss": values["loss"], "tokens": 0.0}
    over = {"loss": len(examples), "tokens": 1}
    values = {name: value / over.get(name, len(informative)) for name, value in values.items()}
    stop, *skipped = others.tolist()
    if skipped and informative:
        values["skipped_mass"] = skipped[0] / skipped[1]
    return values | {"pairs/informative": len(informative) / len(examples), "stop": stop}


def _statistics(
    loss_B: Tensor, policy_BK: Tensor, reference_BK: Tensor, lengths_BK: Tensor, beta: float
) -> Tensor:
    """Sums over a micro-batch, in the order of `STATISTICS`."""
    policy_BK = policy_BK.detach()
    rewards_BK = beta * (policy_BK - reference_BK)
    columns = [loss_B.detach(), lengths_BK.sum(1), rewards_BK[:, 0], policy_BK[:, 0]]
    if policy_BK.shape[1] > 1:
        margins_B = rewards_BK[:, 0] - rewards_BK[:, 1]
        columns += [rewards_BK[:, 1], policy_BK[:, 1], margins_B, margins_B > 0]
    return torch.stack([column.float() for column in columns]).sum(1)


def _optimizer(
    parameters: dict[str, torch.nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    match config.optimizer:
        case "adamw_8bit":
            from bitsandbytes.optim.adamw import AdamW8bit as kind
        case "rmsprop":
            kind = torch.optim.RMSprop
        case "adamw":  # fused: one pass over memory, one launch; the default of transformers too
            kind = partial(torch.optim.AdamW, fused=True)
    return kind(parameters.values(), lr=0.0, weight_decay=config.weight_decay)
