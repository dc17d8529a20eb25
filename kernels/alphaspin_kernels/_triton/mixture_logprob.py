"""The two-product form of mixture_logprob on the GPU: each tile of the head is read once.

Shape suffixes: A active rows, R rows and T vocabulary entries of a block, H hidden size, V
vocabulary, K targets per row, S parts of the vocabulary.
"""

import torch
import triton.language as tl
from torch import Tensor

from alphaspin_kernels._triton.common import (
    LOWEST,
    SIGNATURE,
    Kernel,
    Launch,
    absorb,
    bounded,
    capability_of,
    combine,
    dot,
    head_arguments,
    multiples_of_16,
    partition,
    processors,
    store_chosen,
    unit_stride,
)
from alphaspin_kernels.checks import check_targets
from alphaspin_kernels.numerics import active_rows, finish_mixture


@Kernel("prev base weight H hidden_stride weight_stride")
def _mixture_kernel(
    prev,
    base,
    weight,
    bias,
    targets,
    rows,
    peaks,
    sums,
    chosen,
    A,
    V,
    H,
    hidden_stride,
    weight_stride,
    K,
    span,
    alpha,
    cap,
    temperature,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Maxima and sums of previous, base and mixture over `span` entries; z' at the targets."""
    split = tl.program_id(1)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.load(rows + r, mask=r < A, other=0)
    first = split * span
    last = tl.minimum(first + span, V)
    h = tl.arange(0, BLOCK_H)
    prev_R = prev + row * hidden_stride
    base_R = base + row * hidden_stride
    prev_peak_R = tl.full((BLOCK_R,), LOWEST, tl.float32)
    base_peak_R = tl.full((BLOCK_R,), LOWEST, tl.float32)
    peak_R = tl.full((BLOCK_R,), LOWEST, tl.float32)
    prev_sum_R = tl.zeros((BLOCK_R,), tl.float32)
    base_sum_R = tl.zeros((BLOCK_R,), tl.float32)
    sum_R = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(first, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        # Entries past the end read the last one, and are masked below.
        weight_T = weight + tl.minimum(t, V - 1).to(tl.int64) * weight_stride
        prev_RT = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
        base_RT = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
        for at in range(0, H, BLOCK_H):
            inside = at + h < H
            if EVEN_H:
                weight_HT = tl.load(weight_T[None, :] + (at + h)[:, None])
                prev_RH = tl.load(prev_R[:, None] + (at + h)[None, :])
                base_RH = tl.load(base_R[:, None] + (at + h)[None, :])
            else:
                weight_HT = weight_T[None, :] + (at + h)[:, None]
                weight_HT = tl.load(weight_HT, mask=inside[:, None], other=0.0)
                prev_RH = prev_R[:, None] + (at + h)[None, :]
                prev_RH = tl.load(prev_RH, mask=inside[None, :], other=0.0)
                base_RH = base_R[:, None] + (at + h)[None, :]
                base_RH = tl.load(base_RH, mask=inside[None, :], other=0.0)
            prev_RT = dot(prev_RH, weight_HT, prev_RT)
            base_RT = dot(base_RH, weight_HT, base_RT)
        if HAS_BIAS:
            bias_T = tl.load(bias + t, mask=t < last, other=0.0).to(tl.float32)
            prev_RT += bias_T[None, :]
            base_RT += bias_T[None, :]
        prev_RT = bounded(prev_RT, cap, temperature, CAPPED)
        base_RT = bounded(base_RT, cap, temperature, CAPPED)
        # A weight of 0 ignores the policy, also where it says -inf.
        z_RT = tl.where(alpha == 0.0, 0.0, alpha * prev_RT)
        z_RT += tl.where(alpha == 1.0, 0.0, (1.0 - alpha) * base_RT)
        valid_T = (t < last)[None, :]
        z_RT = tl.where(valid_T, z_RT, -float("inf"))
        end = tl.minimum(start + BLOCK_T, last)
        store_chosen(z_RT, t, start, end, targets, row, K, chosen, r, A)
        peak_R, sum_R = absorb(z_RT, peak_R, sum_R)
        prev_RT = tl.where(valid_T, prev_RT, -float("inf"))
        prev_peak_R, prev_sum_R = absorb(prev_RT, prev_peak_R, prev_sum_R)
        base_RT = tl.where(valid_T, base_RT, -float("inf"))
        base_peak_R, base_sum_R = absorb(base_RT, base_peak_R, base_sum_R)
    at_SR = 3 * split * A + r
    tl.store(peaks + at_SR, prev_peak_R, mask=r < A)
    tl.store(peaks + at_SR + A, base_peak_R, mask=r < A)
    tl.store(peaks + at_SR + 2 * A, peak_R, mask=r < A)
    tl.store(sums + at_SR, prev_sum_R, mask=r < A)
    tl.store(sums + at_SR + A, base_sum_R, mask=r < A)
    tl.store(sums + at_SR + 2 * A, sum_R, mask=r < A)


def blocks(dtype: torch.dtype, capability: int, even: bool) -> dict[str, int]:
    """Blocks of the kernel: two tiles of logits share the registers."""
    if capability < 90 and not even:
        return {"BLOCK_R": 32, "BLOCK_T": 32, "BLOCK_H": 32, "num_warps": 8, "num_stages": 2}
    if even and dtype != torch.float32:
        return {"BLOCK_R": 64, "BLOCK_T": 64, "BLOCK_H": 64, "num_warps": 8, "num_stages": 3}
    depth = 32 if dtype == torch.float32 else 16
    return {"BLOCK_R": 64, "BLOCK_T": 32, "BLOCK_H": depth, "num_warps": 8, "num_stages": 2}


def mixture_logprob(
    hidden_prev: Tensor,
    hidden_base: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    alpha: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as the portable version."""
    (vocabulary, width), per_row = weight.shape, targets.shape[1]
    check_targets(targets, vocabulary, ignore_index)
    prev, base, weight = hidden_prev.contiguous(), hidden_base.contiguous(), unit_stride(weight)
    targets = targets.contiguous()
    logp_NK = prev.new_zeros(targets.shape, dtype=torch.float32)
    log_z_N = prev.new_zeros(targets.shape[:1], dtype=torch.float32)
    active_A = active_rows(targets, ignore_index)
    count = len(active_A)
    if count == 0:
        return logp_NK, log_z_N
    even = width % 64 == 0 and multiples_of_16(prev, base, weight, weight.stride(0))
    config = blocks(prev.dtype, capability_of(prev), even)
    grid, span = partition(count, vocabulary, config, processors(prev))
    peaks_S3A, sums_S3A = prev.new_empty((2, grid[1], 3, count), dtype=torch.float32)
    chosen_AK = prev.new_zeros((count, per_row), dtype=torch.float32)
    _mixture_kernel[even][grid](
        prev=prev,
        base=base,
        weight=weight,
        targets=targets,
        rows=active_A,
        peaks=peaks_S3A,
        sums=sums_S3A,
        chosen=chosen_AK,
        A=count,
        V=vocabulary,
        H=width,
        hidden_stride=prev.stride(0),
        weight_stride=weight.stride(0),
        K=per_row,
        span=span,
        alpha=alpha,
        EVEN_H=even,
        **head_arguments(bias, softcap, temperature),
        **config,
    )
    peak_3A, sum_3A = combine(peaks_S3A, sums_S3A)
    logp_AK, log_z_N[active_A] = finish_mixture(chosen_AK, peak_3A, sum_3A, alpha)
    logp_NK[active_A] = logp_AK
    return logp_NK.masked_fill_(targets == ignore_index, 0.0), log_z_N


def launches(capability: int) -> list[Launch]:
    """Every form in which the kernel can be launched; options once all off and once all on."""
    return [
        Launch.of(
            _mixture_kernel,
            even,
            [
                (f"*{name}", "prev base weight" + " bias" * full),
                ("*i64", "targets rows"),
                ("*fp32", "peaks sums chosen"),
                ("i32", "A V H hidden_stride weight_stride K span"),
                ("fp32", "alpha cap temperature"),
            ],
            {"HAS_BIAS": full, "CAPPED": full, "EVEN_H": even, **blocks(dtype, capability, even)},
            products=True,
        )
        for dtype, name in SIGNATURE.items()
        for even in (True, False)
        for full in (False, True)
    ]
