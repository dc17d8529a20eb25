"""Token trees to model inputs: prompts computed once, several trees to a row, only targets kept.

A tree is a prompt with one or more responses. In the packed layout the prompt's tokens stand once,
each response follows it and sees the prompt and itself but not its siblings:

    row    p0 p1 p2 w0 w1 l0 l1 l2 | p0 p1 w0 …
    branch  0  0  0  1  1  2  2  2 |  0  0  1
    depth   0  1  2  3  4  3  4  5 |  0  1  2        (position ids)

so a token attends to earlier tokens of its tree on branch 0 or on its own branch. In the padded
layout each response has a row of its own, with its own copy of the prompt: the same rule, applied
to trees with one response.

Shapes: R rows, S tokens a row, N targets (response tokens of all sequences), Q sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and its responses, as token ids [P] and [L_1], [L_2], … (int32)."""

    prompt: Tokens
    responses: tuple[Tokens, ...]

    def size(self) -> int:
        """Tokens when the prompt stands once."""
        return len(self.prompt) + sum(len(response) for response in self.responses)


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start` to `stop` of a batch run under `adapter`; None is the base."""

    adapter: str | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of one forward pass.

    input_ids, depth: [R, S] int64; depth is the position id. tree, branch: [R, S] int64, tree -1 on
    padding. source: [N] int64, index into the flattened [R·S] hidden states of the state that
    predicts each target. targets: [N] int64. lengths: [Q] int64, targets per sequence; sequences
    follow the order of the trees and of their responses.
    """

    input_ids: Tensor
    depth: Tensor
    tree: Tensor
    branch: Tensor
    source: Tensor
    targets: Tensor
    lengths: Tensor
    segments: tuple[Segment, ...]

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on `device`."""
        tensors = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "depth", "tree", "branch", "source", "targets", "lengths")
        }
        return replace(self, **tensors)

    def attention(self, window: int | None = None) -> Tensor:
        """Who sees whom, [R, 1, S, S] bool; with a sliding window, tokens less than it apart.

        Every token sees itself, padding too, so that no row of the softmax is empty.
        """
        order = torch.arange(self.tree.shape[1], device=self.tree.device)
        query, key = self.tree[:, :, None], self.tree[:, None, :]
        branch_q, branch_k = self.branch[:, :, None], self.branch[:, None, :]
        seen = (query == key) & ((branch_k == 0) | (branch_k == branch_q))
        seen &= order[:, None] >= order[None, :]
        if window is not None:
            seen &= self.depth[:, :, None] - self.depth[:, None, :] < window
        # Padding (tree -1) would otherwise attend to padding: harmless, but it costs exactness of
        # comparisons between layouts nothing to cut it off.
        seen &= (query >= 0) | (order[:, None] == order[None, :])
        return seen[:, None]


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: indices of items by row; one beyond the capacity has its own row."""
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        row = next((r for r, free in enumerate(room) if free >= sizes[item]), None)
        if row is None:
            rows.append([])
            room.append(max(capacity, sizes[item]))
            row = len(rows) - 1
        rows[row].append(item)
        room[row] -= sizes[item]
    return rows


def collate(
    groups: Sequence[tuple[str | None, Sequence[Tree]]],
    *,
    layout: Literal["packed", "padded"],
    row_tokens: int,
) -> Batch:
    """One batch from trees grouped by the adapter they run under.

    Args:
        groups: (adapter or None, trees), each group non-empty; its rows are contiguous.
        layout: see the module's docstring.
        row_tokens: capacity of a packed row.

    Raises:
        ValueError: no target token in the whole batch, i.e. nothing that could be trained.
    """
    if layout == "padded":
        groups = [
            (name, [Tree(tree.prompt, (answer,)) for tree in trees for answer in tree.responses])
            for name, trees in groups
        ]
        row_tokens = 0  # every tree is beyond the capacity and gets its own row
    rows: list[list[tuple[int, Tree]]] = []  # (number of the tree's first sequence, tree)
    segments: list[Segment] = []
    sequences = 0
    for name, trees in groups:
        first: list[int] = []
        for tree in trees:
            first.append(sequences)
            sequences += len(tree.responses)
        packed = pack([tree.size() for tree in trees], row_tokens)
        segments.append(Segment(name, len(rows), len(rows) + len(packed)))
        rows += [[(first[i], trees[i]) for i in row] for row in packed]

    width = max(sum(tree.size() for _, tree in row) for row in rows)
    input_ids, depth, branch = (np.zeros((len(rows), width), np.int64) for _ in range(3))
    tree_id = np.full((len(rows), width), -1, np.int64)
    source: list[NDArray[np.int64] | None] = [None] * sequences
    targets: list[Tokens | None] = [None] * sequences
    for r, row in enumerate(rows):
        at = 0
        for number, (sequence, tree) in enumerate(row):
            length = len(tree.prompt)
            tree_id[r, at : at + tree.size()] = number
            input_ids[r, at : at + length] = tree.prompt
            depth[r, at : at + length] = np.arange(length)
            last_of_prompt = at + length - 1
            at += length
            for offset, answer in enumerate(tree.responses):
                span = slice(at, at + len(answer))
                input_ids[r, span] = answer
                depth[r, span] = length + np.arange(len(answer))
                branch[r, span] = offset + 1
                # Target k is predicted by the state before it: the prompt's last for k = 0.
                before = np.arange(at - 1, at + len(answer) - 1)
                before[:1] = last_of_prompt
                source[sequence + offset] = r * width + before
                targets[sequence + offset] = answer
                at += len(answer)
    lengths = np.array([len(target) for target in targets if target is not None], np.int64)
    assert len(lengths) == sequences
    if not lengths.sum():
        raise ValueError("a batch without a single response token: nothing would be trained")
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        depth=torch.from_numpy(depth),
        tree=torch.from_numpy(tree_id),
        branch=torch.from_numpy(branch),
        source=torch.from_numpy(np.concatenate([s for s in source if s is not None])),
        targets=torch.from_numpy(
            np.concatenate([t for t in targets if t is not None]).astype(np.int64)
        ),
        lengths=torch.from_numpy(lengths),
        segments=tuple(segments),
    )
