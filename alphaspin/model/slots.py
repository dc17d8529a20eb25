"""The sampler's cache of our own: a row of keys and values for each sequence and policy.

Shapes: N sequences, R rows (one per sequence and policy), U rows of a prefill, P tokens of the
longest prompt in it, H hidden size, W width of the cache.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

from alphaspin.foundation import console
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import Segment
from alphaspin.model.graphs import Graphs, rounded
from alphaspin.model.layout import unlike
from alphaspin.model.tree import Tokens

Names = Sequence[str | None]
Rows = list[list[int]]
"""Of each sequence: the row of each of its policies."""
Key = tuple[str | None, bytes]
"""A policy and a prompt."""

BLOCK = 64  # columns; the cache's width is a multiple of it
PREFILL_TOKENS = 16_384  # of one forward pass over prompts, padding included
KINDS = ("graphs", "slots", "own", "none")
"""Values of `Backbone.cache`, in the order in which they are tried; see `caches`."""


class SlotCache(Cache):
    """Keys and values [rows, heads, W, d] of each layer, every row at a position of its own.

    Column k of a row holds the token at position k. Which columns are live is the mask's business:
    what lies beyond a row's position is zero or left over, always finite.
    """

    def __init__(self) -> None:
        """Nothing is allocated before a forward pass has shown the shapes."""
        super().__init__(layers=[])
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._rows = self._width = 0
        self._index: tuple[Any, ...] = ()  # where the coming pass writes: rows, heads, columns
        self._source: Tensor | None = None  # row of that pass for each row that it writes
        self._view = (0, 0)  # rows and columns that the coming pass reads

    def reserve(self, rows: int, width: int) -> None:
        """Make room for this many rows and columns; existing ones keep their contents."""
        if width > self._width:  # by half at least, so that copying stays a small share
            width = -(-max(width, self._width * 3 // 2) // BLOCK) * BLOCK
        rows, width = max(rows, self._rows), max(width, self._width)
        if (rows, width) != (self._rows, self._width):
            for layers in (self._keys, self._values):
                for i, old in enumerate(layers):
                    layers[i] = old.new_zeros(rows, old.shape[1], width, old.shape[3])
                    layers[i][: self._rows, :, : self._width] = old
            self._rows, self._width = rows, width

    def move(self, sources: Tensor, targets: Tensor, width: int) -> None:
        """Copy the first `width` columns of rows to other rows, all at once."""
        for layer in (*self._keys, *self._values):
            layer[targets, :, :width] = layer[sources, :, :width]

    def expect_prompts(self, sources: Tensor, targets: Tensor, width: int) -> None:
        """The coming pass has prompts of `width` columns: its rows `sources` go to `targets`."""
        self._index, self._source = (targets, slice(None), slice(width)), sources

    def expect_tokens(self, positions_R: Tensor, width: int) -> None:
        """The coming pass has one token for each of the first R rows, at these positions."""
        rows = torch.arange(len(positions_R), device=positions_R.device)
        self._index, self._source = (rows, slice(None), positions_R), None
        self._view = (len(positions_R), width)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns; what is stored stays where it is until they change."""
        return self._rows, self._width

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values [R, heads, S, d]; return those that are attended to."""
        del args, kwargs
        result: list[Tensor] = []
        rows, width = self._view
        for layers, new in ((self._keys, key_states), (self._values, value_states)):
            if layer_idx == len(layers):
                shape = (self._rows, new.shape[1], self._width, new.shape[3])
                layers.append(new.new_zeros(shape))
            stored = layers[layer_idx]
            if self._source is not None:  # prompts see nothing but themselves
                stored[self._index] = new[self._source]
                result.append(new)
            else:
                stored[self._index] = new[:, :, 0]
                result.append(stored[:rows, :, :width])
        return result[0], result[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not defined, each row has its own; positions are always given to the model."""
        del layer_idx
        return 0


