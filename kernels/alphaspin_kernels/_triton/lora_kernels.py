"""The kernels of :mod:`alphaspin_kernels._triton.segmented_lora`.

Shape suffixes: R rows, C columns out, K columns in and J ranks of a block.
"""

import triton
import triton.language as tl

from alphaspin_kernels._triton.common import Kernel, dot

GROUP = tl.constexpr(16)  # blocks of rows that share the weight's tiles in the L2 cache


@triton.jit
def _mix(h):
    """Finaliser of MurmurHash3 ("fmix32") on uint32."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _mask(row_R, column_C, key, threshold):
    """Which entries dropout keeps: `checks.dropout_mask`."""
    row_R = _mix(_mix(row_R.to(tl.uint32)) ^ key.to(tl.uint32))
    bits_RC = _mix(row_R[:, None] ^ _mix(column_C.to(tl.uint32))[None, :])
    return bits_RC.to(tl.int32, bitcast=True) >= threshold


@Kernel("x a kept inputs x_stride a_stride")
def _low_kernel(
    x,
    a,
    low,
    kept,
    rows,
    inputs,
    rank,
    width,
    x_stride,
    a_stride,
    scaling,
    key,
    threshold,
    DROP: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """low [rows, width] = scaling drop(x) A^T, 0 beyond A's rank; KEEP also writes drop(x)."""
    # Offsets of a block in 64 bits, within it in 32: fewer registers.
    start = tl.program_id(0) * BLOCK_R
    r = tl.arange(0, BLOCK_R)
    row = tl.minimum(r, rows - start - 1)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    x += start.to(tl.int64) * x_stride
    low += start.to(tl.int64) * width
    if KEEP:
        kept += start.to(tl.int64) * inputs
    keeping = tl.where(tl.program_id(1) == 0, rows, 0)
    low_RJ = tl.zeros((BLOCK_R, BLOCK_J), tl.float32)
    for at in range(0, inputs, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        inside_K = k < inputs
        x_RK = tl.load(x + row[:, None] * x_stride + k[None, :], mask=inside_K[None, :], other=0.0)
        if DROP:
            x_RK = tl.where(_mask(start + r, k, key, threshold), x_RK, 0.0)
        if KEEP:
            mine_RK = (start + r < keeping)[:, None] & inside_K[None, :]
            tl.store(kept + row[:, None] * inputs + k[None, :], x_RK, mask=mine_RK)
        a_KJ = a + j[None, :] * a_stride + k[:, None]
        a_KJ = tl.load(a_KJ, mask=inside_K[:, None] & (j < rank)[None, :], other=0.0)
        low_RJ = dot(x_RK.to(a_KJ.dtype), a_KJ, low_RJ)
    inside_RJ = (start + r < rows)[:, None] & (j < width)[None, :]
    low_RJ = (low_RJ * scaling).to(low.dtype.element_ty)
    tl.store(low + row[:, None] * width + j[None, :], low_RJ, mask=inside_RJ)


@Kernel(
    "x weight low up_0 up_1 up_2 up_3 up_4 up_5 up_6 up_7 y inputs outputs width x_stride"
    " weight_stride"
)
def _linear_kernel(
    x,
    weight,
    bias,
    low,
    up_0,
    up_1,
    up_2,
    up_3,
    up_4,
    up_5,
    up_6,
    up_7,
    y,
    row_blocks,
    stop_0,
    stop_1,
    stop_2,
    stop_3,
    stop_4,
    stop_5,
    stop_6,
    stop_7,
    adapted,
    inputs,
    outputs,
    width,
    x_stride,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """y = x W^T + bias + low up_s^T, for up to 8 segments that end at the rows stop_0 ...

    up_s is [outputs, width]; `adapted` has a bit for each segment that has one.
    """
    # Neighbouring programs: GROUP blocks of rows times a few columns.
    program = tl.program_id(0)
    column_blocks = tl.cdiv(outputs, BLOCK_C)
    group = program // (GROUP * column_blocks)
    size = tl.minimum(row_blocks - group * GROUP, GROUP)
    within = program % (GROUP * column_blocks)
    block = group * GROUP + within % size
    left = within // size * BLOCK_C

    # The block's segment: its first row, where its segment ends, which adapter.
    first, last, ranks, up = 0, 0, 0, up_0
    begin = 0
    stops = (stop_0, stop_1, stop_2, stop_3, stop_4, stop_5, stop_6, stop_7)
    ups = (up_0, up_1, up_2, up_3, up_4, up_5, up_6, up_7)
    for s in tl.static_range(8):
        blocks = tl.cdiv(stops[s] - begin, BLOCK_R)
        here = (block >= 0) & (block < blocks)
        first = tl.where(here, begin + block * BLOCK_R, first)
        last = tl.where(here, stops[s], last)
        ranks = tl.where(here, ((adapted >> s) & 1) * width, ranks)
        up = tl.where(here, ups[s], up)
        block -= blocks
        begin = stops[s]

    # Rows and columns past the end read the last one, and are not stored. Offsets of the block in
    # 64 bits, within it in 32: fewer registers.
    r, c, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    row, column = tl.minimum(r, last - first - 1), tl.minimum(c, outputs - left - 1)
    first_64, left_64 = first.to(tl.int64), left.to(tl.int64)
    x_RK = x + first_64 * x_stride + row[:, None] * x_stride + k[None, :]
    weight_KC = weight + left_64 * weight_stride + column[None, :] * weight_stride + k[:, None]
    y_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for at in range(0, inputs, BLOCK_K):
        if EVEN:
            y_RC = dot(tl.load(x_RK + at), tl.load(weight_KC + at), y_RC)
        else:
            inside_K = at + k < inputs
            part_RK = tl.load(x_RK + at, mask=inside_K[None, :], other=0.0)
            part_KC = tl.load(weight_KC + at, mask=inside_K[:, None], other=0.0)
            y_RC = dot(part_RK, part_KC, y_RC)
    # Rows without an adapter have no low: it is not read.
    j = tl.arange(0, BLOCK_J)
    low_RJ = low + first_64 * width + row[:, None] * width + j[None, :]
    up_JC = up + left_64 * width + column[None, :] * width + j[:, None]
    for at in range(0, width, BLOCK_J):
        inside_J = at + j < ranks
        part_RJ = tl.load(low_RJ + at, mask=inside_J[None, :], other=0.0)
        part_JC = tl.load(up_JC + at, mask=inside_J[:, None], other=0.0)
        y_RC = dot(part_RJ, part_JC, y_RC)
    if HAS_BIAS:
        y_RC += tl.load(bias + left + column).to(tl.float32)[None, :]
    inside_RC = (first + r < last)[:, None] & (left + c < outputs)[None, :]
    y += first_64 * outputs + left
    y_RC = y_RC.to(y.dtype.element_ty)
    tl.store(y + r[:, None] * outputs + c[None, :], y_RC, mask=inside_RC)


@Kernel("dx a inputs a_stride")
def _update_kernel(
    dx,
    low,
    a,
    rows,
    inputs,
    rank,
    a_stride,
    key,
    threshold,
    DROP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx [rows, inputs] += drop'(low A), low [rows, rank] contiguous."""
    start = tl.program_id(0) * BLOCK_R
    r = tl.arange(0, BLOCK_R)
    row = tl.minimum(r, rows - start - 1)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    low += start.to(tl.int64) * rank
    dx += start.to(tl.int64) * inputs
    sum_RK = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for at in range(0, rank, BLOCK_J):
        j = at + tl.arange(0, BLOCK_J)
        inside_J = j < rank
        low_RJ = tl.load(low + row[:, None] * rank + j[None, :], mask=inside_J[None, :], other=0.0)
        a_JK = a + j[:, None] * a_stride + k[None, :]
        a_JK = tl.load(a_JK, mask=inside_J[:, None] & (k < inputs)[None, :], other=0.0)
        near_RJ = low_RJ.to(a_JK.dtype)
        sum_RK = dot(near_RJ, a_JK, sum_RK)
        if a.dtype.element_ty != tl.float32:  # what the rounding took
            sum_RK = dot((low_RJ - near_RJ.to(tl.float32)).to(a_JK.dtype), a_JK, sum_RK)
    if DROP:
        sum_RK = tl.where(_mask(start + r, k, key, threshold), sum_RK, 0.0)
    inside_RK = (start + r < rows)[:, None] & (k < inputs)[None, :]
    dx_RK = dx + row[:, None] * inputs + k[None, :]
    sum_RK += tl.load(dx_RK, mask=inside_RK, other=0.0).to(tl.float32)
    tl.store(dx_RK, sum_RK.to(dx.dtype.element_ty), mask=inside_RK)
