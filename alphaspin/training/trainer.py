"""The optimisation loop of one iteration.

A step is a function of (adapter, optimiser state, step number): the order of examples, dropout and
the learning rate are computed from the step, never carried along. So a checkpoint is the adapter's
and the optimiser's tensors, and a resumed run repeats the very numbers of an uninterrupted one.

Several processes share a step's micro-batches. Each adds up the gradients of its own, one sum over
the processes, of gradients and metrics in one vector, makes them everyone's, and all take the same
optimiser step. Where only an adapter is trained that is all there is to do: a wrapper like DDP sums
buckets as they become ready, which hides the cost of gradients that are large, and would leave the
metrics and the agreement to stop to collectives of their own. A micro-batch and its dropout noise
do not depend on who computes it, so the number of processes changes the order of summation and
nothing else, as long as it divides `train.accumulation`.

Shapes: B examples of a micro-batch, K responses each (2 in self-play: winner, loser).
"""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alphaspin.errors import Interrupted, TrainingStopped
from alphaspin.foundation import console, rng
from alphaspin.foundation.runs import Metrics, commit, remove, verifies
from alphaspin.foundation.section import at
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import collate
from alphaspin.model.distributed import Team
from alphaspin.model.routing import POLICY
from alphaspin.model.scoring import OnlineReference, sequence_logps
from alphaspin.training.example import REMEDY, Example, Objective
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


def total_steps(examples: int, config: TrainConfig) -> int:
    """Optimiser steps of an iteration; the last batch of an epoch may be smaller."""
    steps = math.ceil(examples / config.batch_size) * config.epochs
    return min(steps, config.max_steps or steps)


def learning_rate(
    step: int,
    total: int,
    peak: float,
    warmup: float,
    schedule: Literal["linear", "cosine", "constant"],
) -> float:
    """Rate at step 0 … total-1: a linear rise to the peak on the last warm-up step, then a
    linear or half-cosine fall that would reach 0 at step `total`, or the peak throughout."""
    rising = math.ceil(warmup * total)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    match schedule:
        case "linear":
            return peak * (1 - done)
        case "cosine":
            return peak * (1 + math.cos(math.pi * done)) / 2
        case "constant":
            return peak


def train(
    team: Team,
    backbone: Backbone,
    examples: Sequence[Example],
    job: Job,
    metrics: Metrics,
) -> None:
    """Train the policy adapter in place, resuming from the newest checkpoint that verifies.

    Args:
        team: the processes that share the work; all call this alike.
        backbone: holds the policy's adapter, the same in all processes.
        examples: all of them, in every process.
        job: what to do with them.
        metrics: written by one process.

    Raises:
        TrainingStopped: the loss or the gradient is not finite; raised before the update.
        Interrupted: a signal came; the step was finished and saved.
        Elsewhere: one of these was raised in another process.
    """
    config = job.config
    parameters = backbone.policy_parameters()
    optimizer = _optimizer(parameters, config)
    step = team.from_main(lambda: newest_checkpoint(job.checkpoints))
    if step:
        _load(backbone, optimizer, job.checkpoints, step)
    metrics.rewind(job.stage, step)
    total = total_steps(len(examples), config)
    per_epoch = math.ceil(len(examples) / config.batch_size)
    peak = at(config.lr, job.iteration)
    watch = Watch(job.stage, metrics, job.remedy)
    watch.restore()
    with console.bar(job.stage, total, "steps", done=step) as advance:
        while step < total:
            started = time.perf_counter()
            epoch, batch = divmod(step, per_epoch)
            order = rng.generator(job.seed, job.iteration, f"order/{epoch}").permutation(
                len(examples)
            )
            chosen = order[batch * config.batch_size : (batch + 1) * config.batch_size]
            rate = learning_rate(step, total, peak, config.warmup, config.schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            for parameter in parameters.values():  # a batch may hold nothing informative
                parameter.grad = torch.zeros_like(parameter)
            values = accumulate_gradients(team, backbone, [examples[i] for i in chosen], job, step)
            stop = values.pop("stop") > 0
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in parameters.values() if p.grad is not None]
            )
            values |= {"grad_norm": norm.item(), "learning_rate": rate}
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                message = (
                    f"loss {values['loss']:g}, gradient norm {values['grad_norm']:g} at step "
                    f"{step + 1}: stopped before the update"
                )
                watch.alarm(step + 1, message)
                with team.together():
                    raise TrainingStopped(f"{job.stage}: {message}")
            if step == 0 and values["pairs/informative"]:
                watch.check_gradients(parameters)
            if config.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters.values(), config.clip, norm)
            optimizer.step()
            step += 1
            values["tokens_per_second"] = values["tokens"] / (time.perf_counter() - started)
            metrics.write(job.stage, step, values)
            watch.check_rewards(step, values)
            advance(1, int(values["tokens"]))
            if stop or (step % config.checkpoint_every == 0 and step < total):
                with team.together():
                    if team.main:
                        _save(backbone, optimizer, job.checkpoints, step)
                    if stop:
                        raise Interrupted


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
"""What is summed over a batch; the last four where an example has two responses."""


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
    names = STATISTICS if width == 2 else STATISTICS[:4]
    sums_S = torch.zeros(len(names), device=device)
    # As many micro-batches for each process, and never larger ones than a single process has.
    number = math.ceil(config.accumulation / team.count) * team.count
    parts = [p for p in np.array_split(np.arange(len(informative)), number) if len(p)]
    for first in range(0, len(parts), team.count):
        number = first + team.index
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
            policy = sequence_logps(backbone, batch)
            reference = torch.tensor([e.reference for e in part], device=device)
        else:
            policy, reference = job.online.logps(backbone, batch, trees)
        policy_BK, reference_BK = policy.view(-1, width), reference.view(-1, width)
        extras = torch.tensor([e.extras for e in part], device=device).unbind(1)
        loss_B = objective(policy_BK, reference_BK, lengths_BK, *extras)
        (loss_B.sum() / len(examples) * counts).backward()
        if counts:
            sums_S += _statistics(loss_B, policy_BK, reference_BK, lengths_BK, job.beta)
    stop = torch.tensor([float(team.interrupted)], device=device)
    gradients = [p.grad for p in backbone.policy_parameters().values() if p.grad is not None]
    if team.count > 1:
        total = torch.cat([*(gradient.flatten() for gradient in gradients), sums_S, stop])
        team.sum(total)
        sizes = [gradient.numel() for gradient in gradients]
        *summed, sums_S, stop = total.split([*sizes, len(names), 1])
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
    return values | {"pairs/informative": len(informative) / len(examples), "stop": stop.item()}


