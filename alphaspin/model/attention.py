"""Attention of packed token trees: every response with what comes before it, and nothing else.

A batch is one row of tokens without padding; all but attention works token by token. For
attention alone each response is laid out with a copy of what it shares with others before it,
sequences of similar length side by side, so that it is plain causal attention without a mask:

    row         p0 p1 p2 w0 w1 l0 l1 l2
    sequences   p0 p1 p2 w0 w1  .
                p0 p1 p2 l0 l1 l2

On a GPU one call of a kernel for sequences of unlike length serves them all (see `varlen`).

transformers takes the function by its name (`AttentionInterface`), hands it the family's scaling,
window and soft cap, and builds no mask for a name that has none.

Shapes: T tokens of the row, M places of all sequences, E places of copies; Q sequences of S places
in a bucket; A heads (G for keys), D width of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from alphaspin.errors import InputError
from alphaspin.model import varlen

TREES = "alphaspin_trees"
WITHOUT_EFFECT = frozenset(
    [
        "is_causal",
        "position_ids",
        "cache_position",
        "deterministic",
        "output_attentions",
        "use_cache",
    ]
)
"""Arguments that other attention functions look at and that change nothing here."""
WASTE = 1 / 8  # largest share of a bucket's places that one more sequence may leave empty


@dataclass(frozen=True, slots=True)
class Places:
    """Where tokens stand in the sequences.

    token: [M] int64, the token at each place (any at a place left empty). home: [T] int64, the
    place whose output is the token's. copies: [E] int64, places at which a token stands again.
    buckets: (Q, S) each, M = Σ Q·S. row: makes the same without places left empty, which CPUs do
    not need.

    Where only the last P of the tokens ask (`asking`), the layer is given these alone, `before` are
    keys and values of the others, and `query` the token of them (from 0) at each place.
    """

    token: Tensor
    home: Tensor
    copies: Tensor
    buckets: tuple[tuple[int, int], ...]
    row: Callable[[], varlen.Row]
    query: Tensor | None = None
    before: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device) -> "Places":
        """The same on `device`."""
        parts = (self.token.to(device), self.home.to(device), self.copies.to(device))
        query = None if self.query is None else self.query.to(device)
        row = self.row
        if device.type == "cuda":
            there = row().to(device)
            row = lambda: there  # noqa: E731
        return Places(*parts, self.buckets, row, query)

    def asking(self, silent: Tensor, asking: Tensor) -> "Places":
        """The same for the tokens in another order: those [T - P] without a query come first."""
        order = torch.cat([silent, asking])
        token = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))[self.token]
        query = (token - len(silent)).clamp(min=0)  # what is not asked for may be anything
        whole = self.row
        row = lambda: whole().asking(silent, asking)  # noqa: E731
        return Places(token, self.home[order], self.copies, self.buckets, row, query)


class Keys(Exception):
    """Keys and values [R, G, S, D] of a layer that was given `KEYS_ONLY`."""


KEYS_ONLY = object()
"""In the place of `Places`: tokens that have keys and values in this layer and nothing more."""


def lay_out(sequences: Sequence[tuple[NDArray[np.int64], int]], tokens: int) -> Places:
    """Places of a row's tokens.

    Args:
        sequences: (its tokens, how many at its start are copies), each token once without copies,
            in the order of the row.
        tokens: T.
    """
    home = np.empty(tokens, np.int64)
    row = partial(varlen.Row.of, sequences)
    sequences = sorted(sequences, key=lambda sequence: -len(sequence[0]))
    token: list[NDArray[np.int64]] = []
    copies: list[NDArray[np.int64]] = []
    buckets: list[tuple[int, int]] = []
    place = 0
    for ids, copied in sequences:
        if not buckets or len(ids) < (1 - WASTE) * buckets[-1][1]:
            buckets.append((0, len(ids)))
        count, width = buckets[-1]
        buckets[-1] = (count + 1, width)
        token.append(ids[np.minimum(np.arange(width), len(ids) - 1)])  # np.pad takes 15 µs
        home[ids[copied:]] = place + np.arange(copied, len(ids))
        copies.append(place + np.arange(copied))
        place += width
    return Places(
        torch.from_numpy(np.concatenate(token)),
        torch.from_numpy(home),
        torch.from_numpy(np.concatenate(copies)),
        tuple(buckets),
        row,
    )


class _Spread(torch.autograd.Function):
    """Tokens [T, …] to places [M, …]; autograd's own backward adds row by row, and is slow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, home: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(token, home, copies)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        token, home, copies = ctx.saved_tensors
        grad = grads[0].index_select(0, home)
        grad.index_add_(0, token[copies], grads[0].index_select(0, copies))
        return grad, None, None, None


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.length = len(x)
        ctx.save_for_backward(index)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        grad = grads[0].new_zeros((ctx.length, *grads[0].shape[1:]))
        return grad.index_copy_(0, index, grads[0]), None


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x[index] of entries that are all different, so that the backward pass adds nothing up."""
    return cast(Tensor, _Pick.apply(x, index))


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    places: Any = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence, for transformers' `AttentionInterface`.

    Args:
        module: the attention layer, not used.
        query: [R, A, S, D], R·S = T tokens.
        key: [R, G, S, D], G a divisor of A.
        value: as `key`.
        attention_mask: None; the model makes none for this function, so that one is the layer's.
        places: of the T tokens, or `KEYS_ONLY`.
        scaling: of the scores; 1/√D where not given.
        sliding_window: tokens see those less than it before them.
        softcap: bound c of the scores, c·tanh(score / c).
        s_aux: [A] attention sinks, a learned score of each head that takes its share of the softmax
            and has no value (gpt-oss, arXiv 2508.10925, section 2.2; 2309.17453).
        kwargs: what other attention functions take; only what leaves the result as it is.

    Returns:
        [R, S, A, D] and None.

    Raises:
        InputError: no places, or an argument that may change the result and is not known here.
        Keys: `KEYS_ONLY` was given.
    """
    del module
    if places is None:
        raise InputError("its attention layers do not hand on the arguments of the model")
    if attention_mask is not None:
        raise InputError("its attention has a mask of its own")
    for name, argument in kwargs.items():
        if name == "is_causal" and argument is False:
            raise InputError("its attention is not causal")
        unset = argument is None or argument is False or (name == "dropout" and not argument)
        if name not in WITHOUT_EFFECT and not unset:
            raise InputError(f"its attention has an argument of its own, {name}")
    if places is KEYS_ONLY:
        raise Keys(key, value)
    assert isinstance(places, Places)
    rows, heads, width = query.shape[:3]
    if places.before is not None:
        key, value = (torch.cat(x, 2) for x in zip(places.before, (key, value), strict=True))
    q_TAD, k_TGD, v_TGD = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    limits = varlen.Limits(scaling, sliding_window, softcap)
    kernel = varlen.choose(q_TAD, k_TGD, v_TGD, limits, s_aux, causal)
    if kernel is not None:
        y_TAD = varlen.attention(kernel, q_TAD, k_TGD, v_TGD, places.row(), limits)
    else:
        y_TAD = _by_length(q_TAD, k_TGD, v_TGD, places, limits, s_aux)
    return y_TAD.view(rows, width, heads, -1), None


