"""Log-sum-exp of rows of logits that are never stored: the forward pass of a head on the GPU.

Programs are as many as processors; each takes one tile of BLOCK_R rows x BLOCK_T entries after
another and leaves the tile's maximum and sum, [vocabulary tiles, rows], which PyTorch combines. No
state goes from tile to tile: work is shared evenly, and the copies of the next tile run during the
epilogue of this one. On capability 9.0 and above, 16-bit tiles come by the copy engine (TMA, tensor
descriptors); otherwise by pointers. Not warp-specialised: triton 3.9 makes that of it only with 640
bytes of spills on 9.0; two warpgroups keep two groups of wgmma in flight without.

All is in base 2: y = z' log2(e), of which log2(e) / temperature is one factor, so that an entry
costs a maximum, a fused multiply-add, an exp2, an addition, and a choice at the vocabulary's end.
Logits at the targets are products of their own, 1 / 501 of the work at V 128k.

The mixture has the rows of both policies in one matrix, eight of one and eight of the other in
turn: a thread of the tensor cores' layout then holds both logits of an entry (not on 10.0, where
they change places in shared memory), and the loop over H is that of one policy with twice the rows.
At 4096 x 4096 x 128,256 on an H200 one policy's kernel took 5.35 ms, 804 TFLOP/s. An estimate for
two, not measured: products 10.7 ms; its three exp2 for two entries take 3,072 cycles of the
special-function units beside 65,536 of the tensor cores a tile, one policy's 2,048 (+ 0.2 ms);
rows put in turn 0.06 ms, tiles' sums 0.1 ms.

Shape suffixes: A active rows, R rows and T vocabulary entries of a block, H hidden size, V
vocabulary, K targets per row, S vocabulary tiles, M log-sum-exps of a row: 1, or 3 of the mixture.
"""

import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from alphaspin_kernels._triton.common import (
    LOWEST,
    SIGNATURE,
    Fast,
    Kernel,
    Launch,
    capability_of,
    cdiv,
    dot,
    multiples_of_16,
    processors,
    tanh,
)

# Rows of a launch: their hidden states, 16 MiB at H 4096, stay in the L2 cache beside the head's
# tiles, and maxima and sums of the tiles take 8 MiB at V 128k.
ROWS = 2048
LN2 = math.log(2)
# fp32 instructions an entry of a tile, at most, by MIXED and whether there are bias and softcap, on
# 9.0. On 10.0 the code has the epilogue twice, and the mixture's rows change places.
INSTRUCTIONS = {(False, False): 6.0, (False, True): 25.0, (True, False): 10.0, (True, True): 29.0}


