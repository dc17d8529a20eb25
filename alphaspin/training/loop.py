"""The optimisation loop, of a policy as of a mixture's sampler.

A step is a function of (adapter, optimiser state, step number): the order of examples, dropout and
the learning rate are computed from the step, never carried along. So a checkpoint is the adapter's
and the optimiser's tensors, and a resumed run repeats the very numbers of an uninterrupted one.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from alphaspin.errors import Interrupted, TrainingStopped
from alphaspin.foundation import console
from alphaspin.foundation.runs import Metrics
from alphaspin.model.backbone import Backbone
from alphaspin.model.distributed import Team
from alphaspin.training import checkpoint
from alphaspin.training.checkpoint import Kept
from alphaspin.training.example import REMEDY
from alphaspin.training.watch import Watch


@dataclass(frozen=True, slots=True)
class Loop:
    """What `run` repeats.

    stage: name in the metrics. checkpoints: their folder, one `every` so many of the `total` steps.
    rate: of a step. gradient: adds a step's gradient to `.grad`, which is zero, and gives its
    metrics: at least loss, tokens, and stop, the number of processes that a signal reached; raises
    what must end the run. clip: largest gradient norm, or None. remedy: against log-probs that fall
    together. kept: what a checkpoint holds besides adapter and optimiser. made_of: hashes of what
    the adapter comes from, by name; checkpoints of another origin do not count.
    """

    stage: str
    checkpoints: Path
    every: int
    total: int
    rate: Callable[[int], float]
    gradient: Callable[[int], dict[str, float]]
    clip: float | None
    remedy: str = REMEDY
    kept: Kept | None = None
    made_of: Mapping[str, str] = field(default_factory=dict[str, str])


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


def run(
    team: Team,
    backbone: Backbone,
    optimizer: torch.optim.Optimizer,
    loop: Loop,
    metrics: Metrics,
) -> None:
    """Train the policy adapter in place, resuming from the newest checkpoint that verifies.

    Args:
        team: the processes that share the work; all call this alike.
        backbone: holds the policy's adapter, the same in all processes.
        optimizer: of `Backbone.policy_parameters`, in their order.
        loop: what is repeated.
        metrics: written by one process.

    Raises:
        TrainingStopped: the loss or the gradient is not finite; raised before the update.
        Interrupted: a signal came; the step was finished and saved.
        Elsewhere: one of these was raised in another process.
    """
    parameters = backbone.policy_parameters()
    step = team.from_main(lambda: checkpoint.newest_checkpoint(loop.checkpoints, loop.made_of))
    if step:
        checkpoint.load(backbone, optimizer, loop.kept, loop.checkpoints, step)
    metrics.rewind(loop.stage, step)
    watch = Watch(loop.stage, metrics, loop.remedy)
    watch.restore()
    with console.bar(loop.stage, loop.total, "steps", done=step) as advance:
        while step < loop.total:
            started = time.perf_counter()
            rate = loop.rate(step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            for parameter in parameters.values():  # a batch may hold nothing informative
                parameter.grad = torch.zeros_like(parameter)
            values = loop.gradient(step)
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
                    raise TrainingStopped(f"{loop.stage}: {message}")
            if step == 0 and values.get("pairs/informative"):
                watch.check_gradients(parameters)
            if loop.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters.values(), loop.clip, norm)
            optimizer.step()
            # bitsandbytes writes past it: what was rounded from the weights is of the step before.
            torch.autograd.graph.increment_version(parameters.values())
            step += 1
            values["tokens_per_second"] = values["tokens"] / (time.perf_counter() - started)
            metrics.write(loop.stage, step, values)
            watch.check_rewards(step, values)
            advance(1, int(values["tokens"]))
            if stop or (step % loop.every == 0 and step < loop.total):
                with team.together():
                    if team.main:
                        metrics.keep()
                        checkpoint.save(
                            backbone, optimizer, loop.kept, loop.checkpoints, step, loop.made_of
                        )
                    if stop:
                        raise Interrupted
    metrics.keep()