def _by_length(
    q: Tensor, k: Tensor, v: Tensor, places: Places, limits: varlen.Limits, sinks: Tensor | None
) -> Tensor:
    """The same, bucket by bucket, of q [T, A, D], k and v [T, G, D]: [T, A, D]."""
    home = places.home[len(places.home) - len(q) :]
    everywhere = (places.token, places.home, places.copies)
    asked = everywhere if places.query is None else (places.query, home, places.copies[:0])
    spread: list[tuple[Tensor, ...]] = []
    sizes = [count * length for count, length in places.buckets]
    for x, where in ((q, asked), (k, everywhere), (v, everywhere)):
        spread.append(cast(Tensor, _Spread.apply(x, *where)).split(sizes))
    outputs: list[Tensor] = []
    for (count, length), *parts in zip(places.buckets, *spread, strict=True):
        q_, k_, v_ = (x.view(count, length, -1, x.shape[-1]).transpose(1, 2) for x in parts)
        y_QASD = causal(q_, k_, v_, limits, sinks)
        outputs.append(y_QASD.transpose(1, 2).flatten(0, 1))
    return pick(torch.cat(outputs), home)


def causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    limits: varlen.Limits,
    sink_A: Tensor | None = None,
) -> Tensor:
    """Causal attention, [Q, A, S, D] of q and v's D."""
    scaling, window, softcap = limits
    length, grouped = q.shape[2], q.shape[1] != k.shape[1]
    plain = not softcap and sink_A is None
    seen = None
    if not plain or (window is not None and window < length):
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        if window is not None:
            seen = seen.triu(1 - window)
    if plain:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=scaling, enable_gqa=grouped
        )
    assert seen is not None
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sink_A is not None:
        sink = sink_A.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return weights[..., :length] @ v


AttentionInterface.register(TREES, attend)
