"""segmented_lora on the GPU: low = scaling drop(x) A^T per adapter, then y = x W^T + low B^T.

The second kernel is a plain tiled product over the rows of all segments whose last step along the
summed axis is the adapter's: low and B are one more pair of tiles. A block of rows never straddles
a segment, so the whole block has one B. The gradient of x is cuBLAS's product dy W, to which a
third kernel adds the low-rank part; those of A and B are cuBLAS's, with sums in fp32.

Shape suffixes: R rows, C columns out, K columns in and J ranks of a block, otherwise as in the
portable version: N, P, S rows, I and O width in and out.
"""

import torch
from torch import Tensor

from alphaspin_kernels._triton.common import (
    SIGNATURE,
    Launch,
    capability_of,
    cdiv,
    multiples_of_16,
    multiply_add,
    processors,
    unit_stride,
)
from alphaspin_kernels._triton.lora_kernels import _linear_kernel, _low_kernel, _update_kernel
from alphaspin_kernels.checks import dropout_key, dropout_threshold
from alphaspin_kernels.numerics import part, segment_pairs

SEGMENTS = 8  # per launch; their ends are arguments of the kernel


def blocks(
    dtype: torch.dtype, low_dtype: torch.dtype, capability: int, *, even: bool, wide: bool
) -> dict[str, int]:
    """Blocks of the product: the largest without spilled registers.

    Args:
        dtype: of x.
        low_dtype: of the adapters; fp32 ones beside 16 bits take registers.
        capability: of the GPU.
        even: whether the blocks divide the columns of x. If not, what is loaded passes through
            registers instead of going straight to shared memory.
        wide: whether there are enough wide blocks for all processors.
    """
    if dtype == torch.float32:
        tile = {"BLOCK_R": 64, "BLOCK_C": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    elif capability not in (90, 100) or not even:
        columns = 128 if low_dtype == dtype else 64
        tile = {"BLOCK_R": 128, "BLOCK_C": columns, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
    elif wide and low_dtype == dtype:
        tile = {"BLOCK_R": 128, "BLOCK_C": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    else:
        tile = {"BLOCK_R": 128, "BLOCK_C": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
    return {**tile, "BLOCK_J": _ranks(low_dtype)}


def _ranks(dtype: torch.dtype) -> int:
    """Ranks of a block. They are taken block by block, so that any number of them fits."""
    return 16 if dtype == torch.float32 else 32


def _small_blocks(dtype: torch.dtype) -> dict[str, int]:
    """Blocks of the two small kernels, which wait for memory, by the dtype of the adapter."""
    tile = {"BLOCK_R": 64, "BLOCK_J": _ranks(dtype), "BLOCK_K": 32}
    return {**tile, "num_warps": 4, "num_stages": 3}


def segmented_lora(
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
    """Same arguments and results as the portable version."""
    a, b = near or (a, b)
    x, weight = unit_stride(x), unit_stride(weight)
    count, inputs = x.shape
    y_NO = x.new_empty((count, weight.shape[0]))
    kept_PI = x.new_empty((segments[0] if keep else 0, inputs))
    pairs = segment_pairs(a, b, others_a, others_b, segments, slots)
    # Adapters of several dtypes meet in fp32.
    dtypes = {pair[0].dtype for _, pair in pairs if pair is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32 if dtypes else x.dtype
    # Ranks are filled up with zeros to a multiple of 16, which can be read in vectors.
    width = max((len(pair[0]) for _, pair in pairs if pair is not None), default=0)
    width = 16 * cdiv(width, 16)
    low_NR = x.new_empty((count, width), dtype=dtype)
    for s, (rows, pair) in enumerate(pairs):
        if pair is not None and segments[s]:
            drop = dropout if s == 0 else 0.0
            factor = scaling[s] / (1 - drop)
            kept = kept_PI if s == 0 and keep else None
            _low(part(x, rows), pair[0], part(low_NR, rows), kept, factor, drop, seed)
    for first in range(0, len(pairs), SEGMENTS):
        _linear(x, weight, bias, low_NR, pairs[first : first + SEGMENTS], y_NO)
    return y_NO, kept_PI


def _low(
    x_SI: Tensor,
    a_RI: Tensor,
    low_SR: Tensor,
    kept_SI: Tensor | None,
    factor: float,
    dropout: float,
    seed: int,
) -> None:
    a_RI = unit_stride(a_RI)
    rows, width = low_SR.shape
    options = _small_blocks(a_RI.dtype)
    even = multiples_of_16(x_SI, a_RI, kept_SI, x_SI.shape[1], x_SI.stride(0), a_RI.stride(0))
    grid = (cdiv(rows, options["BLOCK_R"]), cdiv(width, options["BLOCK_J"]))
    _low_kernel[even][grid](
        x_SI,
        a_RI,
        low_SR,
        kept_SI,
        rows,
        x_SI.shape[1],
        len(a_RI),
        width,
        x_SI.stride(0),
        a_RI.stride(0),
        factor,
        dropout_key(seed) if dropout else 0,
        dropout_threshold(dropout),
        DROP=dropout > 0,
        KEEP=kept_SI is not None,
        **options,
    )


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor,
    pairs: list[tuple[slice, tuple[Tensor, Tensor] | None]],
    y: Tensor,
) -> None:
    """Rows of up to SEGMENTS segments."""
    start, end = pairs[0][0].start, pairs[-1][0].stop
    if start == end or not weight.shape[0]:
        return
    # Where there is no adapter, `low` stands for a pointer that is not read.
    ups = [low if pair is None else _filled(pair[1], low) for _, pair in pairs]
    ups += [low] * (SEGMENTS - len(ups))
    adapted = sum(1 << s for s, (_, pair) in enumerate(pairs) if pair is not None)
    stops = [rows.stop - start for rows, _ in pairs]
    stops += [end - start] * (SEGMENTS - len(stops))
    x, low, y = (part(z, slice(start, end)) for z in (x, low, y))
    outputs, inputs = weight.shape
    even = inputs % 64 == 0  # the largest BLOCK_K
    even = even and multiples_of_16(x, weight, low, *ups, y, outputs, low.shape[1])
    even = even and multiples_of_16(x.stride(0), weight.stride(0))
    for wide in (True, False):
        options = blocks(x.dtype, low.dtype, capability_of(x), even=even, wide=wide)
        height = options["BLOCK_R"]
        count = sum(cdiv(rows.stop - rows.start, height) for rows, _ in pairs)
        programs = count * cdiv(outputs, options["BLOCK_C"])
        if programs >= processors(x):
            break
    _linear_kernel[even][(programs,)](
        x,
        weight,
        bias,
        low,
        *ups,
        y,
        count,
        *stops,
        adapted,
        inputs,
        outputs,
        low.shape[1],
        x.stride(0),
        weight.stride(0),
        HAS_BIAS=bias is not None,
        EVEN=even,
        **options,
    )


def _filled(b_OR: Tensor, low_NR: Tensor) -> Tensor:
    """B as the kernel reads it: itself, unless its rank or dtype is not that of `low`."""
    if b_OR.dtype == low_NR.dtype and b_OR.shape[1] == low_NR.shape[1] and b_OR.is_contiguous():
        return b_OR
    filled = low_NR.new_zeros((len(b_OR), low_NR.shape[1]))
    filled[:, : b_OR.shape[1]] = b_OR
    return filled


def segmented_lora_backward(
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
    """Same arguments and results as the portable version: no copies of dy and x in fp32."""
    needs_x, needs_a, needs_b = needs
    factor, drop = scaling / (1 - dropout), 0.0 if dropped else dropout
    dx = da = db = low_PR = None
    mine = slice(0, rows)
    dy_PO = part(grad, mine)
    if a is not None and b is not None:
        dtype = torch.float32 if wide else a.dtype
        low_PR = _product(dy_PO, b).mul_(factor)
        if needs_b or (needs_a and drop):
            # Forward once more: scaling drop(x) A^T, and drop(x) where x was kept.
            kept = unit_stride(kept)
            zeroed = kept.new_empty(kept.shape) if needs_a and drop else None
            width = 16 * cdiv(len(a), 16)
            up_PR = kept.new_empty((rows, width), dtype=a.dtype)
            if rows:
                _low(kept, a, up_PR, zeroed, factor, drop, seed)
            kept = kept if zeroed is None else zeroed
            if needs_b:
                db = _product(dy_PO.T, up_PR[:, : len(a)]).to(dtype)
        if needs_a:
            da = _product(low_PR.to(a.dtype).T, kept).to(dtype)
    if needs_x:
        count = grad.shape[0]
        dx = grad.new_empty((count, weight.shape[1]))
        if rows < count:
            dx[rows:] = 0
        _input_gradient(part(dx, mine), dy_PO, weight, low_PR, a, dropout, seed)
    dx, da, db = (grad.new_empty((0,)) if g is None else g for g in (dx, da, db))
    return dx, da, db


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left right in fp32, summed in fp32; 16-bit factors as they are where both have 16 bits."""
    if left.dtype != right.dtype:
        left, right = left.float(), right.float()
    sum_LR = left.new_empty((left.shape[0], right.shape[1]), dtype=torch.float32)
    multiply_add(sum_LR, left, right, add=False)
    return sum_LR


def _input_gradient(
    dx_PI: Tensor,
    dy_PO: Tensor,
    weight_OI: Tensor,
    low_PR: Tensor | None,
    a_RI: Tensor | None,
    dropout: float,
    seed: int,
) -> None:
    """dx <- dy W, rounded, + mask (low A); low = scaling dy B / (1 - p)."""
    torch.mm(dy_PO, weight_OI, out=dx_PI)
    if low_PR is None or a_RI is None or not dx_PI.numel():
        return
    a_RI = unit_stride(a_RI)
    rows, width = dx_PI.shape
    options = _small_blocks(a_RI.dtype)
    even = multiples_of_16(dx_PI, a_RI, width, a_RI.stride(0))
    grid = (cdiv(rows, options["BLOCK_R"]), cdiv(width, options["BLOCK_K"]))
    _update_kernel[even][grid](
        dx_PI,
        low_PR.contiguous(),
        a_RI,
        rows,
        width,
        len(a_RI),
        a_RI.stride(0),
        dropout_key(seed) if dropout else 0,
        dropout_threshold(dropout),
        DROP=dropout > 0,
        **options,
    )


def launches(capability: int) -> list[Launch]:
    """The forms in which the kernels can be launched.

    The options once all off and once all on, which takes most registers. fp16 stands for bf16 too
    where only one of them is listed: they differ in the name of an instruction.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    found: list[Launch] = []
    for dtype, low_dtype, full, even, wide in (
        (bf16, bf16, False, True, True),
        (bf16, bf16, True, True, True),
        (bf16, bf16, True, True, False),
        (fp16, fp16, False, False, False),
        (fp16, fp16, True, False, False),
        (bf16, fp32, True, True, True),
        (bf16, fp32, True, False, True),
        (fp32, fp32, False, True, True),
        (fp32, fp32, True, True, True),
        (fp32, fp32, True, False, True),
    ):
        found += forms(capability, dtype, low_dtype, full=full, even=even, wide=wide)
    return found


def forms(
    capability: int,
    dtype: torch.dtype,
    low_dtype: torch.dtype,
    *,
    full: bool,
    even: bool,
    wide: bool,
) -> list[Launch]:
    """The three kernels for adapters of one dtype, with all options or without."""
    name, low = SIGNATURE[dtype], SIGNATURE[low_dtype]
    ends = " ".join(f"stop_{s}" for s in range(SEGMENTS))
    ups = " ".join(f"up_{s}" for s in range(SEGMENTS))
    tile = blocks(dtype, low_dtype, capability, even=even, wide=wide)
    small = _small_blocks(low_dtype)
    types = [
        (f"*{name}", "x weight y dx" + " bias kept" * full),
        (f"*{low}", f"a low {ups}"),
        ("i32", f"row_blocks {ends} adapted rows inputs outputs rank width"),
        ("i32", "x_stride weight_stride a_stride key threshold"),
        ("fp32", "scaling"),
    ]
    product = {"HAS_BIAS": full, "EVEN": even, **tile}
    down = {"DROP": full, "KEEP": full, **small}
    update = {"DROP": full, **small}
    return [
        Launch.of(_linear_kernel, even, types, product, products=True),
        Launch.of(_low_kernel, even, types, down, products=True),
        Launch.of(_update_kernel, even, [*types, ("*fp32", "low")], update, products=True),
    ]
