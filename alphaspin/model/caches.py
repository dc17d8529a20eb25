"""What the sampler keeps of each sequence from step to step, and the passes that use it.

Each way has three calls, `prefill`, `step` and `select`, without gradients. The first two return
the hidden states [R, H] that predict what comes next, and which of these rows belong to each
sequence: one for each policy (an adapter or, None, the base) that it was added with. A sequence
that ends makes room for another, whatever its neighbours are doing.

Shapes: N sequences, R rows (one per sequence and policy), U rows of a prefill, P tokens of the
longest prompt in it, H hidden size, W width of the cache.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import Segment
from alphaspin.model.layout import unlike
from alphaspin.model.slots import (
    KINDS,
    PREFILL_TOKENS,
    Key,
    Names,
    Replayed,
    Rows,
    Slots,
    give_up,
    passes_of,
    segments_of,
    wanted,
)
from alphaspin.model.tree import Tokens


@dataclass
class _Batch:
    """Rows of one length, side by side in one cache of the family's.

    length: tokens of each row. owners: of each row, the sequence and which of its policies; rows
    of one adapter are together, which `segments` says.
    """

    cache: Any
    length: int
    owners: list[tuple[int, int]]
    segments: list[Segment] = field(default_factory=list[Segment])


class Own:
    """The family's own cache, whatever it keeps (keys, states, windows of a convolution).

    A family's code takes rows of one length: each length is a batch of its own, and a step has a
    pass for each. `reorder_cache`, beam search's, drops and repeats rows.
    """

    def __init__(self, backbone: Backbone):
        """No sequence yet."""
        self._backbone = backbone
        self._names: list[Names] = []
        self._rows: Rows = []  # in the order of the batches
        self._batches: list[_Batch] = []

    def prefill(self, prompts: Sequence[Tokens], names: Sequence[Names]) -> tuple[Tensor, Rows]:
        """Add sequences: prompts [P_i], and the policies of each."""
        first, device = len(self._names), self._backbone.device
        self._names += names
        owners, prompt_of = wanted(prompts, names)
        hidden: list[Tensor] = []
        rows = [[0] * len(mine) for mine in names]
        number = itertools.count()

        def length(key: Key) -> int:
            return len(key[1])

        for _, keys in itertools.groupby(sorted(owners, key=length), length):
            for part in passes_of(sorted(keys, key=lambda key: key[0] or ""), prompt_of):
                ids_UP = torch.from_numpy(np.stack([prompt_of[key] for key in part])).long()
                hidden_UPH, cache = self._backbone.own_cache_rows(
                    segments_of([key[0] for key in part]), ids_UP.to(device)
                )
                hidden.append(hidden_UPH[:, -1])
                sources: list[int] = []
                whose: list[tuple[int, int]] = []
                for (u, key), row in zip(enumerate(part), number, strict=False):
                    for i, c in owners[key]:
                        rows[i][c] = row
                        sources.append(u)
                        whose.append((first + i, c))
                self._batches.append(_Batch(cache, ids_UP.shape[1], whose))
                self._keep(self._batches[-1], sources, len(part))
        self._settle()
        return torch.cat(hidden), rows

    def step(self, tokens_N: Tensor) -> tuple[Tensor, Rows]:
        """Append one token to each sequence."""
        ids_N = tokens_N.to(self._backbone.device, torch.int64)
        hidden: list[Tensor] = []
        for batch in self._batches:
            hidden_R1H, batch.cache = self._backbone.own_cache_rows(
                batch.segments,
                ids_N[[i for i, _ in batch.owners], None],
                start=batch.length,
                cache=batch.cache,
            )
            batch.length += 1
            hidden.append(hidden_R1H[:, 0])
        return torch.cat(hidden), self._rows

    def select(self, indices: Sequence[int]) -> None:
        """Sequence i becomes what sequence `indices[i]` was."""
        becomes: dict[int, list[int]] = {}
        for new, old in enumerate(indices):
            becomes.setdefault(old, []).append(new)
        self._names = [self._names[i] for i in indices]
        for batch in self._batches:
            before = batch.owners
            kept = [(u, new, c) for u, (i, c) in enumerate(before) for new in becomes.get(i, ())]
            batch.owners = [(new, c) for _, new, c in kept]
            self._keep(batch, [u for u, _, _ in kept], len(before))
        self._batches = [batch for batch in self._batches if batch.owners]
        self._settle()

    def _settle(self) -> None:
        """Number the rows of all batches, and part each by adapter, until sequences change."""
        self._rows = [[0] * len(mine) for mine in self._names]
        number = itertools.count()
        for batch in self._batches:
            batch.segments = segments_of([self._names[i][c] for i, c in batch.owners])
            for (i, c), row in zip(batch.owners, number, strict=False):
                self._rows[i][c] = row

    def _keep(self, batch: _Batch, sources: list[int], count: int) -> None:
        """Row r of a cache of `count` rows becomes what row `sources[r]` was."""
        if sources and sources != list(range(count)):
            batch.cache.reorder_cache(torch.tensor(sources, device=self._backbone.device))


class Recomputed:
    """The tokens alone, all of them in each pass: slow, and exact where a single sequence is.

    For families whose own cache cannot serve: one sequence a row, as the padded layout has it.
    """

    def __init__(self, backbone: Backbone):
        """No sequence yet."""
        self._backbone = backbone
        self._texts: list[Tokens] = []
        self._names: list[Names] = []

    def prefill(self, prompts: Sequence[Tokens], names: Sequence[Names]) -> tuple[Tensor, Rows]:
        """Add sequences: prompts [P_i], and the policies of each."""
        self._texts += prompts
        self._names += names
        return self._last(prompts, names)

    def step(self, tokens_N: Tensor) -> tuple[Tensor, Rows]:
        """Append one token to each sequence."""
        new = tokens_N.cpu().numpy().astype(np.int32)
        self._texts = [np.append(old, token) for old, token in zip(self._texts, new, strict=True)]
        return self._last(self._texts, self._names)

    def select(self, indices: Sequence[int]) -> None:
        """Sequence i becomes what sequence `indices[i]` was."""
        self._texts = [self._texts[i] for i in indices]
        self._names = [self._names[i] for i in indices]

    def _last(self, texts: Sequence[Tokens], names: Sequence[Names]) -> tuple[Tensor, Rows]:
        """The last hidden state of each text under each of its policies."""
        asked = [(name or "", i, c) for i, mine in enumerate(names) for c, name in enumerate(mine)]
        hidden: list[Tensor] = []
        rows = [[0] * len(mine) for mine in names]
        order = sorted(asked)
        for row, (_, i, c) in enumerate(order):
            rows[i][c] = row
        most = max(1, PREFILL_TOKENS // max(map(len, texts), default=1))
        for start in range(0, len(order), most):
            part = order[start : start + most]
            ids = np.zeros((len(part), max(len(texts[i]) for _, i, _ in part)), np.int64)
            for line, (_, i, _) in zip(ids, part, strict=True):
                line[: len(texts[i])] = texts[i]
            last = [len(texts[i]) - 1 for _, i, _ in part]
            segments = segments_of([names[i][c] for _, i, c in part])
            ids_RS = torch.from_numpy(ids).to(self._backbone.device)
            hidden.append(self._backbone.plain_rows(segments, ids_RS)[range(len(part)), last])
        return torch.cat(hidden), rows


CACHES = dict(zip(KINDS, (Replayed, Slots, Own, Recomputed), strict=True))
"""By `Backbone.cache`."""


@torch.no_grad()
def choose(backbone: Backbone) -> None:
    """Set `backbone.cache` to the first of `CACHES`, from where it is, that is right."""
    while (tried := backbone.cache) != "none":
        problem = _problem(backbone, CACHES[tried](backbone))
        if problem:
            give_up(backbone, problem)
        if backbone.cache == tried:
            break


def _problem(backbone: Backbone, kept: Slots | Own | Recomputed) -> str:
    """What is wrong with a way for the base's answers to two prompts, or nothing."""
    random, tokens = np.random.default_rng(2), backbone.ordinary_tokens[:64]
    texts = [random.choice(tokens, n) for n in (6, 9)]
    last = torch.from_numpy(random.choice(tokens, (3, 3))).long()
    picks = [1, 0, 1]
    try:
        kept.prefill(texts, [[None], [None]])
        kept.select(picks)
        kept.step(last[:, 0])
        kept.step(last[:, 1])
        hidden_RH, rows = kept.step(last[:, 2])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return f"it has no cache that could be used ({next(iter(str(error).splitlines()), '')})"
    expected: list[Tensor] = []
    for pick, tail_3 in zip(picks, last, strict=True):
        ids_S = torch.cat([torch.from_numpy(texts[pick]).long(), tail_3]).to(backbone.device)
        expected.append(backbone.plain_hidden(ids_S[None])[0, -1])
    found_3H = hidden_RH[[row for (row,) in rows]]
    expected_3H = torch.stack(expected).float()
    return unlike(backbone, found_3H.float(), expected_3H, "tokens with its cache and without")