def _statistics(
    loss_B: Tensor, policy_BK: Tensor, reference_BK: Tensor, lengths_BK: Tensor, beta: float
) -> Tensor:
    """Sums over a micro-batch, in the order of `STATISTICS`."""
    policy_BK = policy_BK.detach()
    rewards_BK = beta * (policy_BK - reference_BK)
    columns = [loss_B.detach(), lengths_BK.sum(1), rewards_BK[:, 0], policy_BK[:, 0]]
    if policy_BK.shape[1] == 2:
        margins_B = rewards_BK[:, 0] - rewards_BK[:, 1]
        columns += [rewards_BK[:, 1], policy_BK[:, 1], margins_B, margins_B > 0]
    return torch.stack([column.float() for column in columns]).sum(1)


class Watch:
    """Looks for the ways in which self-play is known to go wrong, and says so once each."""

    WINDOW = 10

    def __init__(self, stage: str, metrics: Metrics, remedy: str = REMEDY):
        """Alarms go to the console and into the metrics."""
        self._remedy = remedy
        self._stage = stage
        self._metrics = metrics
        self._rewards: deque[tuple[float, float]] = deque(maxlen=2 * self.WINDOW)
        self._fell = False

    def restore(self) -> None:
        """Pick up where a killed run was, from what it recorded."""
        for record in self._metrics.read():
            if record["stage"] == self._stage:
                if "fall together" in record.get("alarm", ""):
                    self._fell = True
                elif "rewards/rejected" in record:
                    self._rewards.append((record["rewards/chosen"], record["rewards/rejected"]))

    def alarm(self, step: int, text: str) -> None:
        """Print and record one alarm."""
        console.alarm(f"{self._stage}: {text}")
        self._metrics.write(self._stage, step, {"alarm": text})

    def check_gradients(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """At the first step A's gradient is rightly zero where B = 0; B's must not be."""
        idle = [
            name
            for name, parameter in parameters.items()
            if ".lora_B." in name and (parameter.grad is None or not parameter.grad.any())
        ]
        if idle:
            self.alarm(1, f"no gradient reaches {len(idle)} adapter matrices, e.g. {idle[0]}")

    def check_rewards(self, step: int, values: dict[str, float]) -> None:
        """Winners' and losers' log-probs both below the reference and both still falling."""
        if "rewards/rejected" not in values or self._fell:
            return
        self._rewards.append((values["rewards/chosen"], values["rewards/rejected"]))
        if len(self._rewards) < 2 * self.WINDOW:
            return
        pairs = np.array(self._rewards)
        early, late = pairs[: self.WINDOW].mean(0), pairs[self.WINDOW :].mean(0)
        if (late < 0).all() and (late < early).all():
            self._fell = True
            self.alarm(
                step,
                "log-probs of winners and losers fall together (mean rewards "
                f"{late[0]:+.3f} and {late[1]:+.3f}): {self._remedy}",
            )


def _optimizer(
    parameters: dict[str, torch.nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    if config.optimizer == "adamw_8bit":
        from bitsandbytes.optim.adamw import AdamW8bit as kind
    else:
        kind = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[config.optimizer]
    return kind(parameters.values(), lr=0.0, weight_decay=config.weight_decay)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors on the CPU, for safetensors."""
    # `state_dict` nests bitsandbytes' tensors, some of which its parameters share.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{number}.{name}": torch.as_tensor(value).detach().cpu().clone().contiguous()
        for number, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take over what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor | float]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        # bitsandbytes counts steps with a number, torch with a floating-point tensor.
        entry = value.item() if value.dtype == torch.int64 else value
        state.setdefault(int(number), {})[name] = entry
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _save(backbone: Backbone, optimizer: torch.optim.Optimizer, folder: Path, step: int) -> None:
    """A durable checkpoint; the one before it is deleted afterwards."""
    older = list(folder.glob("step-*"))
    with commit(folder / f"step-{step:06d}") as temporary:
        backbone.save_adapter(POLICY, temporary)
        save_file(optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
    for path in older:
        if path.name != f"step-{step:06d}":
            remove(path)


def newest_checkpoint(folder: Path) -> int:
    """The step of the newest checkpoint that verifies, 0 without one."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if verifies(path):
            return int(path.name.removeprefix("step-"))
        console.note(f"{path} does not verify and is passed over")
    return 0


def _load(backbone: Backbone, optimizer: torch.optim.Optimizer, folder: Path, step: int) -> None:
    """Read what `_save` wrote."""
    path = folder / f"step-{step:06d}"
    backbone.load_adapter(POLICY, path)
    load_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
