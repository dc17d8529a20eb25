"""When and how the log-probs of the reference are computed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from alphaspin.model.tree import Tree
from alphaspin.training.settings import TrainConfig

if TYPE_CHECKING:
    from alphaspin.methods.session import Session


def choose_mode(
    mode: str, train: TrainConfig, pairs: int, *, sharded: bool, joint: bool
) -> tuple[str, str]:
    """`reference.mode` of an iteration with this many pairs, and why.

    In units of one pass of a pair through previous and base, per pair of the iteration: cached
    costs 1 whatever is trained on; online the number of times that a pair is trained on. At once
    they cost the same, and the cache is kept for later iterations; a sharded base is then better
    gathered once for all three policies. Where there is nothing to cache, so is one in 4 bits,
    which is then dequantised once. `joint`: whether the model's family can do that.
    """
    if mode != "auto":
        return mode, "as configured"
    steps = math.ceil(pairs / train.batch_size) * train.epochs
    uses = min(steps, train.max_steps or steps) * train.batch_size / max(1, pairs)
    if uses < 1:
        joint = joint and (sharded or train.quantization != "none")
        return "joint" if joint else "online", f"only {uses:.0%} of the pairs are trained on"
    if sharded and joint and train.epochs == 1:
        return "joint", "one epoch, and a sharded base is gathered once for three policies"
    return (
        "cached",
        f"each pair is scored once, for {train.epochs} epoch{'s' * (train.epochs > 1)} of training",
    )


def reference_mode(session: Session, pairs: int) -> tuple[str, str]:
    """`reference.mode` with `auto` resolved, and why."""
    config = session.config
    joint = session.backbone.joint_problem() is None
    return choose_mode(
        config.reference.mode, config.train, pairs, sharded=session.team.sharded, joint=joint
    )


def score_reference(session: Session, iteration: int, trees: list[Tree]) -> list[tuple[float, ...]]:
    """lp_ref of (chosen, rejected) for each pair."""
    logps = session.frozen_logps(iteration, trees, session.reference_policies(iteration))
    return [tuple(row) for row in session.mix(*logps).tolist()]
