"""Log-probabilities of target tokens from logits: ``logits_logprob.py`` one folder up, in Triton.

One program per row forward, one per row and tile backward. Both are bound by memory: the logits are
read once each way, in vectors of 16 bytes where V and the addresses are multiples of 16.

Shape suffixes: N rows, V vocabulary, K targets per row.
"""

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from alphaspin_kernels._triton.common import SIGNATURE, Kernel, Launch, cdiv, multiples_of_16, tanh
from alphaspin_kernels.checks import check_targets

TILE = 4096
NUM_WARPS = 8


@triton.jit
def _transform(z, scale, uncap):
    """z' = scale * tanh(uncap * z), or scale * z without a softcap (uncap 0)."""
    if uncap != 0.0:
        z = tanh(z * uncap)
    return z * scale


@triton.jit
def _counted(targets, targets_per_row):
    """Number of targets of the row that are not ignored (-1)."""
    count = 0
    for k in range(targets_per_row):
        count += (tl.load(targets + k) >= 0).to(tl.int32)
    return count


@Kernel("logits vocabulary stride")
def forward(
    logits,
    targets,
    logp,
    normaliser,
    vocabulary,
    stride,
    targets_per_row,
    scale,
    uncap,
    TILE: tl.constexpr,
):
    """Log-probs of a row's targets, and its maximum and log-sum; 0 for a row that is not read."""
    n = tl.program_id(0).to(tl.int64)
    logits += n * stride
    targets += n * targets_per_row
    logp += n * targets_per_row
    normaliser += n * 2
    if _counted(targets, targets_per_row) > 0:
        # Not -inf: a first tile of nothing but -inf (masked padding) would give -inf - -inf.
        maximum = -3.4028234663852886e38
        total = 0.0
        for start in range(0, vocabulary, TILE):
            v = start + tl.arange(0, TILE)
            z = tl.load(logits + v, mask=v < vocabulary, other=0.0).to(tl.float32)
            z = tl.where(v < vocabulary, _transform(z, scale, uncap), -float("inf"))
            new_maximum = tl.maximum(maximum, tl.max(z, 0))
            total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(z - new_maximum), 0)
            maximum = new_maximum
        log_sum = tl.log(total)
        tl.store(normaliser, maximum)
        tl.store(normaliser + 1, log_sum)
        for k in range(targets_per_row):
            target = tl.load(targets + k)
            z = tl.load(logits + target, mask=target >= 0, other=0.0).to(tl.float32)
            # z - max first: both are large together on peaked rows.
            value = _transform(z, scale, uncap) - maximum - log_sum
            tl.store(logp + k, tl.where(target >= 0, value, 0.0))
    else:
        tl.store(normaliser, 0.0)
        tl.store(normaliser + 1, 0.0)
        for k in range(targets_per_row):
            tl.store(logp + k, 0.0)


@Kernel("logits out vocabulary stride out_stride")
def backward(
    out,
    grad,
    logits,
    targets,
    normaliser,
    vocabulary,
    stride,
    out_stride,
    targets_per_row,
    scale,
    uncap,
    inverse_temperature,
    TILE: tl.constexpr,
):
    """One tile of a row of d loss / d logits; out may be the logits, each tile is read first."""
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = v < vocabulary
    out += n * out_stride + v
    targets += n * targets_per_row
    grad += n * targets_per_row
    if _counted(targets, targets_per_row) > 0:
        z = tl.load(logits + n * stride + v, mask=inside, other=0.0).to(tl.float32)
        z = _transform(z, scale, uncap)
        p = tl.exp(z - tl.load(normaliser + n * 2) - tl.load(normaliser + n * 2 + 1))
        total = 0.0
        at_target = tl.zeros([TILE], tl.float32)
        for k in range(targets_per_row):
            target = tl.load(targets + k)
            # Padding of an ignored target may be anything: it is not read.
            g = tl.load(grad + k, mask=target >= 0, other=0.0)
            total += g
            at_target += tl.where(v == target, g, 0.0)
        d = at_target - total * p
        if uncap != 0.0:
            t = z / scale
            d *= 1.0 - t * t
        tl.store(out, (d * inverse_temperature).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out, tl.zeros([TILE], out.dtype.element_ty), mask=inside)


def logits_logprob(
    logits: Tensor,
    targets: Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Launch :func:`forward`. Returns (logp [N, K], normaliser [N, 2]), fp32."""
    rows, vocabulary = logits.shape
    check_targets(targets, vocabulary, ignore_index)
    logits_NV, targets_NK = _dense(logits), _targets(targets, ignore_index)
    logp_NK = logits.new_empty(targets.shape, dtype=torch.float32)
    normaliser_N2 = logits.new_empty((rows, 2), dtype=torch.float32)
    scale, uncap = _head(softcap, temperature)
    if rows:
        even = multiples_of_16(logits_NV, vocabulary, logits_NV.stride(0))
        forward[even][(rows,)](
            logits_NV,
            targets_NK,
            logp_NK,
            normaliser_N2,
            vocabulary,
            logits_NV.stride(0),
            targets.shape[1],
            scale,
            uncap,
            TILE=TILE,
            num_warps=NUM_WARPS,
        )
    return logp_NK, normaliser_N2


def logits_logprob_gradient(
    out: Tensor,
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> None:
    """Launch :func:`backward`: d loss / d logits to ``out``, which may be the logits themselves."""
    rows, vocabulary = logits.shape
    if vocabulary > 1 and out.stride(1) != 1:
        raise ValueError(f"out must have contiguous rows, got strides {out.stride()}")
    logits_NV = _dense(logits)
    scale, uncap = _head(softcap, temperature)
    if rows and vocabulary:
        strides = logits_NV.stride(0), out.stride(0)
        even = multiples_of_16(logits_NV, out, vocabulary, *strides)
        backward[even][(rows, cdiv(vocabulary, TILE))](
            out,
            grad.contiguous(),
            logits_NV,
            _targets(targets, ignore_index),
            normaliser.contiguous(),
            vocabulary,
            *strides,
            targets.shape[1],
            scale,
            uncap,
            1.0 / temperature,
            TILE=TILE,
            num_warps=NUM_WARPS,
        )


def _dense(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def _targets(targets_NK: Tensor, ignore_index: int) -> Tensor:
    """Contiguous int32, -1 where ignored."""
    return targets_NK.masked_fill(targets_NK == ignore_index, -1).int().contiguous()


def _head(softcap: float | None, temperature: float) -> tuple[float, float]:
    """Return (scale, uncap) of :func:`_transform`."""
    if softcap is None:
        return 1.0 / temperature, 0.0
    return softcap / temperature, 1.0 / softcap


def launches(capability: int) -> list[Launch]:
    """Every form in which the kernels can be launched."""
    del capability
    found: list[Launch] = []
    for name, even in product(SIGNATURE.values(), (True, False)):
        types = [
            (f"*{name}", "logits out"),
            ("*i32", "targets"),
            ("*fp32", "logp normaliser grad"),
            ("i32", "vocabulary stride out_stride targets_per_row"),
            ("fp32", "scale uncap inverse_temperature"),
        ]
        options = {"TILE": TILE, "num_warps": NUM_WARPS}
        found += [Launch.of(kernel, even, types, options) for kernel in (forward, backward)]
    return found