class Slots:
    """Keys and values in a `SlotCache`: a row for each policy of each sequence, one pass a step.

    For families of which packed trees are right: their layers mix tokens by attention alone.
    """

    def __init__(self, backbone: Backbone):
        """No sequence yet."""
        self._backbone = backbone
        self._cache = SlotCache()
        # Of each sequence: its policies, their rows, the number of tokens so far.
        self._names: list[Names] = []
        self._rows: Rows = []
        self._lengths: NDArray[np.int64] = np.zeros(0, np.int64)
        self._arrange([], [], [])

    def prefill(self, prompts: Sequence[Tokens], names: Sequence[Names]) -> tuple[Tensor, Rows]:
        """Add sequences: prompts [P_i], and the policies of each."""
        first = len(self._names)
        self._arrange(
            [*self._names, *names],
            [*self._rows, *([-1] * len(mine) for mine in names)],
            [*self._lengths.tolist(), *map(len, prompts)],
        )
        owners, prompt_of = wanted(prompts, names)
        hidden: list[Tensor] = []
        rows = [[0] * len(mine) for mine in names]
        number = itertools.count()
        for part in passes_of(sorted(owners, key=lambda key: len(key[1])), prompt_of):
            part.sort(key=lambda key: key[0] or "")
            hidden.append(
                self._prompts(
                    [key[0] for key in part],
                    [prompt_of[key] for key in part],
                    [[self._rows[first + i][c] for i, c in owners[key]] for key in part],
                )
            )
            for key, row in zip(part, number, strict=False):
                for i, c in owners[key]:
                    rows[i][c] = row
        return torch.cat(hidden), rows

    def _prompts(
        self, names: list[str | None], prompts: list[Tokens], rows: list[list[int]]
    ) -> Tensor:
        """The last hidden state of each prompt, [U, H]; keys and values go to its rows."""
        device = self._backbone.device
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        ids = np.zeros((len(prompts), width), np.int64)
        for u, prompt in enumerate(prompts):
            ids[u, : len(prompt)] = prompt
        order_P = torch.arange(width, device=device)
        apart_PP = order_P[:, None] - order_P[None, :]

        def seen(window: int | None) -> Tensor:
            mask_PP = apart_PP >= 0
            if window is not None:
                mask_PP = mask_PP & (apart_PP < window)
            return mask_PP.expand(len(prompts), 1, -1, -1)

        sources = [u for u, mine in enumerate(rows) for _ in mine]
        targets = [row for mine in rows for row in mine]
        self._cache.expect_prompts(
            torch.tensor(sources, device=device), torch.tensor(targets, device=device), width
        )
        hidden_UPH = self._forward(
            segments_of(names), torch.from_numpy(ids).to(device), order_P.expand(ids.shape), seen
        )
        last_U = torch.tensor(lengths, device=device) - 1
        return hidden_UPH[torch.arange(len(prompts), device=device), last_U]

    def step(self, tokens_N: Tensor) -> tuple[Tensor, Rows]:
        """Append one token to each sequence."""
        width = int(self._lengths.max()) + 1
        self._cache.reserve(0, width)
        device = self._backbone.device
        position_R = torch.from_numpy(self._lengths).to(device)[self._sequence_R]
        id_R = tokens_N.to(device, torch.int64)[self._sequence_R]
        hidden_RH = self._tokens(id_R, position_R, width)
        self._lengths = self._lengths + 1
        return hidden_RH, self._rows

    def _tokens(self, id_R: Tensor, position_R: Tensor, width: int) -> Tensor:
        """The hidden states [R, H] of a token for each row, which sees `width` columns at most."""
        columns_W = torch.arange(width, device=id_R.device)

        def seen(window: int | None) -> Tensor:
            mask_RW = columns_W <= position_R[:, None]
            if window is not None:
                mask_RW &= position_R[:, None] - columns_W < window
            return mask_RW[:, None, None]

        self._cache.expect_tokens(position_R, width)
        return self._forward(self._segments, id_R[:, None], position_R[:, None], seen)[:, 0]

    def select(self, indices: Sequence[int]) -> None:
        """Sequence i becomes what sequence `indices[i]` was."""
        self._arrange(
            [self._names[i] for i in indices],
            [self._rows[i] for i in indices],
            self._lengths[list(indices)].tolist(),
        )

    def _arrange(
        self, names: list[Names], origins: list[list[int]], lengths: Sequence[int]
    ) -> None:
        """Give each policy of each sequence a row: those of an adapter together, moving few.

        `origins` are the rows that hold them now, -1 for none.
        """
        members: dict[str | None, list[tuple[int, int]]] = {}
        for i, mine in enumerate(names):
            for c, name in enumerate(mine):
                members.setdefault(name, []).append((i, c))
        rows = [[0] * len(mine) for mine in names]
        sources: list[int] = []
        targets: list[int] = []
        segments: list[Segment] = []
        start = 0
        for name in sorted(members, key=lambda name: name or ""):
            stop = start + self._room(len(members[name]))
            segments.append(Segment(name, start, stop))
            free = dict.fromkeys(range(start, start + len(members[name])))
            start = stop
            movers: list[tuple[int, int]] = []
            for i, c in members[name]:
                if origins[i][c] in free:
                    rows[i][c] = origins[i][c]
                    del free[origins[i][c]]
                else:
                    movers.append((i, c))
            for (i, c), row in zip(movers, free, strict=True):
                rows[i][c] = row
                if origins[i][c] >= 0:
                    sources.append(origins[i][c])
                    targets.append(row)
        device = self._backbone.device
        self._cache.reserve(start, max(lengths, default=0) + 1)
        if sources:
            self._cache.move(
                torch.tensor(sources, device=device),
                torch.tensor(targets, device=device),
                int(max(lengths)),
            )
        self._names, self._rows, self._segments = names, rows, segments
        self._lengths = np.array(lengths, np.int64)
        sequence = np.zeros(start, np.int64)
        for i, mine in enumerate(rows):
            sequence[mine] = i
        self._sequence_R = torch.from_numpy(sequence).to(device)

    def _room(self, rows: int) -> int:
        """Rows for so many; those left over do what the first sequence does, and are not read."""
        return rows

    def _forward(
        self,
        segments: Sequence[Segment],
        ids_RS: Tensor,
        position_RS: Tensor,
        seen: Callable[[int | None], Tensor],
    ) -> Tensor:
        """Hidden states [R, S, H]."""
        return self._backbone.routed(segments)(
            input_ids=ids_RS,
            attention_mask=self._backbone.masks(seen),
            position_ids=position_RS,
            use_cache=True,
            **{self._backbone.cache_name: self._cache},
        ).last_hidden_state


