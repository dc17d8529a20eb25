"""Token trees to model inputs: prompts computed once, no padding, only targets kept.

A tree is a prompt with one or more responses. In the packed layout all trees stand in one row; the
prompt's tokens stand once, each response follows it and sees the prompt and itself but not its
siblings (see `attention.py`):

    input_ids     p0 p1 p2 c0 c1 r0 r1 r2 p0 p1 c0 …
    position_ids   0  1  2  3  4  3  4  5  0  1  2

In the padded layout each response has a row of its own, with its own copy of the prompt. What
follows it there is not seen by it, whatever mixes the tokens, so that this layout serves any causal
model.

Shapes: R rows, S tokens a row, N targets (response tokens of all sequences), B sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphaspin.model.attention import Places, lay_out
from alphaspin.model.tree import Tree


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of a batch (or rows, in sampling) `start` to `stop` run under `adapter`.

    None is the base.
    """

    adapter: str | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of one forward pass.

    input_ids, position_ids: [R, S] int64. source: [N] int64, index into the flattened [R·S] hidden
    states of the state that predicts each target. targets: [N] int64.
    lengths: [B] int64, targets per sequence; sequences follow the order of the trees and of their
    responses. segments divide the R·S tokens, places are where they stand in attention,
    None in the padded layout.
    """

    input_ids: Tensor
    position_ids: Tensor
    source: Tensor
    targets: Tensor
    lengths: Tensor
    segments: tuple[Segment, ...]
    places: Places | None

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on `device`."""
        names = ("input_ids", "position_ids", "source", "targets", "lengths")
        places = self.places and self.places.to(device)
        return replace(self, **{n: getattr(self, n).to(device) for n in names}, places=places)


def collate(
    groups: Sequence[tuple[str | None, Sequence[Tree]]], *, layout: Literal["packed", "padded"]
) -> Batch:
    """One batch from trees grouped by the adapter they run under.

    Args:
        groups: (adapter or None, trees), each group non-empty; its tokens are contiguous.
        layout: see the module's docstring.

    Raises:
        ValueError: no target token in the whole batch, i.e. nothing that could be trained.
    """
    width = 0  # packed: trees follow each other immediately
    if layout == "padded":
        groups = [
            (name, [Tree(tree.prompt, (answer,)) for tree in trees for answer in tree.responses])
            for name, trees in groups
        ]
        width = max(tree.size() for _, trees in groups for tree in trees)
    segments: list[Segment] = []
    starts: list[int] = []
    at = 0
    for name, trees in groups:
        first = at
        for tree in trees:
            starts.append(at)
            at += width or tree.size()
        segments.append(Segment(name, first, at))
    trees = [tree for _, trees in groups for tree in trees]
    input_ids, position_ids = np.zeros((2, at), np.int64)
    if width:
        position_ids = np.tile(np.arange(width), len(starts))
    source: list[NDArray[np.int64]] = []
    for at, tree in zip(starts, trees, strict=True):
        length = len(tree.prompt)
        parts = (tree.prompt, *tree.responses)
        input_ids[at : at + tree.size()] = np.concatenate(parts)
        begins = [0] + [length] * len(tree.responses)
        position_ids[at : at + tree.size()] = np.concatenate(
            [begin + np.arange(len(part)) for begin, part in zip(begins, parts, strict=True)]
        )
        last_of_prompt = at + length - 1
        at += length
        for answer in tree.responses:
            # Target k is predicted by the state before it: the prompt's last for k = 0.
            before = np.arange(at - 1, at + len(answer) - 1)
            before[:1] = last_of_prompt
            source.append(before)
            at += len(answer)
    targets = [response for tree in trees for response in tree.responses]
    lengths = np.array([len(target) for target in targets], np.int64)
    if not lengths.sum():
        raise ValueError("a batch without a single response token: nothing would be trained")
    shape = (-1, width or len(input_ids))
    return Batch(
        input_ids=torch.from_numpy(input_ids).view(shape),
        position_ids=torch.from_numpy(position_ids).view(shape),
        source=torch.from_numpy(np.concatenate(source)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        lengths=torch.from_numpy(lengths),
        segments=tuple(segments),
        places=None
        if width
        else lay_out(
            [
                (start, len(tree.prompt), [len(response) for response in tree.responses])
                for start, tree in zip(starts, trees, strict=True)
            ],
            len(input_ids),
        ),
    )
