"""Token trees to model inputs: what responses share computed once, no padding, only what predicts.

A tree is a prompt with one or more responses. In the packed layout all trees stand in one row. The
prompt's tokens stand once, and so does what a response begins with as one before it does; each
sees its own history and nothing of its siblings (see `attention.py`). The last token of a response
predicts nothing and is left out, unless another response goes on after it:

    responses     c0 c1 c2 and c0 r1 r2 r3
    input_ids     p0 p1 p2 c0 c1 r1 r2 p0 p1 c0 …
    position_ids   0  1  2  3  4  4  5  0  1  2
    predicted           c0 c1 c2 r2 r3
                           r1

A prediction is a state and the token after it; responses that share it share its log-prob, which
is computed once and counts in each of them. In the last layer the prompt's tokens, but for its
last, are only seen: they have keys and values there, and no more is computed of them.

In the padded layout each response has a row of its own, with its own copy of the prompt. What
follows it there is not seen by it, whatever mixes the tokens, so that this layout serves any causal
model.

Shapes: R rows, S tokens a row, N predictions, B sequences, M targets (response tokens of all
sequences).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphaspin.model.attention import Places, lay_out
from alphaspin.model.tree import Tokens, Tree


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
    states of the state that predicts. targets: [N] int64, what it predicts. entries: [M] int64,
    the prediction of each target of each sequence; sequences follow the order of the trees and of
    their responses. lengths: [B] int64, targets per sequence. segments divide the R·S tokens.
    In the packed layout, places are where the tokens stand in attention, and `last` is what the
    last layer computes; None in the padded one, and `last` where every token predicts.
    """

    input_ids: Tensor
    position_ids: Tensor
    source: Tensor
    targets: Tensor
    entries: Tensor
    lengths: Tensor
    segments: tuple[Segment, ...]
    places: Places | None
    last: "Last | None" = None

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on `device`."""
        names = ("input_ids", "position_ids", "source", "targets", "entries", "lengths")
        moved = {name: getattr(self, name).to(device) for name in names}
        places, last = self.places and self.places.to(device), self.last and self.last.to(device)
        return replace(self, **moved, places=places, last=last)


@dataclass(frozen=True, slots=True)
class Part:
    """Some tokens of a batch, by their index, ascending, and the segments that divide them."""

    tokens: Tensor
    segments: tuple[Segment, ...]

    @staticmethod
    def of(tokens: NDArray[np.int64], segments: Sequence[Segment]) -> "Part":
        """The part of each segment that is among `tokens`."""
        cuts = np.searchsorted(tokens, [0, *(segment.stop for segment in segments)]).tolist()
        names = [segment.adapter for segment in segments]
        return Part(torch.from_numpy(tokens), tuple(map(Segment, names, cuts, cuts[1:])))


@dataclass(frozen=True, slots=True)
class Last:
    """What the last layer computes: of `seen` tokens keys and values, of those `asking` the rest.

    places: of the tokens in this order.
    """

    seen: Part
    asking: Part
    places: Places

    def to(self, device: torch.device) -> "Last":
        """The same on `device`."""
        seen, asking = (replace(p, tokens=p.tokens.to(device)) for p in (self.seen, self.asking))
        return Last(seen, asking, self.places.to(device))


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
    if layout == "padded":
        groups = [
            (name, [Tree(tree.prompt, (answer,)) for tree in trees for answer in tree.responses])
            for name, trees in groups
        ]
    forests = [(name, [*map(_Laid, trees)]) for name, trees in groups]
    width = 0  # packed: trees follow each other immediately
    if layout == "padded":
        width = max(laid.size for _, forest in forests for laid in forest)
    segments: list[Segment] = []
    at = predictions = 0
    parts: list[tuple[int, int, _Laid]] = []  # from which token, from which prediction
    for name, forest in forests:
        first = at
        for laid in forest:
            parts.append((at, predictions, laid))
            at, predictions = at + (width or laid.size), predictions + len(laid.targets)
        segments.append(Segment(name, first, at))
    input_ids, position_ids = np.zeros((2, at), np.int64)
    if width:
        position_ids = np.tile(np.arange(width), len(parts))
    for at, _, laid in parts:
        input_ids[at : at + laid.size] = laid.tokens
        position_ids[at : at + laid.size] = laid.depths
    targets = [laid.targets for *_, laid in parts]
    lengths = np.array([len(entries) for *_, laid in parts for entries in laid.entries], np.int64)
    if not lengths.sum():
        raise ValueError("a batch without a single response token: nothing would be trained")
    source = np.concatenate([at + laid.source for at, _, laid in parts])
    entries = [number + entries for _, number, laid in parts for entries in laid.entries]
    shape, places, last = (-1, width or len(input_ids)), None, None
    if not width:
        sequences = [(at + rows, copies) for at, _, laid in parts for rows, copies in laid.rows]
        places = lay_out(sequences, len(input_ids))
        asking = np.unique(source)
        seen = np.setdiff1d(np.arange(len(input_ids)), asking, assume_unique=True)
        if len(seen):
            both = Part.of(seen, segments), Part.of(asking, segments)
            last = Last(*both, places.asking(both[0].tokens, both[1].tokens))
    return Batch(
        input_ids=torch.from_numpy(input_ids).view(shape),
        position_ids=torch.from_numpy(position_ids).view(shape),
        source=torch.from_numpy(source),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        entries=torch.from_numpy(np.concatenate(entries)),
        lengths=torch.from_numpy(lengths),
        segments=tuple(segments),
        places=places,
        last=last,
    )


class _Laid:
    """A tree's tokens, each once, and its predictions, each once; numbers from 0.

    tokens, depths: [size], those of the prompt first. rows: sequences of them, and how many at the
    start of each are in an earlier one. source, targets: of each prediction. entries: the
    predictions of each response, in its order.
    """

    def __init__(self, tree: Tree):
        length = self.size = len(tree.prompt)
        prompt = np.arange(length)
        paths: list[NDArray[np.int64]] = []  # the rows of each response
        tokens, depths = [tree.prompt], [prompt]
        source, targets = [prompt[:0]], [tree.prompt[:0]]
        self.entries: list[NDArray[np.int64]] = []
        self.rows: list[tuple[NDArray[np.int64], int]] = []
        predictions = 0
        for number, y in enumerate(tree.responses):
            shared, _, like = max(
                ((_common(tree.responses[k], y), len(paths[k]), k) for k in range(number)),
                default=(0, 0, 0),
            )
            path, entries = (paths[like], self.entries[like]) if shared else (prompt[:0],) * 2
            path = path[: min(shared, max(0, len(y) - 1))]
            had, new = len(path), np.arange(self.size, self.size + max(0, len(y) - 1 - len(path)))
            path = np.concatenate([path, new])
            tokens.append(y[had : had + len(new)])
            depths.append(np.arange(length + had, length + had + len(new)))
            states = np.concatenate([prompt[-1:], path])
            source.append(states[shared : len(y)])
            targets.append(y[shared:])
            more = np.arange(predictions, predictions + len(y) - shared)
            self.entries.append(np.concatenate([entries[:shared], more]))
            if len(new) or not self.rows:
                copies = length + had if self.rows else 0
                self.rows.append((np.concatenate([prompt, path]), copies))
            paths.append(path)
            self.size, predictions = self.size + len(new), predictions + len(more)
        self.tokens, self.depths = np.concatenate(tokens), np.concatenate(depths)
        self.source, self.targets = np.concatenate(source), np.concatenate(targets)


def _common(x: Tokens, y: Tokens) -> int:
    """How many tokens two responses begin with alike."""
    unlike = np.flatnonzero(x[: len(y)] != y[: len(x)])
    return int(unlike[0]) if len(unlike) else min(len(x), len(y))
