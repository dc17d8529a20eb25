"""linear_logprob on the GPU.

Without a gradient, one kernel multiplies and takes the sums of each tile while it is in registers
(:mod:`head`); with one, in bf16 under a frozen head, another does (:mod:`frozen_head`). In all
other forms the products are bare cuBLAS products: logits of a vocabulary chunk in fp32, one Triton
pass over it for the running softmax, the second product into E_p[slope W]. A trainable head
recomputes the chunks in its backward pass.

Shape suffixes: A active rows, R rows and T vocabulary entries of a block, C entries of a chunk, H
hidden size, V vocabulary, K targets per row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alphaspin_kernels._triton import frozen_head
from alphaspin_kernels._triton import head as forward
from alphaspin_kernels._triton.common import (
    LOWEST,
    SIGNATURE,
    Kernel,
    Launch,
    at_least_one,
    bounded,
    cdiv,
    chunk_entries,
    dot,
    head_arguments,
    multiples_of_16,
    multiply_add,
    unit_stride,
)
from alphaspin_kernels.checks import check_targets
from alphaspin_kernels.numerics import active_rows, target_slope

ROWS = 4096
# A weight p slope / slope(peak) of 16 bits is at most 2^14.
SMALLEST_SLOPE = tl.constexpr(2.0**-14)
# Tile skipping decides for SKIP_R rows and SKIP_T entries at a time.
SKIP_R, SKIP_T = 128, 128


@triton.jit
def _slope(z, cap, temperature, CAPPED: tl.constexpr):
    """d z' / d z times the temperature, from z'."""
    if CAPPED:
        t = z * (temperature / cap)
        return 1.0 - t * t
    return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def _unit(peak, cap, temperature):
    """The slope at the row's peak, in which p times slope is counted; not 0."""
    return tl.maximum(_slope(peak, cap, temperature, True), SMALLEST_SLOPE)


