"""What is trained on, and what for."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from alphaspin.model.tree import Tree

Objective = Callable[..., Tensor]
"""(lp_θ [B, K], lp_ref [B, K], tokens [B, K], *extras [B, K]) → loss [B]."""

REMEDY = "consider a smaller train.lr"
"""Against log-probs that fall together."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with K responses, and their log-probs under the reference where it is cached.

    `extras` are further numbers per response that the objective takes, K each.
    `informative` is False where the gradient is exactly zero (rejected equals chosen): the
    example counts in the mean of the loss, and is not computed.
    """

    tree: Tree
    reference: tuple[float, ...] = ()
    informative: bool = True
    extras: tuple[tuple[float, ...], ...] = ()