@triton.jit
def _entries(z_RT, bias, t, V, inverse_cap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """y / scale of a piece of a tile; -inf past the end of the vocabulary."""
    if HAS_BIAS:
        z_RT += tl.load(bias + t, mask=t < V, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        z_RT = tanh(z_RT * inverse_cap)
    return tl.where((t < V)[None, :], z_RT, -float("inf"))


@triton.jit
def _halves(z_RT, R: tl.constexpr, T: tl.constexpr):
    """The first and the second half of the entries."""
    return tl.split(tl.permute(tl.reshape(z_RT, (R, 2, T // 2)), (0, 2, 1)))


@triton.jit
def _policies(z_RT, R: tl.constexpr, T: tl.constexpr):
    """Of rows eight of one policy and eight of the other in turn: those of each."""
    z = tl.permute(tl.reshape(z_RT, (R // 16, 2, 8, T)), (0, 2, 3, 1))
    prev, base = tl.split(z)
    return tl.reshape(prev, (R // 2, T)), tl.reshape(base, (R // 2, T))


@triton.jit
def _store(a_RT, b_RT, scale, peaks, sums, at, inside, TWO: tl.constexpr):
    """Maximum of y and sum of 2^(y - maximum) of a tile, in one piece or two."""
    peak_R = tl.max(a_RT, 1)
    if TWO:
        peak_R = tl.maximum(peak_R, tl.max(b_RT, 1))
    # Not -inf, where all are: -inf - -inf is not a number.
    peak_R = tl.maximum(peak_R * scale, LOWEST)
    sum_R = tl.sum(tl.exp2(a_RT * scale - peak_R[:, None]), 1)
    if TWO:
        sum_R += tl.sum(tl.exp2(b_RT * scale - peak_R[:, None]), 1)
    tl.store(peaks + at, peak_R, mask=inside)
    tl.store(sums + at, sum_R, mask=inside)


@triton.jit
def _product(
    hidden,
    weight,
    row,
    start,
    A,
    V,
    H,
    hidden_stride,
    weight_stride,
    TMA: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Raw logits of a tile; what lies outside is anything finite."""
    z_RT = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    if TMA:
        for at in range(0, H, BLOCK_H):
            z_RT = dot(hidden.load([row, at]), weight.load([start, at]).T, z_RT)
    else:
        h = tl.arange(0, BLOCK_H)
        # Rows and entries past the end read the last one.
        r = tl.minimum(row + tl.arange(0, BLOCK_R), A - 1).to(tl.int64)
        t = tl.minimum(start + tl.arange(0, BLOCK_T), V - 1).to(tl.int64)
        hidden_RH = hidden + r[:, None] * hidden_stride + h[None, :]
        weight_HT = weight + t[None, :] * weight_stride + h[:, None]
        for at in range(0, H, BLOCK_H):
            if EVEN_H:
                z_RT = dot(tl.load(hidden_RH + at), tl.load(weight_HT + at), z_RT)
            else:
                inside = at + h < H
                x_RH = tl.load(hidden_RH + at, mask=inside[None, :], other=0.0)
                w_HT = tl.load(weight_HT + at, mask=inside[:, None], other=0.0)
                z_RT = dot(x_RH, w_HT, z_RT)
    return z_RT


@Kernel("hidden weight H hidden_stride weight_stride")
def _forward_kernel(
    hidden,
    weight,
    bias,
    peaks,
    sums,
    A,
    V,
    H,
    hidden_stride,
    weight_stride,
    inverse_cap,
    scale,
    alpha,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    MIXED: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_H: tl.constexpr,
    TWO: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Maximum and sum of every tile of [A, V].

    Tiles that run together have all rows and few entries: they share both in the L2 cache. TWO
    halves of the entries go through the epilogue one after the other, so that the registers hold
    half of what it needs besides the logits. FLAT makes one pipeline of the loops over tiles and H.
    """
    tl.assume(H > 0)
    row_blocks = tl.cdiv(A, BLOCK_R)
    tiles = row_blocks * tl.cdiv(V, BLOCK_T)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT):
        row = tile % row_blocks * BLOCK_R
        start = tile // row_blocks * BLOCK_T
        z_RT = _product(
            hidden,
            weight,
            row,
            start,
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
        PIECE: tl.constexpr = BLOCK_T // 2 if TWO else BLOCK_T
        t = start + tl.arange(0, PIECE)
        if TWO:
            a_RT, b_RT = _halves(z_RT, BLOCK_R, BLOCK_T)
            a_RT = _entries(a_RT, bias, t, V, inverse_cap, HAS_BIAS, CAPPED)
            b_RT = _entries(b_RT, bias, t + PIECE, V, inverse_cap, HAS_BIAS, CAPPED)
        else:
            a_RT = _entries(z_RT, bias, t, V, inverse_cap, HAS_BIAS, CAPPED)
            b_RT = a_RT
        at_S = (tile // row_blocks).to(tl.int64)
        if MIXED:
            count = A // 2
            r = row // 2 + tl.arange(0, BLOCK_R // 2)
            prev_RT, base_RT = _policies(a_RT, BLOCK_R, PIECE)
            if TWO:
                prev2_RT, base2_RT = _policies(b_RT, BLOCK_R, PIECE)
            else:
                prev2_RT, base2_RT = prev_RT, base_RT
            at, inside = at_S * 3 * count + r, r < count
            _store(prev_RT, prev2_RT, scale, peaks, sums, at, inside, TWO)
            _store(base_RT, base2_RT, scale, peaks, sums, at + count, inside, TWO)
            mixed_RT = alpha * prev_RT + (1.0 - alpha) * base_RT
            mixed2_RT = alpha * prev2_RT + (1.0 - alpha) * base2_RT
            _store(mixed_RT, mixed2_RT, scale, peaks, sums, at + 2 * count, inside, TWO)
        else:
            r = row + tl.arange(0, BLOCK_R)
            _store(a_RT, b_RT, scale, peaks, sums, at_S * A + r, r < A, TWO)


@Kernel("hidden weight H hidden_stride weight_stride")
def _target_kernel(
    hidden,
    weight,
    bias,
    chosen,
    A,
    H,
    hidden_stride,
    weight_stride,
    inverse_cap,
    scale,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """y of a row and of the entry that is the row of `weight` and `bias` with the same number.

    In the order of the forward kernel's sums, so that what is left of a peaked row's y - maximum is
    no rounding: the diagonal of a tile.
    """
    row = tl.program_id(0) * BLOCK_R
    z_RT = _product(
        hidden,
        weight,
        row,
        row,
        A,
        A,
        H,
        hidden_stride,
        weight_stride,
        TMA,
        EVEN_H,
        BLOCK_R,
        BLOCK_T,
        BLOCK_H,
    )
    own_RT = tl.arange(0, BLOCK_R)[:, None] == tl.arange(0, BLOCK_T)[None, :]
    z_R = tl.sum(tl.where(own_RT, z_RT, 0.0), 1)
    r = row + tl.arange(0, BLOCK_R)
    if HAS_BIAS:
        z_R += tl.load(bias + r, mask=r < A, other=0.0).to(tl.float32)
    if CAPPED:
        z_R = tanh(z_R * inverse_cap)
    tl.store(chosen + r, z_R * scale, mask=r < A)


def blocks(
    dtype: torch.dtype, capability: int, *, tma: bool, even: bool, mixed: bool, targets: bool
) -> dict[str, Any]:
    """Blocks of the forward kernel: as large as registers and shared memory allow.

    Those of ``targets`` are square, as only their diagonal counts.

    ``tma``: rows start at multiples of 16 bytes, and the GPU has a copy engine. ``even``: without
    it, rows start at multiples of 16 numbers and H is a multiple of 64. With neither, every load is
    masked and narrow, and what it needs besides leaves room for small blocks only.
    """
    # Tiles of rows, entries, H; warps and stages; TWO and FLAT.
    if targets and (tma or even) and dtype != torch.float32:
        sizes = (128, 128, 64, 8, 3) if tma and capability >= 100 else (64, 64, 64, 4, 3)
    elif targets:
        sizes = (64, 64, 32, 8 if not even else 4, 3)
    elif tma and capability >= 100:
        sizes = (128, 128, 64, 8, 4, mixed, True)
    elif tma:
        sizes = (128, 256, 64, 8, 3, True, True)
    elif not even:
        sizes = (64, 64, 32, 8, 3, False, False)
    elif dtype == torch.float32:
        sizes = (64, 64, 32, 4, 3, False, False)
    else:
        sizes = (128, 128, 32, 8, 4, True, False)
    names = ("BLOCK_R", "BLOCK_T", "BLOCK_H", "num_warps", "num_stages", "TWO", "FLAT")
    return dict(zip(names, sizes, strict=not targets)) | {"TMA": tma, "EVEN_H": even}


def _engine(dtype: torch.dtype, capability: int) -> bool:
    """Whether tiles come by the copy engine: 16 bits, on 9.x and 10.x (12.x has less memory)."""
    return dtype != torch.float32 and capability // 10 in (9, 10)


def _copied(x: Tensor) -> bool:
    """Whether the copy engine takes the matrix: 16-byte rows, one after another."""
    return (
        _engine(x.dtype, capability_of(x))
        and x.stride(0) >= x.shape[1]
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
    )


def _arguments(bias: Tensor | None, softcap: float | None, temperature: float) -> dict[str, Any]:
    """What makes y of raw logits."""
    return {
        "bias": None if bias is None else bias.contiguous(),
        "inverse_cap": 1.0 / (softcap or 1.0),
        "scale": (softcap or 1.0) / (temperature * LN2),
        "HAS_BIAS": bias is not None,
        "CAPPED": softcap is not None,
    }


class _Form:
    """How the product of two matrices runs: what the kernels take for it."""

    def __init__(self, hidden: Tensor, weight: Tensor, *, targets: bool, mixed: bool) -> None:
        tma = _copied(hidden) and _copied(weight)
        strides = hidden.stride(0), weight.stride(0)
        whole = hidden.shape[1] % 64 == 0 and multiples_of_16(hidden, weight, *strides)
        self.even = whole and not tma
        self.blocks = blocks(
            hidden.dtype,
            capability_of(hidden),
            tma=tma,
            even=self.even,
            mixed=mixed,
            targets=targets,
        )
        x, w = hidden, weight
        if tma:
            r, t, h = (self.blocks[f"BLOCK_{axis}"] for axis in "RTH")
            x = TensorDescriptor(x, list(x.shape), [strides[0], 1], [r, h])
            w = TensorDescriptor(w, list(w.shape), [strides[1], 1], [t, h])
        self.arguments = {
            "hidden": x,
            "weight": w,
            "A": len(hidden),
            "H": hidden.shape[1],
            "hidden_stride": strides[0],
            "weight_stride": strides[1],
            **self.blocks,
        }


def log_sums(
    hidden_AH: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    alpha: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Maximum of y and sum of 2^(y - maximum) of each row, [1, A] each.

    With ``alpha``, of the previous iterate, the base and the mixture, [3, A / 2]: the rows are
    those that :func:`interleave` makes.
    """
    count, vocabulary, mixed = len(hidden_AH), len(weight), alpha is not None
    form = _Form(hidden_AH, weight, targets=False, mixed=mixed)
    parts = cdiv(vocabulary, form.blocks["BLOCK_T"])
    tiles = cdiv(count, form.blocks["BLOCK_R"]) * parts
    shape = (2, parts, 3, count // 2) if mixed else (2, parts, 1, count)
    peaks_SMA, sums_SMA = weight.new_empty(shape, dtype=torch.float32)
    _forward_kernel[form.even][(min(tiles, processors(weight)),)](
        peaks=peaks_SMA,
        sums=sums_SMA,
        V=vocabulary,
        alpha=alpha or 0.0,
        MIXED=mixed,
        **_arguments(bias, softcap, temperature),
        **form.arguments,
    )
    peak_MA = peaks_SMA.amax(0)
    return peak_MA, (peaks_SMA.sub_(peak_MA).exp2_() * sums_SMA).sum(0)


def at_targets(
    hidden_AH: Tensor,
    weight: Tensor,
    targets_AK: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """y at the targets, [A, K]; of a target below 0, that of entry 0."""
    chosen_KA = weight.new_empty(targets_AK.T.shape, dtype=torch.float32)
    for targets_A, chosen_A in zip(targets_AK.clamp(min=0).T, chosen_KA, strict=True):
        form = _Form(hidden_AH, weight[targets_A], targets=True, mixed=False)
        bias_A = None if bias is None else bias[targets_A]
        _target_kernel[form.even][(cdiv(len(hidden_AH), form.blocks["BLOCK_R"]),)](
            chosen=chosen_A, **_arguments(bias_A, softcap, temperature), **form.arguments
        )
    return chosen_KA.T


def interleave(prev_AN: Tensor, base_AN: Tensor) -> Tensor:
    """Eight rows of each in turn; the last one again up to a multiple of 8."""
    count = len(prev_AN)
    index = torch.arange(-(-count // 8) * 8, device=prev_AN.device).clamp_(max=count - 1)
    pairs = [x[index].unflatten(0, (-1, 1, 8)) for x in (prev_AN, base_AN)]
    return torch.cat(pairs, 1).flatten(0, 2)


def launches(capability: int, *, mixed: bool) -> list[Launch]:
    """Every form in which the kernels can be launched; options once all off and once all on."""
    found: list[Launch] = []
    for (dtype, name), full in itertools.product(SIGNATURE.items(), (False, True)):
        tma = _engine(dtype, capability)
        for targets in (False,) if mixed else (False, True):
            for copied, even in ((tma, not tma), (False, False)):
                own = blocks(dtype, capability, tma=copied, even=even, mixed=mixed, targets=targets)
                types = [
                    (f"*{name}", "hidden weight" + " bias" * full),
                    ("*fp32", "peaks sums chosen"),
                    ("i32", "A V H hidden_stride weight_stride"),
                    ("fp32", "inverse_cap scale alpha"),
                ]
                if copied:
                    for argument, axis in (("hidden", "R"), ("weight", "T")):
                        block = [own[f"BLOCK_{axis}"], own["BLOCK_H"]]
                        types.append((f"tensordesc<{name}{block}>", argument))
                options = own | {"HAS_BIAS": full, "CAPPED": full}
                if targets:
                    found.append(Launch.of(_target_kernel, even, types, options, products=True))
                    continue
                fast = Fast(
                    "m64n256k16" if capability == 90 else "",
                    own["BLOCK_R"] * own["BLOCK_T"],
                    INSTRUCTIONS[mixed, full] * (1.0 if capability == 90 else 2.5),
                )
                options["MIXED"] = mixed
                form = Launch.of(
                    _forward_kernel,
                    even,
                    types,
                    options,
                    products=True,
                    fast=fast if copied else None,
                )
                found.append(form)
    return found
