"""Log-probabilities of packed sequences from hidden states: one sum per sequence.

    lp_b = sum over rows n of sequence b of log_softmax(cap(W hidden_n + bias) / temperature)[y_n]

:func:`linear_logprob` and a segmented sum, ``alphaspin::segment_sum``, whose backward pass hands
the one number per sequence to its rows.

Shape suffixes: N rows, K targets per row, B sequences, C = B + 1 boundaries.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alphaspin_kernels import _dispatch
from alphaspin_kernels.checks import check_boundaries, check_cu_seqlens
from alphaspin_kernels.linear_logprob import linear_logprob


def sequence_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    skip_below: float = 0.0,
    skipped_mass: Tensor | None = None,
) -> Tensor:
    """Return the sum of :func:`linear_logprob` over the rows of each packed sequence.

    Args:
        hidden: [N, H], rows of all sequences, one sequence after the other.
        weight: [V, H], the head.
        targets: [N] or [N, K] int64.
        cu_seqlens: [B + 1] int32 or int64, as FlashAttention's varlen functions take it: sequence b
            has the rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1] - 1``; from 0 to N. May be empty.
        rows: [M] int64, where sequences share rows: sequence b then has those that `rows` has from
            ``cu_seqlens[b]`` to ``cu_seqlens[b + 1] - 1``; from 0 to M.
        bias, softcap, temperature, ignore_index, skip_below, skipped_mass: as in
            :func:`linear_logprob`; ignored targets count 0.

    Returns:
        [B] (or [B, K]) sums in nats, fp32 (float64 for float64 inputs); 0 for an empty sequence.
        Differentiable like :func:`linear_logprob`.

    Raises:
        ValueError: as :func:`linear_logprob`, and for boundaries that do not rise from 0 to N.
    """
    check_cu_seqlens(hidden, cu_seqlens)
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows must be [M] torch.int64, got {[*rows.shape]} {rows.dtype}")
    logp = linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        skip_below=skip_below,
        skipped_mass=skipped_mass,
    )
    if rows is not None:
        logp = logp[rows]
    if targets.dim() == 2:
        return _segment_sum(logp, cu_seqlens)
    return _segment_sum(logp[:, None], cu_seqlens)[:, 0]


def _portable(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums [B, K] of the rows of values [N, K] between the boundaries; the same bits every time."""
    check_boundaries(cu_seqlens, len(values))
    # In float64: hundreds of terms are added.
    sums = torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens.long(), axis=0)
    return sums.to(values.dtype)


def _empty_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return values.new_empty((cu_seqlens.shape[0] - 1, values.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, cu_seqlens = inputs
    ctx.rows = values.shape[0]
    ctx.save_for_backward(cu_seqlens)


def _backward(ctx: Any, grad_BK: Tensor) -> tuple[Tensor, None]:
    (cu_seqlens,) = ctx.saved_tensors
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(grad_BK, lengths, dim=0, output_size=ctx.rows), None


_segment_sum = _dispatch.Operator(
    "segment_sum",
    _portable,
    _empty_sums,
    by="values",
    setup_context=_setup_context,
    backward=once_differentiable(_backward),
)
