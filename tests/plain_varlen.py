"""What flash-attn's function for sequences of unlike length computes, in plain operators."""

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Attention [T, A, D] of q [T, A, D], k and v [K, G, D]; sequences are aligned at their end."""
    assert not (dropout_p or alibi_slopes or return_attn_probs or block_table)
    window = (window_size[0], 0) if causal else window_size
    found: list[Tensor] = []
    for q_, k_, v_, seen in sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, window):
        assert len(q_) <= max_seqlen_q and len(k_) <= max_seqlen_k
        scores = scored(q_, k_, softmax_scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        found.append(blend(scores, seen, v_).to(q.dtype))
    return torch.cat(found)


def sequences(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, window: Sequence[int | None]
) -> Generator[tuple[Tensor, ...]]:
    """Queries, keys and values of each, in fp32 at least, and who sees whom."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert int(cu_q[-1]) == len(q) and int(cu_k[-1]) == len(k) == len(v)
    wide = torch.promote_types(q.dtype, torch.float32)
    sizes = cu_q.diff().tolist(), cu_k.diff().tolist(), cu_k.diff().tolist()
    parts = (x.to(wide).split(size) for x, size in zip((q, k, v), sizes, strict=True))
    for q_, k_, v_ in zip(*parts, strict=True):
        at = torch.arange(len(q_))[:, None] + len(k_) - len(q_)
        before = at - torch.arange(len(k_))
        left, right = (len(k_) + len(q_) if w is None or w < 0 else w for w in window)
        repeat = q_.shape[1] // k_.shape[1]
        k_, v_ = (x.repeat_interleave(repeat, 1) for x in (k_, v_))
        yield q_, k_, v_, (before <= left) & (before >= -right)


def scored(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """[A, queries, keys]."""
    return torch.einsum("qad,kad->aqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)


def blend(scores: Tensor, seen: Tensor, v: Tensor) -> Tensor:
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("aqk,kad->qad", weights, v)


def forward(*args: Any, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`torch_attn::_varlen_attn` of torch 2.13, without its sums of exponentials."""
    q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, window, *_ = args
    y = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, scale, causal, tuple(window))
    lse = torch.zeros(q.shape[1], len(q))
    return y, lse, torch.zeros(2, dtype=torch.uint64)


def backward(*args: Any, **_: Any) -> tuple[Tensor, ...]:
    """`torch_attn::_varlen_attn_backward`, by hand: autograd is off where it is called."""
    dy, q, k, v, _out, _lse, cu_q, cu_k, _max_q, _max_k, causal, _state, scale, window = args
    window = (window[0], 0) if causal else window
    scaling = q.shape[-1] ** -0.5 if scale is None else scale
    dys = dy.float().split(cu_q.diff().tolist())
    grads: list[tuple[Tensor, ...]] = []
    for (q_, k_, v_, seen), dy_ in zip(sequences(q, k, v, cu_q, cu_k, window), dys, strict=True):
        scores = scored(q_, k_, scale).masked_fill(~seen, -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)
        dweights = torch.einsum("qad,kad->aqk", dy_, v_)
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scaling
        dv = torch.einsum("aqk,qad->kad", weights, dy_)
        dq, dk = (
            torch.einsum("aqk,kad->qad", dscores, k_),
            torch.einsum("aqk,qad->kad", dscores, q_),
        )
        groups = k.shape[1]
        dk, dv = (x.view(len(x), groups, -1, x.shape[-1]).sum(2) for x in (dk, dv))
        grads.append((dq, dk, dv))
    return tuple(torch.cat(x).to(q.dtype) for x in zip(*grads, strict=True))