class Replayed(Slots):
    """The same with each step's pass as a CUDA graph, at few numbers of rows and columns.

    Where that fails it gives itself up, for all that comes after it.
    """

    def __init__(self, backbone: Backbone):
        """No sequence, and nothing recorded yet."""
        self._graphs = Graphs(partial(unlike, backbone, what="steps of a CUDA graph and without"))
        self._recorded = (0, 0)
        super().__init__(backbone)

    def _room(self, rows: int) -> int:
        return rounded(rows)

    def _tokens(self, id_R: Tensor, position_R: Tensor, width: int) -> Tensor:
        if self._cache.shape != self._recorded:
            self._recorded = self._cache.shape
            self._graphs.forget()
        width = -(-width // BLOCK) * BLOCK
        work = partial(super()._tokens, width=width)
        if self._backbone.cache == "graphs":
            key = (tuple(self._segments), width)
            try:
                return self._graphs.run(key, work, id_R, position_R)
            except RuntimeError as error:  # what the host looks at, or no memory
                give_up(self._backbone, next(iter(str(error).splitlines()), repr(error))[:100])
                self._graphs.forget()
                console.note(f"no CUDA graphs in sampling: {self._backbone.cache_reason}")
        return work(id_R, position_R)


def segments_of(names: Sequence[str | None]) -> list[Segment]:
    """Runs of equal names."""
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    ends = [*starts[1:], len(names)]
    return [Segment(names[start], start, stop) for start, stop in zip(starts, ends, strict=True)]


def wanted(
    prompts: Sequence[Tokens], names: Sequence[Names]
) -> tuple[dict[Key, list[tuple[int, int]]], dict[Key, Tokens]]:
    """Prompts under policies, each once: who wants it (sequence, which of its policies), and it."""
    owners: dict[Key, list[tuple[int, int]]] = {}
    prompt_of: dict[Key, Tokens] = {}
    for i, (prompt, mine) in enumerate(zip(prompts, names, strict=True)):
        for c, name in enumerate(mine):
            owners.setdefault((name, prompt.tobytes()), []).append((i, c))
            prompt_of[name, prompt.tobytes()] = prompt
    return owners, prompt_of


def passes_of(keys: list[Key], prompts: Mapping[Key, Tokens]) -> list[list[Key]]:
    """Consecutive prompts, ordered by length, cut where a pass would have too many tokens."""
    parts: list[list[Key]] = []
    for key in keys:
        if not parts or (len(parts[-1]) + 1) * len(prompts[key]) > PREFILL_TOKENS:
            parts.append([])
        parts[-1].append(key)
    return parts


def give_up(backbone: Backbone, reason: str) -> None:
    """Go on to the next of `KINDS`, and say why."""
    backbone.cache = cast(Any, KINDS[KINDS.index(backbone.cache) + 1])
    backbone.cache_reason = reason
