"""Log-probs and their gradient under a frozen head in two products: bf16, on 9.x.

With y the logits in base 2 (:mod:`head`), the target's own product gives y_t before any other, and

    others = sum_{v != t} 2^(y_v - y_t),      log p_t = -log(1 + others),
    d log p_t / d hidden = (others s_t W_t - sum_{v != t} 2^(y_v - y_t) s_v W_v) / (1 + others)

(times the temperature; s the slopes of the soft cap, 1 without): no maximum is needed, nothing is
rescaled, and where p_t is nearly 1, 1 - p_t = others / (1 + others) has all its digits. So one
kernel multiplies, and writes the weights 2^(y - y_t) s in 16 bits while the tile is in registers;
logits are never stored. bf16 has the range of fp32: a weight is rounded by 2^-9 of itself, however
large. A row that the range does not hold (some p_v above 2^100 p_t) is computed again, by the way
of all other forms.

At 4096 x 4096 x 128,256 each of the two products is 4.3 TFLOP. 16-bit weights are 1.05 GB in and
out of memory, where fp32 logits beside them were 5.3 GB.

Shape suffixes: A active rows, R rows and T vocabulary entries of a block, C entries of a chunk, H
hidden size, S vocabulary tiles.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from alphaspin_kernels._triton import head
from alphaspin_kernels._triton.common import (
    Fast,
    Kernel,
    Launch,
    at_least_one,
    capability_of,
    cdiv,
    dot,
    multiples_of_16,
    multiply_add,
    processors,
    tanh,
)

LARGEST = 2.0**100  # of a row's `others`: weights stay 27 powers of two below the end of the range
CHUNK = 64  # tiles of a chunk, about: 134 MB of weights for 4096 rows
GROUP = 16  # blocks of rows that run together: their hidden states stay in the L2 cache
INSTRUCTIONS = {False: 7.0, True: 30.0}  # as head.INSTRUCTIONS
PACKED = {"BLOCK_R": 128, "BLOCK_T": 64, "num_warps": 8}
# Three buffers of 48 KB for the products.
GATHERED = {"BLOCK_R": 128, "BLOCK_H": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 5}


@triton.jit
def _weights(
    z_RT,
    bias,
    t,
    V,
    target_R,
    own_R,
    inverse_cap,
    scale,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """2^(y - y_t) of a piece of a tile, and times the slope; 0 at the target and past the end."""
    if HAS_BIAS:
        z_RT += tl.load(bias + t, mask=t < V, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        z_RT = tanh(z_RT * inverse_cap)
    e_RT = tl.exp2(z_RT * scale - own_R[:, None])
    e_RT = tl.where((t < V)[None, :] & (t[None, :] != target_R[:, None]), e_RT, 0.0)
    if CAPPED:
        return e_RT, e_RT * (1.0 - z_RT * z_RT)
    return e_RT, e_RT


@Kernel("hidden weight p H hidden_stride weight_stride")
def _weights_kernel(
    hidden,
    weight,
    p,
    bias,
    targets,
    own,
    sums,
    limits,
    flags,
    left,
    start,
    A,
    V,
    H,
    hidden_stride,
    weight_stride,
    inverse_cap,
    scale,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SPARSE: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_H: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Weights [A, V] of a chunk, V entries from `start` on, and their sums before the slope [S, A].

    As head's forward kernel, in halves, of which S are. Tiles that run together are of GROUP blocks
    of rows. SPARSE: also which entries some row of a block needs, its weight being at least the
    row's limit, and the sums of those left out [S, A].
    """
    tl.assume(H > 0)
    row_blocks = tl.cdiv(A, BLOCK_R)
    parts = tl.cdiv(V, BLOCK_T)
    for tile in tl.range(tl.program_id(0), row_blocks * parts, tl.num_programs(0), flatten=FLAT):
        first = tile // (GROUP * parts) * GROUP
        together = tl.minimum(row_blocks - first, GROUP)
        inside = tile % (GROUP * parts)
        row = (first + inside % together) * BLOCK_R
        part = inside // together
        z_RT = head._product(
            hidden,
            weight,
            row,
            part * BLOCK_T,
            A,
            V,
            H,
            hidden_stride,
            weight_stride,
            TMA,
            EVEN_H,
            BLOCK_R,
            BLOCK_T,
            BLOCK_H,
        )
        r = row + tl.arange(0, BLOCK_R)
        own_R = tl.load(own + r, mask=r < A, other=0.0)
        target_R = (tl.load(targets + r, mask=r < A, other=0) - start).to(tl.int32)
        PIECE: tl.constexpr = BLOCK_T // 2
        t = part * BLOCK_T + tl.arange(0, PIECE)
        at = part.to(tl.int64) * 2 * A + r
        a_RT, b_RT = head._halves(z_RT, BLOCK_R, BLOCK_T)
        e_RT, p_RT = _weights(
            a_RT, bias, t, V, target_R, own_R, inverse_cap, scale, HAS_BIAS, CAPPED
        )
        p.store([row, part * BLOCK_T], p_RT.to(tl.bfloat16))
        tl.store(sums + at, tl.sum(e_RT, 1), mask=r < A)
        if SPARSE:
            limit_R = tl.load(limits + r, mask=r < A, other=float("inf"))
            _choose(e_RT, limit_R, flags + row // BLOCK_R * V, t, V, left + at, r < A)
        e_RT, p_RT = _weights(
            b_RT, bias, t + PIECE, V, target_R, own_R, inverse_cap, scale, HAS_BIAS, CAPPED
        )
        p.store([row, part * BLOCK_T + PIECE], p_RT.to(tl.bfloat16))
        tl.store(sums + at + A, tl.sum(e_RT, 1), mask=r < A)
        if SPARSE:
            _choose(e_RT, limit_R, flags + row // BLOCK_R * V, t + PIECE, V, left + at + A, r < A)


@triton.jit
def _choose(e_RT, limit_R, flags, t, V, left, inside_R):
    """Which entries are needed, and the sum of the others in each row."""
    need_T = tl.max((e_RT >= limit_R[:, None]).to(tl.int32), 0)
    tl.store(flags + t, need_T.to(tl.int8), mask=t < V)
    tl.store(left, tl.sum(tl.where(need_T[None, :] != 0, 0.0, e_RT), 1), mask=inside_R)


@Kernel("p packed stride")
def _pack_kernel(
    p, flags, places, kept, packed, A, V, stride, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr
):
    """The needed entries of a block of rows one after another, and which they are."""
    block = tl.program_id(0)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    need_T = tl.load(flags + block * V + t, mask=t < V, other=0) != 0
    place_T = tl.load(places + block * V + t, mask=need_T, other=1) - 1
    tl.store(kept + block * V + place_T, t, mask=need_T)
    row_R1 = r.to(tl.int64)[:, None] * stride
    inside = (r < A)[:, None] & need_T[None, :]
    p_RT = tl.load(p + row_R1 + t[None, :], mask=inside)
    tl.store(packed + row_R1 + place_T[None, :], p_RT, mask=inside)


@triton.jit
def _add(means, sum_RH, row, h, R: tl.constexpr, PIECE: tl.constexpr):
    """Add two pieces, side by side, to what is there."""
    a_RH, b_RH = head._halves(sum_RH, R, 2 * PIECE)
    means.store([row, h], means.load([row, h]) + a_RH)
    means.store([row, h + PIECE], means.load([row, h + PIECE]) + b_RH)


@Kernel("weight H weight_stride")
def _gathered_kernel(
    packed,
    weight,
    means,
    kept,
    places,
    V,
    H,
    weight_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """means += p W over the needed entries of a block of rows: rows of W are gathered."""
    block, first = tl.program_id(0), tl.program_id(1) * BLOCK_H
    count = tl.load(places + block * V + V - 1)
    row, h = block * BLOCK_R, first + tl.arange(0, BLOCK_H)
    sum_RH = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for at in range(0, at_least_one(count), BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        t = tl.load(kept + block * V + k, mask=k < count, other=0)
        inside = (k < count)[:, None] & (h < H)[None, :]
        # Past the end p is what was there, and W is 0.
        weight_KH = weight + t.to(tl.int64)[:, None] * weight_stride + h[None, :]
        weight_KH = tl.load(weight_KH, mask=inside, other=0.0)
        sum_RH = dot(packed.load([row, at]), weight_KH, sum_RH)
    # In quarters, for which there is room in shared memory.
    PIECE: tl.constexpr = BLOCK_H // 4
    a_RH, b_RH = head._halves(sum_RH, BLOCK_R, BLOCK_H)
    _add(means, a_RH, row, first, BLOCK_R, PIECE)
    _add(means, b_RH, row, first + 2 * PIECE, BLOCK_R, PIECE)


@Kernel("means weight gradient H weight_stride")
def _row_kernel(
    means,
    weight,
    targets,
    own,
    others,
    gradient,
    H,
    weight_stride,
    inverse_scale,
    inverse_temperature,
    CAPPED: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One row of d log p_t / d hidden, from the weighted sum of the head's rows."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    others = tl.load(others + row)
    share = inverse_temperature / (1.0 + others)
    slope = others
    if CAPPED:
        z = tl.load(own + row) * inverse_scale
        slope = others * (1.0 - z * z)
    target = tl.load(targets + row)
    mean_H = tl.load(means + row * H + h, mask=h < H)
    weight_H = tl.load(weight + target * weight_stride + h, mask=h < H).to(tl.float32)
    d_H = (slope * weight_H - mean_H) * share
    tl.store(gradient + row * H + h, d_H.to(gradient.dtype.element_ty), mask=h < H)


def serves(hidden: Tensor, weight: Tensor, per_row: int) -> bool:
    """Whether rows of such a matrix go this way: on 9.x; on 10.0 cuBLAS's products are faster."""
    copied = head._copied(weight) and hidden.shape[1] * hidden.element_size() % 16 == 0
    fits = hidden.dtype == torch.bfloat16 and per_row == 1
    return fits and copied and capability_of(weight) // 10 == 9


def forward_with_row(
    hidden_AH: Tensor,
    weight: Tensor,
    targets_A1: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    skip_below: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs [A, 1], log-normaliser [A], gradient [A, H] in bf16, skipped mass, and what failed.

    Rows [A] that failed have left the range, or are not finite.
    """
    (count, width), vocabulary = hidden_AH.shape, len(weight)
    options = (bias, softcap, temperature)
    own_A = head.at_targets(hidden_AH, weight, targets_A1, *options)[:, 0].contiguous()
    arguments = head._arguments(*options)
    blocks = _blocks(capability_of(weight))
    tile = blocks["BLOCK_T"]
    piece, programs = tile // 2, processors(weight)
    row_blocks, parts = cdiv(count, blocks["BLOCK_R"]), cdiv(vocabulary, tile)
    chunk = tile * min(_chunk(row_blocks, parts, programs), parts)
    fp32 = {"dtype": torch.float32, "device": hidden_AH.device}
    sums_SA = torch.empty((2 * parts, count), **fp32)
    mean_AH = torch.empty((count, width), **fp32)
    so_far_A = torch.ones(count, **fp32)
    left_SA = torch.zeros_like(sums_SA) if skip_below else sums_SA[:0]
    # Finite where nothing is packed yet.
    packed = hidden_AH.new_zeros((count, chunk if skip_below else 0))
    p = hidden_AH.new_empty((count, chunk))
    hidden = _blocked(hidden_AH, blocks["BLOCK_R"], blocks["BLOCK_H"])
    for start in range(0, vocabulary, chunk):
        weight_CH = weight[start : start + chunk]
        entries = len(weight_CH)
        p_AC, used = p[:, :entries], cdiv(entries, tile)
        arguments["bias"] = None if bias is None else bias[start : start + chunk].contiguous()
        sums_CA = sums_SA[2 * start // tile :][: 2 * used]
        # The first chunk is multiplied whole: nothing is known before of how large p is.
        sparse = skip_below > 0 and start > 0
        flags_BC = p.new_empty((row_blocks, entries if sparse else 0), dtype=torch.int8)
        _weights_kernel[False][(min(row_blocks * used, programs),)](
            hidden=hidden,
            weight=_blocked(weight_CH, tile, blocks["BLOCK_H"]),
            p=_blocked(p_AC, blocks["BLOCK_R"], piece),
            targets=targets_A1,
            own=own_A,
            sums=sums_CA,
            limits=so_far_A * skip_below if sparse else so_far_A,
            flags=flags_BC,
            left=left_SA[2 * start // tile :],
            start=start,
            A=count,
            V=entries,
            H=width,
            hidden_stride=hidden_AH.stride(0),
            weight_stride=weight.stride(0),
            SPARSE=sparse,
            **arguments,
            **blocks,
        )
        if skip_below:
            so_far_A += sums_CA.sum(0)
        if sparse:
            _add_needed(mean_AH, p_AC, weight_CH, flags_BC, packed)
        else:
            multiply_add(mean_AH, p_AC, weight_CH, add=start > 0)
    others_A = sums_SA.sum(0)
    gradient_AH = torch.empty_like(hidden_AH)
    block = min(1024, triton.next_power_of_2(width))
    even = multiples_of_16(mean_AH, weight, gradient_AH, width, weight.stride(0))
    _row_kernel[even][(count, cdiv(width, block))](
        means=mean_AH,
        weight=weight,
        targets=targets_A1,
        own=own_A,
        others=others_A,
        gradient=gradient_AH,
        H=width,
        weight_stride=weight.stride(0),
        inverse_scale=1.0 / arguments["scale"],
        inverse_temperature=1.0 / temperature,
        CAPPED=softcap is not None,
        BLOCK_H=block,
    )
    log_A = others_A.double().log1p_()
    lse_A = torch.add(log_A, own_A.double(), alpha=head.LN2).float()
    failed_A = ~(others_A < LARGEST)
    skipped_A = left_SA.sum(0) / (1 + others_A)
    return -log_A.float()[:, None], lse_A, gradient_AH, skipped_A, failed_A


def selected(rows_R: Tensor, mask_R: Tensor) -> Tensor:
    """The rows where the mask is set; the host waits for the device."""
    return rows_R[mask_R]


def _add_needed(
    mean_AH: Tensor, p_AC: Tensor, weight_CH: Tensor, flags_BC: Tensor, packed: Tensor
) -> None:
    """mean += p W over the entries that are flagged for each block of rows."""
    (count, width), (row_blocks, entries), config = mean_AH.shape, flags_BC.shape, GATHERED
    places_BC = flags_BC.cumsum(1, dtype=torch.int32)
    kept_BC = torch.empty_like(places_BC)
    even = multiples_of_16(p_AC, packed, p_AC.stride(0))
    _pack_kernel[even][(row_blocks, cdiv(entries, PACKED["BLOCK_T"]))](
        p=p_AC,
        flags=flags_BC,
        places=places_BC,
        kept=kept_BC,
        packed=packed,
        A=count,
        V=entries,
        stride=p_AC.stride(0),
        **PACKED,
    )
    even = multiples_of_16(weight_CH, width, weight_CH.stride(0))
    _gathered_kernel[even][(row_blocks, cdiv(width, config["BLOCK_H"]))](
        packed=_blocked(packed, config["BLOCK_R"], config["BLOCK_K"]),
        weight=weight_CH,
        means=_blocked(mean_AH, config["BLOCK_R"], config["BLOCK_H"] // 4),
        kept=kept_BC,
        places=places_BC,
        V=entries,
        H=width,
        weight_stride=weight_CH.stride(0),
        **config,
    )


@functools.cache
def _chunk(row_blocks: int, parts: int, programs: int) -> int:
    """Tiles of a chunk: of sizes about CHUNK, that with the fewest tiles a program in all."""

    def rounds(size: int) -> int:
        full, rest = divmod(parts, size)
        return full * cdiv(row_blocks * size, programs) + cdiv(row_blocks * rest, programs)

    return min(range(CHUNK, CHUNK + 16), key=rounds)


def _blocks(capability: int) -> dict[str, Any]:
    """Those of the forward kernel, always in halves."""
    own = head.blocks(torch.bfloat16, capability, tma=True, even=False, mixed=False, targets=False)
    return {name: value for name, value in own.items() if name != "TWO"} | {"GROUP": GROUP}


def _blocked(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, columns])


def launches(capability: int) -> list[Launch]:
    """Every form in which the kernels can be launched."""
    if capability // 10 != 9:
        return []
    found: list[Launch] = []
    own = _blocks(capability)
    r, t, h = (own[f"BLOCK_{axis}"] for axis in "RTH")
    for full in (False, True):
        types = [
            (f"tensordesc<bf16{[r, h]}>", "hidden"),
            (f"tensordesc<bf16{[t, h]}>", "weight"),
            (f"tensordesc<bf16{[r, t // 2]}>", "p"),
            ("*bf16", "bias" * full),
            ("*i64", "targets"),
            ("*i8", "flags"),
            ("*fp32", "own sums limits left"),
            ("i32", "start A V H hidden_stride weight_stride"),
            ("fp32", "inverse_cap scale"),
        ]
        fast = Fast("m64n256k16", r * t, INSTRUCTIONS[full])
        options = own | {"HAS_BIAS": full, "CAPPED": full, "SPARSE": full}
        found.append(Launch.of(_weights_kernel, False, types, options, products=True, fast=fast))
        types = [
            ("*fp32", "means own others"),
            ("*bf16", "weight gradient"),
            ("*i64", "targets"),
            ("i32", "H weight_stride"),
            ("fp32", "inverse_scale inverse_temperature"),
        ]
        options = {"CAPPED": full, "BLOCK_H": 1024}
        found += [Launch.of(_row_kernel, even, types, options) for even in (True, False)]
    for even in (True, False):
        types = [
            (f"tensordesc<bf16{[GATHERED['BLOCK_R'], GATHERED['BLOCK_K']]}>", "packed"),
            ("*bf16", "weight"),
            (f"tensordesc<fp32{[GATHERED['BLOCK_R'], GATHERED['BLOCK_H'] // 4]}>", "means"),
            ("*i32", "kept places"),
            ("i32", "V H weight_stride"),
        ]
        found.append(Launch.of(_gathered_kernel, even, types, GATHERED, products=True))
        types = [
            ("*bf16", "p packed"),
            ("*i8", "flags"),
            ("*i32", "kept places"),
            ("i32", "A V stride"),
        ]
        found.append(Launch.of(_pack_kernel, even, types, PACKED))
    return found
