"""What an operator computes in the same way in PyTorch and around its Triton kernels.

Below both: ``_triton`` imports no operator, so that an operator can import its kernels.

Shape suffixes: R rows, K targets per row.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def active_rows(targets_NK: Tensor, ignore_index: int) -> Tensor:
    """Indices [A] of the rows with at least one target that is not ignored."""
    return (targets_NK != ignore_index).any(1).nonzero().squeeze(1)


def target_slope(z_RK: Tensor, softcap: float | None, temperature: float) -> Tensor:
    """d z' / d z at the targets, from z'."""
    if softcap is None:
        return torch.full_like(z_RK, 1.0 / temperature)
    return (1.0 - (z_RK * (temperature / softcap)).square()) / temperature


def mix(prev: Tensor, base: Tensor, alpha: float) -> Tensor:
    """alpha prev + (1 - alpha) base; what has weight 0 need not be finite."""
    if alpha in (0, 1):
        return (prev if alpha else base).clone()
    return alpha * prev + (1 - alpha) * base


def finish_mixture(
    z_RK: Tensor, peak_3R: Tensor, sum_3R: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """(log p, log Z) from the mixed logits at the targets, the maxima and the sums.

    The maxima and sums are of the previous iterate, the base and the mixture. Differences of maxima
    first, in float64: each is large where logits are, and cancels.
    """
    log_sum_3R = sum_3R.double().log()
    peak_3R = peak_3R.double()
    logp_RK = z_RK.double() - peak_3R[2, :, None] - log_sum_3R[2, :, None]
    prev_R, base_R, mixed_R = peak_3R + log_sum_3R
    log_z_R = mixed_R - mix(prev_R, base_R, alpha)
    return logp_RK.to(z_RK.dtype), log_z_R.to(z_RK.dtype)


def segment_pairs(
    a: Tensor | None,
    b: Tensor | None,
    others_a: list[Tensor],
    others_b: list[Tensor],
    segments: list[int],
    slots: list[int],
) -> list[tuple[slice, tuple[Tensor, Tensor] | None]]:
    """The rows and the adapter of each segment, from the arguments of the LoRA operator."""
    pairs: list[tuple[slice, tuple[Tensor, Tensor] | None]] = []
    start, pair = 0, None if a is None or b is None else (a, b)
    for s, count in enumerate(segments):
        if s:
            pair = None if slots[s] < 0 else (others_a[slots[s]], others_b[slots[s]])
        pairs.append((slice(start, start + count), pair))
        start += count
    return pairs


def part(x: Tensor, rows: slice) -> Tensor:
    """x[rows], or x itself if these are all: a view takes longer than all else before a launch."""
    return x if rows.start == 0 and rows.stop == x.shape[0] else x[rows]


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For products in the dtypes of their factors; costs nothing where autocast is off."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def subtb_rates(lam: float) -> tuple[float, float]:
    """Return (lam, 1), or (1, 1 / lam) for lam > 1: factor of a step, of the scale it is in."""
    return min(lam, 1.0), 1.0 / max(lam, 1.0)
