"""The segmented sum of sequence_logprob on the GPU: a program per sequence, no atomics."""

import triton.language as tl
from torch import Tensor

from alphaspin_kernels._triton.common import Kernel, Launch
from alphaspin_kernels.checks import check_boundaries

BLOCK = 1024


@Kernel("")
def _segment_sum_kernel(values, boundaries, sums, K, BLOCK: tl.constexpr):
    """Column k of the rows of sequence b."""
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1)
    first = tl.load(boundaries + b).to(tl.int64)
    last = tl.load(boundaries + b + 1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        total += tl.load(values + n * K + k, mask=n < last, other=0.0)
    tl.store(sums + b * K + k, tl.sum(total, 0))


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums [B, K] of the rows of values [N, K] fp32 between the boundaries."""
    check_boundaries(cu_seqlens, len(values))
    values, cu_seqlens = values.contiguous(), cu_seqlens.contiguous()
    sums = values.new_empty((len(cu_seqlens) - 1, values.shape[1]))
    if sums.numel():
        _segment_sum_kernel[False][tuple(sums.shape)](
            values, cu_seqlens, sums, values.shape[1], BLOCK=BLOCK
        )
    return sums


def launches(capability: int) -> list[Launch]:
    """Every form in which the kernel can be launched."""
    types = [("*fp32", "values sums"), ("i32", "K")]
    return [
        Launch.of(_segment_sum_kernel, False, [*types, (integer, "boundaries")], {"BLOCK": BLOCK})
        for integer in ("*i32", "*i64")
    ]