@Kernel("logits p means width H")
def _chunk_kernel(
    logits,
    bias,
    targets,
    peaks,
    sums,
    chosen,
    means,
    p,
    tops,
    masses,
    start,
    width,
    H,
    K,
    cap,
    temperature,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One row: take a chunk of raw logits into its running softmax, and write p = e^(z' - peak).

    With a cap, p slope / slope(peak). Rescales the row's accumulated mean where its peak moves.
    TILED also writes, for each BLOCK_T entries, the largest p as a share of the sum so far, which
    bounds the final probability from above, and the sum of p.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    z_C = tl.load(logits + row * width + c, mask=c < width, other=0.0)
    if HAS_BIAS:
        z_C += tl.load(bias + start + c, mask=c < width, other=0.0).to(tl.float32)
    z_C = bounded(z_C, cap, temperature, CAPPED)
    z_C = tl.where(c < width, z_C, -float("inf"))
    for k in range(K):
        target = tl.load(targets + row * K + k)
        if (target >= start) & (target < start + width):
            z = tl.sum(tl.where(c == target - start, z_C, 0.0), 0)
            tl.store(chosen + row * K + k, z)
    old = tl.load(peaks + row)
    # The largest p, and with a cap the largest p slope / slope(peak) of a peaked row, is exactly 1:
    # rounding to 16 bits costs it nothing. The maximum moves about ln(V / chunk) times: a row is
    # rarely rescaled.
    peak = tl.maximum(old, tl.max(z_C, 0))
    rescale = tl.exp(old - peak)
    p_C = tl.exp(z_C - peak)
    total = tl.load(sums + row) * rescale + tl.sum(p_C, 0)
    tl.store(peaks + row, peak)
    tl.store(sums + row, total)
    if rescale != 1.0:
        if CAPPED:
            rescale *= _unit(old, cap, temperature) / _unit(peak, cap, temperature)
        for at in range(0, H, BLOCK_H):
            h = at + tl.arange(0, BLOCK_H)
            mean_H = tl.load(means + row * H + h, mask=h < H)
            tl.store(means + row * H + h, mean_H * rescale, mask=h < H)
    if TILED:
        TILES: tl.constexpr = BLOCK_C // BLOCK_T
        tile = tl.arange(0, TILES)
        p_tiles = tl.reshape(p_C, (TILES, BLOCK_T))
        bound = tl.max(p_tiles, 1) / tl.maximum(total, 1e-30)
        tl.store(tops + row * TILES + tile, bound)
        tl.store(masses + row * TILES + tile, tl.sum(p_tiles, 1))
    if CAPPED:
        # A reciprocal, as a division spills registers; a hair above it, so that slope / slope is
        # not below 1, which a conversion that truncates would take down a whole 16-bit step.
        p_C *= _slope(z_C, cap, temperature, CAPPED) * (1.0000002 / _unit(peak, cap, temperature))
    tl.store(p + row * width + c, p_C.to(p.dtype.element_ty), mask=c < width)


@Kernel("p weight means H width weight_stride")
def _kept_tiles_kernel(
    p,
    weight,
    means,
    kept,
    counts,
    A,
    H,
    width,
    weight_stride,
    tiles,
    SHARE: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """means += p [A, width] weight [width, H], over the tiles listed for SHARE blocks of rows."""
    block = tl.program_id(0) // SHARE
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    sum_RH = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    row = tl.minimum(r, A - 1).to(tl.int64)
    STEPS: tl.constexpr = BLOCK_T // BLOCK_K
    # Where no tile is needed a part of one is added all the same.
    for step in range(0, at_least_one(tl.load(counts + block) * STEPS)):
        tile = tl.load(kept + block * tiles + step // STEPS)
        t = tile * BLOCK_T + step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
        p_RT = tl.load(p + row[:, None] * width + t[None, :], mask=(t < width)[None, :], other=0.0)
        weight_TH = weight + t.to(tl.int64)[:, None] * weight_stride + h[None, :]
        if EVEN_H:
            weight_TH = tl.load(weight_TH, mask=(t < width)[:, None], other=0.0)
        else:
            inside = (t < width)[:, None] & (h < H)[None, :]
            weight_TH = tl.load(weight_TH, mask=inside, other=0.0)
        sum_RH = dot(p_RT, weight_TH, sum_RH)
    at = means + row[:, None] * H + h[None, :]
    inside = (r < A)[:, None] & (h < H)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + sum_RH, mask=inside)


@Kernel("logits g width")
def _gradient_kernel(
    logits,
    bias,
    targets,
    lse,
    grad,
    g,
    start,
    width,
    K,
    cap,
    temperature,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row: d loss / d logits = sum_k grad_k (onehot(y_k) - p) slope of a chunk."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    z_C = tl.load(logits + row * width + c, mask=c < width, other=0.0)
    if HAS_BIAS:
        z_C += tl.load(bias + start + c, mask=c < width, other=0.0).to(tl.float32)
    z_C = bounded(z_C, cap, temperature, CAPPED)
    p_C = tl.exp(z_C - tl.load(lse + row))
    g_C = tl.zeros((BLOCK_C,), tl.float32)
    for k in range(K):
        target = tl.load(targets + row * K + k)
        upstream = tl.load(grad + row * K + k)
        g_C += upstream * (tl.where(c == target - start, 1.0, 0.0) - p_C)
    g_C = g_C * _slope(z_C, cap, temperature, CAPPED) / temperature
    tl.store(g + row * width + c, g_C.to(g.dtype.element_ty), mask=c < width)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    with_row: bool,
    skip_below: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same arguments and results as the portable version."""
    check_targets(targets, weight.shape[0], ignore_index)
    hidden, weight = unit_stride(hidden), unit_stride(weight)
    targets = targets.contiguous()
    active_A = active_rows(targets, ignore_index)
    rows, width = hidden.shape
    count, per_row = len(active_A), targets.shape[1]
    fp32 = torch.float32
    logp_NK = hidden.new_zeros(targets.shape, dtype=fp32)
    lse_N = hidden.new_zeros((rows,), dtype=fp32)
    skipped_N = hidden.new_zeros((rows,), dtype=fp32)
    row_NH = hidden.new_zeros(
        (rows if with_row else 0, width), dtype=hidden.dtype if per_row == 1 else fp32
    )
    if count == 0:
        return logp_NK, lse_N, row_NH, skipped_N
    head = head_arguments(bias, softcap, temperature)
    if not with_row:
        options = (bias, softcap, temperature)
        _forward(hidden, weight, targets, active_A, logp_NK, lse_N, *options)
    else:
        by_weights = frozen_head.serves(hidden, weight, per_row)
        for rows_R in active_A.split(ROWS):
            if by_weights:
                *found, failed_R = frozen_head.forward_with_row(
                    hidden[rows_R], weight, targets[rows_R], bias, softcap, temperature, skip_below
                )
                for output, value in zip((logp_NK, lse_N, row_NH, skipped_N), found, strict=True):
                    output[rows_R] = value
                rows_R = frozen_head.selected(rows_R, failed_R)  # hardly ever any
                if not len(rows_R):
                    continue
            found = _forward_with_row(
                hidden[rows_R], weight, targets[rows_R], head, softcap, skip_below
            )
            for output, value in zip((logp_NK, lse_N, row_NH, skipped_N), found, strict=True):
                output[rows_R] = value.to(output.dtype)
    return logp_NK.masked_fill_(targets == ignore_index, 0.0), lse_N, row_NH, skipped_N


def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    active_A: Tensor,
    logp_NK: Tensor,
    lse_N: Tensor,
    *options: Any,
) -> None:
    """Fill logp and lse of the active rows; the options are bias, softcap and temperature."""
    for rows_R in active_A.split(forward.ROWS):
        hidden_RH = hidden[rows_R]
        (peak_R,), (sum_R,) = forward.log_sums(hidden_RH, weight, *options)
        y_RK = forward.at_targets(hidden_RH, weight, targets[rows_R], *options)
        peak_R, log_sum_R = peak_R.double(), sum_R.double().log2()
        # y - max first: both are large together on peaked rows, and the rest is what matters.
        logp_RK = (y_RK - peak_R[:, None] - log_sum_R[:, None]) * forward.LN2
        logp_NK[rows_R] = logp_RK.float()
        lse_N[rows_R] = ((peak_R + log_sum_R) * forward.LN2).float()


def _forward_with_row(
    hidden_RH: Tensor,
    weight: Tensor,
    targets_RK: Tensor,
    head: dict[str, Any],
    softcap: float | None,
    skip_below: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (count, width), vocabulary, per_row = hidden_RH.shape, weight.shape[0], targets_RK.shape[1]
    chunk = chunk_entries(count, width, vocabulary, _chunks(width, vocabulary, frozen=True))
    fp32 = {"dtype": torch.float32, "device": hidden_RH.device}
    peak_R = torch.full((count,), LOWEST.value, **fp32)
    sum_R, skipped_R = torch.zeros((2, count), **fp32)
    z_RK = torch.zeros((count, per_row), **fp32)
    mean_RH = torch.zeros((count, width), **fp32)
    z = torch.empty((count * chunk,), **fp32)
    p = hidden_RH.new_empty((count * chunk,))
    tops_RT, masses_RT = torch.zeros((2, count, chunk // SKIP_T), **fp32)
    for start in range(0, vocabulary, chunk):
        weight_CH = weight[start : start + chunk]
        entries = len(weight_CH)
        z_RC = z[: count * entries].view(count, entries)
        p_RC = p[: count * entries].view(count, entries)
        multiply_add(z_RC, hidden_RH, weight_CH.T, add=False)
        before_R = peak_R.clone() if skip_below else None
        even = multiples_of_16(z_RC, p_RC, mean_RH, entries, width)
        _chunk_kernel[even][(count,)](
            logits=z_RC,
            targets=targets_RK,
            peaks=peak_R,
            sums=sum_R,
            chosen=z_RK,
            means=mean_RH,
            p=p_RC,
            tops=tops_RT,
            masses=masses_RT,
            start=start,
            width=entries,
            H=width,
            K=per_row,
            TILED=skip_below > 0,
            **head,
            **_chunk_blocks(p.dtype, chunk, even),
        )
        if before_R is None:
            multiply_add(mean_RH, p_RC, weight_CH, add=True)
        else:
            skipped_R.mul_(torch.exp(before_R - peak_R))
            skipped_R += _add_kept_tiles(mean_RH, p_RC, weight_CH, tops_RT, masses_RT, skip_below)
    log_sum_R = sum_R.log()
    logp_RK = z_RK - peak_R[:, None] - log_sum_R[:, None]
    unit_R = target_slope(peak_R, softcap, head["temperature"])
    unit_R = unit_R.clamp_min_(SMALLEST_SLOPE.value / head["temperature"])
    row_RH = mean_RH.mul_((unit_R / sum_R)[:, None])
    if per_row == 1:
        slope_R1 = target_slope(z_RK, softcap, head["temperature"])
        row_RH = torch.addcmul(row_RH.neg_(), slope_R1, weight[targets_RK[:, 0]].float())
    return logp_RK, peak_R + log_sum_R, row_RH, skipped_R.div_(sum_R)


def _add_kept_tiles(
    mean_RH: Tensor,
    p_RC: Tensor,
    weight_CH: Tensor,
    tops_RT: Tensor,
    masses_RT: Tensor,
    skip_below: float,
) -> Tensor:
    """Add the products of the tiles that some row of a block needs; return the mass left out."""
    (count, width), entries = mean_RH.shape, len(weight_CH)
    row_blocks, tiles = cdiv(count, SKIP_R), tops_RT.shape[1]
    padded_RT = torch.nn.functional.pad(tops_RT, (0, 0, 0, -count % SKIP_R))
    # Not >=: a row that is not finite must not take the tiles of the others.
    keep_BT = ~(padded_RT.view(row_blocks, SKIP_R, tiles).amax(1) < skip_below)
    keep_RT = keep_BT.repeat_interleave(SKIP_R, 0)[:count]
    even = width % 128 == 0
    even = even and multiples_of_16(p_RC, weight_CH, mean_RH, entries, weight_CH.stride(0))
    config = _kept_blocks(p_RC.dtype, even)
    grid = (cdiv(count, config["BLOCK_R"]), cdiv(width, config["BLOCK_H"]))
    _kept_tiles_kernel[even][grid](
        p=p_RC,
        weight=weight_CH,
        means=mean_RH,
        kept=keep_BT.int().argsort(dim=1, descending=True, stable=True).int(),
        counts=keep_BT.sum(1, dtype=torch.int32),
        A=count,
        H=width,
        width=entries,
        weight_stride=weight_CH.stride(0),
        tiles=tiles,
        EVEN_H=even,
        **config,
    )
    return (masses_RT * ~keep_RT).sum(1)


def linear_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Same arguments and results as the portable version."""
    needs_hidden, needs_weight, needs_bias = needs
    hidden, weight = unit_stride(hidden), unit_stride(weight)
    targets, head = targets.contiguous(), head_arguments(bias, softcap, temperature)
    active_A = active_rows(targets, ignore_index)
    hidden_AH, targets_AK, lse_A = hidden[active_A], targets[active_A], lse[active_A]
    grad_AK = grad.contiguous()[active_A].float().masked_fill_(targets_AK == ignore_index, 0.0)
    d_hidden = torch.zeros_like(hidden) if needs_hidden else hidden.new_empty((0,))
    d_weight = torch.empty_like(weight) if needs_weight else weight.new_empty((0,))
    d_bias = weight.new_empty((len(weight) if needs_bias else 0,))
    d_hidden_AH = torch.zeros_like(hidden_AH, dtype=torch.float32) if needs_hidden else None
    vocabulary, width = weight.shape
    rows = min(len(active_A), ROWS)
    chunk = chunk_entries(rows, width, vocabulary, _chunks(width, vocabulary, frozen=False))
    for start in range(0, len(weight), chunk):
        weight_CH = weight[start : start + chunk]
        entries = len(weight_CH)
        d_weight_CH = torch.zeros_like(weight_CH, dtype=torch.float32) if needs_weight else None
        d_bias_C = weight.new_zeros((entries,), dtype=torch.float32)
        for first in range(0, len(active_A), ROWS):
            part = slice(first, first + ROWS)
            hidden_RH = hidden_AH[part]
            z_RC = hidden.new_empty((len(hidden_RH), entries), dtype=torch.float32)
            g_RC = hidden.new_empty((len(hidden_RH), entries))
            multiply_add(z_RC, hidden_RH, weight_CH.T, add=False)
            even = multiples_of_16(z_RC, g_RC, entries)
            _gradient_kernel[even][(len(hidden_RH),)](
                logits=z_RC,
                targets=targets_AK[part],
                lse=lse_A[part],
                grad=grad_AK[part],
                g=g_RC,
                start=start,
                width=entries,
                K=targets.shape[1],
                **head,
                **_gradient_blocks(chunk, even),
            )
            if d_hidden_AH is not None:
                multiply_add(d_hidden_AH[part], g_RC, weight_CH, add=True)
            if d_weight_CH is not None:
                multiply_add(d_weight_CH, g_RC.T, hidden_RH, add=True)
            d_bias_C += g_RC.sum(0, dtype=torch.float32)
        if d_weight_CH is not None:
            d_weight[start : start + chunk] = d_weight_CH
        if needs_bias:
            d_bias[start : start + chunk] = d_bias_C
    if d_hidden_AH is not None:
        d_hidden[active_A] = d_hidden_AH.to(hidden.dtype)
    return d_hidden, d_weight, d_bias


def _chunks(width: int, vocabulary: int, *, frozen: bool) -> tuple[int, ...]:
    """Chunks of which a row fits into the registers: the largest where it is read in vectors."""
    return (4096, 16384) if frozen and multiples_of_16(width, vocabulary) else (4096, 8192)


# Warps: as few as spill no registers, whatever triton and GPU (`python -m alphaspin_kernels.gate`).
def _chunk_blocks(dtype: torch.dtype, chunk: int, even: bool) -> dict[str, int]:
    warps = max(4, chunk // (512 if even or dtype != torch.float32 else 256))
    return {"BLOCK_C": chunk, "BLOCK_T": SKIP_T, "BLOCK_H": 1024, "num_warps": warps}


def _gradient_blocks(chunk: int, even: bool) -> dict[str, int]:
    return {"BLOCK_C": chunk, "num_warps": max(4, chunk // (512 if even else 1024))}


def _kept_blocks(dtype: torch.dtype, even: bool) -> dict[str, int]:
    rows = 64 if dtype == torch.float32 else SKIP_R
    return {
        "SHARE": SKIP_R // rows,
        "BLOCK_R": rows,
        "BLOCK_T": SKIP_T,
        "BLOCK_K": 32 if dtype == torch.float32 else 64,
        "BLOCK_H": 128 if even and dtype != torch.float32 else 32,
        "num_warps": 8,
        "num_stages": 2,
    }


def launches(capability: int) -> list[Launch]:
    """Every form in which the kernels can be launched; options once all off and once all on."""
    return [*forward.launches(capability, mixed=False), *frozen_head.launches(capability)] + [
        launch
        for dtype in SIGNATURE
        for even in (True, False)
        for full in (False, True)
        for launch in _forms(dtype, even=even, full=full)
    ]


def _forms(dtype: torch.dtype, *, even: bool, full: bool) -> list[Launch]:
    head = {"HAS_BIAS": full, "CAPPED": full}

    def form(kernel: Kernel, own: str, options: dict[str, Any], products: bool = False) -> Launch:
        """`own` are the pointers to the dtype of hidden."""
        types = [
            (f"*{SIGNATURE[dtype]}", own),
            ("*i64", "targets rows"),
            ("*i32", "kept counts"),
            ("*fp32", "logits peaks sums chosen means tops masses lse grad"),
            ("i32", "A V H hidden_stride weight_stride K span start width tiles"),
            ("fp32", "cap temperature"),
        ]
        return Launch.of(kernel, even, types, options, products=products)

    bias = " bias" * full
    found: list[Launch] = []
    # Full chunks are even where the last is not.
    for chunk in sorted({*_chunks(0, 0 if even else 1, frozen=True), *_chunks(0, 0, frozen=False)}):
        options = {**head, "TILED": full, **_chunk_blocks(dtype, chunk, even)}
        found.append(form(_chunk_kernel, "p" + bias, options))
    for chunk in _chunks(0, 0, frozen=False):
        found.append(form(_gradient_kernel, "g" + bias, head | _gradient_blocks(chunk, even)))
    if full:
        options = {"EVEN_H": even, **_kept_blocks(dtype, even)}
        found.append(form(_kept_tiles_kernel, "p weight", options, True))
    return found
