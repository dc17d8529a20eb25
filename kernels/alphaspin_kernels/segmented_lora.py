"""A frozen linear layer with LoRA adapters, a different one for each segment of the rows.

With rows laid out in segments s = policy, previous, base, ...,

    y[s] = x[s] W^T + bias + scaling_s (drop(x[s]) A_s^T) B_s^T

reads W once for all of them; a segment without an adapter (the base) has the first terms only, and
drop is the identity but for the policy. The policy is the first segment, and it alone is trained:

    dx = dy W + scaling drop'(dy B A)
    dA = scaling (dy B)^T drop(x)
    dB = scaling dy^T (drop(x) A^T)

over its rows, for which a copy of drop(x) is all that is kept; a view would keep every row of x.
Where there are no other rows, x itself is kept, which the layers that share it share, and on a GPU
its zeros, a hash, are computed again.

Beside x in bf16 on a GPU all these products have factors in bf16, sums in fp32, and gradients of A
and B in the dtype of A and B, as under autocast.

One operator, ``alphaspin::segmented_lora``: the portable version below, Triton kernels for CUDA.

Shape suffixes: N rows, P rows of the policy, S rows of a segment, I and O width in and out, R rank,
T columns of one tile.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from alphaspin_kernels import _dispatch
from alphaspin_kernels.checks import (
    Adapter,
    accumulation_dtype,
    check_segmented_lora,
    dropout_mask,
)
from alphaspin_kernels.numerics import part, segment_pairs, without_autocast

TILE = 512  # columns of 16-bit results that are summed in fp32 at a time


def segmented_lora(
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[Adapter],
    segments: Sequence[int],
    scaling: float | Sequence[float],
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    again: Callable[[], Tensor] | None = None,
    rounded: Sequence[Adapter] | None = None,
) -> Tensor:
    """Apply a frozen linear layer to all rows, and to each segment's rows that segment's adapter.

    The low-rank products are summed in fp32 (float64 for float64 inputs), and so is their result
    with x W^T before it is rounded to the dtype of x, except on CPUs that multiply 16-bit numbers
    natively: there x W^T is rounded by itself first. Autocast changes nothing.

    Args:
        x: [N, I], bf16, fp16, fp32 or float64; any strides.
        weight: [O, I], frozen, same dtype and device.
        adapters: one per segment: (A [r, I], B [O, r]), in the dtype of x or fp32, or None. Ranks
            and dtypes may differ between adapters.
        segments: numbers of rows, 0 allowed, that add up to N. The first is the policy's.
        scaling: of the update, alpha / r; one number, or one per segment.
        bias: [O] or None, frozen, same dtype and device.
        dropout: probability in [0, 1) with which an entry of the policy's x is 0 in its update; the
            others are divided by 1 - dropout. No other segment has dropout.
        seed: 64-bit; which entries are dropped is a function of (seed, row, column).
        again: makes `weight` once more, for the backward pass, which then does not keep it: for a
            weight that is stored in another form, such as 4 bits.
        rounded: where :func:`rounds` says so, the adapters in the dtype of x, of a caller who
            rounds them once for many calls. They are multiplied, `adapters` get the gradients.

    Returns:
        [N, O], dtype of x. Differentiable once, in x (0 for rows after the policy's) and in the
        policy's A and B.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, row counts that do not add
            up to N, a dropout outside [0, 1), or weight, bias or another segment's adapter that
            requires grad while gradients are enabled.

    Source: Hu et al., "LoRA" (2021), equation 3; rows of several adapters in one product as in
    Chen et al., "Punica" (2023).
    """
    scalings = check_segmented_lora(x, weight, adapters, segments, scaling, bias, dropout, seed)
    policy = adapters[0]
    a, b = (None, None) if policy is None else policy
    trained = policy is not None and (policy[0].requires_grad or policy[1].requires_grad)
    near: list[Tensor] = []
    if rounds(x):
        adapters = [_rounded(s, pair, x.dtype, rounded) for s, pair in enumerate(adapters)]
        near = list(adapters[0] or ())
    others = [pair for pair in adapters[1:] if pair is not None]
    slots = itertools.count()
    inputs = (
        x,
        weight,
        bias,
        a,
        b,
        near,
        [pair[0] for pair in others],
        [pair[1] for pair in others],
        list(segments),
        [-1, *(-1 if pair is None else next(slots) for pair in adapters[1:])],
        [float(value) for value in scalings],
        float(dropout) if a is not None else 0.0,
        seed,
        # Without other rows x itself can be kept, if its zeros can be had again for little.
        trained
        and torch.is_grad_enabled()
        and (len(segments) > 1 or (dropout > 0 and not _on_gpu(x))),
    )
    y_NO, _ = _segmented_lora(*inputs) if again is None else _Remade.apply(*inputs, again)
    return y_NO


def rounds(x: Tensor) -> bool:
    """Whether the adapters of x are rounded to its dtype, bf16."""
    return x.dtype == torch.bfloat16 and _on_gpu(x)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda or (not torch.compiler.is_compiling() and _dispatch.interpreting())


def _rounded(s: int, pair: Adapter, dtype: torch.dtype, given: Sequence[Adapter] | None) -> Adapter:
    """Adapter s in the dtype of x, from the caller or made here."""
    if pair is None:
        return None
    if given is None:
        return (pair[0].detach().to(dtype), pair[1].detach().to(dtype))
    near = given[s]
    if near is None or any(
        n.shape != m.shape or n.dtype != dtype or n.device != m.device
        for n, m in zip(near, pair, strict=True)
    ):
        raise ValueError(f"rounded[{s}] must be adapter {s} in {dtype}")
    return near


def _portable(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    near: list[Tensor],
    others_a: list[Tensor],
    others_b: list[Tensor],
    segments: list[int],
    slots: list[int],
    scaling: list[float],
    dropout: float,
    seed: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Portable version. Returns (y [N, O], the policy's x with 0 where dropped [P, I] or [0, I]).

    `a` and `b` are the policy's, `near` what is multiplied in their place, if not they themselves;
    `slots` says which of the others a segment has, or -1.
    The division by 1 - dropout is left to scalar factors, so that what is kept is not rounded.
    """
    a, b = near or (a, b)
    dtype, (height, width) = accumulation_dtype(x.dtype), weight.shape
    kept_PI = x.new_empty((segments[0] if keep else 0, width))
    updates: list[tuple[slice, Tensor, Tensor]] = []  # rows, scaling drop(x) A^T, B
    with without_autocast(x):
        native = multiplies_natively(x)
        wide_NI = x if native else _wide(x, dtype)
        for s, (rows, pair) in enumerate(segment_pairs(a, b, others_a, others_b, segments, slots)):
            x_SI, factor = part(wide_NI, rows), scaling[s]
            if s == 0 and dropout:
                mask_SI = dropout_mask(len(x_SI), range(width), dropout, seed, x.device)
                x_SI, factor = x_SI.where(mask_SI, 0.0), factor / (1 - dropout)
            if s == 0 and keep:
                kept_PI.copy_(x_SI)
            if pair is not None:
                low_SR = linear(_wide(x_SI, dtype), _wide(pair[0], dtype)).mul_(factor)
                updates.append((rows, low_SR, _wide(pair[1], dtype)))
        if native:
            y_NO = linear(x, weight, bias)
            for rows, low_SR, b_OR in updates:
                if x.dtype == dtype:
                    part(y_NO, rows).addmm_(low_SR, b_OR.T)
                else:
                    for y_TO, low_TR in zip(
                        y_NO[rows].split(TILE), low_SR.split(TILE), strict=True
                    ):
                        y_TO += low_TR @ b_OR.T
        else:
            y_NO = x.new_empty((len(x), height))
            for start in range(0, height, TILE):
                tile = slice(start, start + TILE)
                bias_T = None if bias is None else bias[tile].to(dtype)
                y_NT = linear(wide_NI, weight[tile].to(dtype), bias_T)
                for rows, low_SR, b_OR in updates:
                    y_NT[rows].addmm_(low_SR, b_OR[tile].T)
                y_NO[:, tile] = y_NT
    return y_NO, kept_PI


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype: what ``to`` does, in a quarter of its time where that is nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def multiplies_natively(x: Tensor) -> bool:
    """Whether PyTorch multiplies this dtype fast: on CPUs, 16 bits need AVX-512 or better.

    Elsewhere its 16-bit products were measured 8 times slower than converting tiles to fp32.
    """
    if x.is_cuda or x.dtype in (torch.float32, torch.float64):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _empty_outputs(
    x: Tensor, weight: Tensor, segments: list[int], keep: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty((x.shape[0], weight.shape[0])),
        x.new_empty((segments[0] if keep else 0, x.shape[1])),
    )


def _portable_backward(
    grad: Tensor,
    kept: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    rows: int,
    scaling: float,
    dropout: float,
    seed: int,
    dropped: bool,
    wide: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB) from the gradient of y's first `rows` rows; empty where not needed.

    `dropped` says whether `kept` has the zeros of dropout already, `wide` whether the gradients of
    a and b are in fp32.
    """
    needs_x, needs_a, needs_b = needs
    dtype, factor = accumulation_dtype(grad.dtype), scaling / (1 - dropout)
    dy_PO, low_PR = part(grad, slice(0, rows)), None
    dx_NI = da_RI = db_OR = None
    with without_autocast(grad):
        if a is not None and b is not None:
            result = torch.float32 if wide else a.dtype
            wide_PO, wide_RI = _wide(dy_PO, dtype), _wide(a, dtype)
            low_PR = (wide_PO @ _wide(b, dtype)).mul_(factor)
            if dropout and not dropped and (needs_a or needs_b):
                mask_PI = dropout_mask(rows, range(kept.shape[1]), dropout, seed, kept.device)
                kept = kept.where(mask_PI, 0.0)
            if needs_a:
                da_RI = _wide(low_PR.T @ _wide(kept, dtype), result)
            if needs_b:
                up_PR = linear(_wide(kept, dtype), wide_RI)
                db_OR = _wide((wide_PO.T @ up_PR).mul_(factor), result)
        if needs_x:
            dx_NI = _input_gradient(dy_PO, weight, low_PR, a, dropout, seed)
            if rows < len(grad):
                dx_NI = pad(dx_NI, (0, 0, 0, len(grad) - rows))
    dx, da, db = (grad.new_empty((0,)) if g is None else g for g in (dx_NI, da_RI, db_OR))
    return dx, da, db


def _empty_gradients(
    grad: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    wide: bool,
    needs: list[bool],
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """What is not needed is empty."""

    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None or not needed:
            return grad.new_empty((0,))
        return tensor.new_empty(tensor.shape, dtype=torch.float32 if wide else tensor.dtype)

    needs_x, needs_a, needs_b = needs
    x_shape = (grad.shape[0], weight.shape[1])
    dx_NI = grad.new_empty(x_shape if needs_x else (0,))
    return dx_NI, like(a, needs_a), like(b, needs_b)


def _input_gradient(
    dy_PO: Tensor,
    weight_OI: Tensor,
    low_PR: Tensor | None,
    a_RI: Tensor | None,
    dropout: float,
    seed: int,
) -> Tensor:
    """dy W + mask (low A) [P, I], rounded once; low = scaling dy B / (1 - p)."""
    dtype, width = accumulation_dtype(dy_PO.dtype), weight_OI.shape[1]
    factor_PO = dy_PO if multiplies_natively(dy_PO) else _wide(dy_PO, dtype)
    # One product where nothing has to be made wide in tiles, and one tile needs no slices.
    size = width if dtype == dy_PO.dtype and not dropout else TILE
    tiles: list[Tensor] = []
    for start in range(0, max(width, 1), max(size, 1)):
        whole, tile = size >= width, slice(start, start + size)
        weight_OT = _wide(weight_OI if whole else weight_OI[:, tile], factor_PO.dtype)
        dx_PT = _wide(factor_PO @ weight_OT, dtype)
        if low_PR is not None and a_RI is not None:
            a_RT = _wide(a_RI if whole else a_RI[:, tile], dtype)
            if dropout:
                columns = range(start, start + a_RT.shape[1])
                mask_PT = dropout_mask(len(dx_PT), columns, dropout, seed, dx_PT.device)
                dx_PT += (low_PR @ a_RT).where(mask_PT, 0.0)
            else:
                dx_PT.addmm_(low_PR, a_RT)
        tiles.append(_wide(dx_PT, dy_PO.dtype))
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, 1)


_segmented_lora_backward = _dispatch.Operator(
    "segmented_lora_backward", _portable_backward, _empty_gradients, by="grad"
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, a, b, near, others, _, segments, _, scaling, ctx.dropout, ctx.seed, keep = inputs
    kept = output[1]
    ctx.mark_non_differentiable(kept)
    ctx.rows, ctx.scaling, ctx.lists = segments[0], scaling[0], (len(near), len(others))
    ctx.dropped, ctx.wide = keep, bool(near) and a.dtype == torch.float32
    if not keep and any(ctx.needs_input_grad[3:5]):
        kept = x
    ctx.save_for_backward(kept, weight, *(near or (a, b)))


# A second differentiation would take what was kept for a constant; better an error than that.
@once_differentiable
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kept, weight, a, b = ctx.saved_tensors
    if weight is None:
        weight = ctx.again()
    needed = ctx.needs_input_grad
    needs = [needed[0], needed[3], needed[4]]
    gradients = _segmented_lora_backward(
        grad,
        kept,
        weight,
        a,
        b,
        ctx.rows,
        ctx.scaling,
        ctx.dropout,
        ctx.seed,
        ctx.dropped,
        ctx.wide,
        needs,
    )
    return tuple([g if needed else None for g, needed in zip(gradients, needs, strict=True)])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    dx, da, db = _gradients(ctx, grad)
    near, others = ([None] * length for length in ctx.lists)
    return dx, None, None, da, db, near, others, others, *[None] * 6


_segmented_lora = _dispatch.Operator(
    "segmented_lora",
    _portable,
    _empty_outputs,
    by="x",
    setup_context=_setup_context,
    backward=_backward,
)


class _Remade(torch.autograd.Function):
    """The operator with a weight that is made again for the backward pass instead of kept."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, weight, *rest, ctx.again = inputs
        output = _segmented_lora(x, weight, *rest)
        _setup_context(ctx, (x, None, *rest), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, da, db = _gradients(ctx, grads[0])
        return dx, None, None, da, db, *[None] * 10
