"""Sub-trajectory balance in O(L): the recursions of ``alphaspin_kernels/subtb_loss.py`` in Triton.

A program takes a block of rows, one per thread, through the states in order and, for the gradient,
back again, all in fp64: the steps wait for each other, not for the arithmetic.

Shape suffixes: B sequences, L tokens, S = L + 1 states.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alphaspin_kernels._triton.common import Kernel, Launch, cdiv
from alphaspin_kernels.checks import check_lengths
from alphaspin_kernels.numerics import subtb_rates

ROWS = 32


@triton.jit
def _delta(log_pf, log_pterm, log_reward, j, on):
    """r_j - r_{j-1} of the rows that have a state j, 0 of the others."""
    reward = tl.load(log_reward + j, mask=on, other=0.0).to(tl.float64)
    reward -= tl.load(log_reward + j - 1, mask=on, other=0.0).to(tl.float64)
    pterm = tl.load(log_pterm + j, mask=on, other=0.0).to(tl.float64)
    pterm -= tl.load(log_pterm + j - 1, mask=on, other=0.0).to(tl.float64)
    return reward - pterm - tl.load(log_pf + j - 1, mask=on, other=0.0).to(tl.float64)


@Kernel("")
def recursions(
    log_pf,
    log_pterm,
    log_reward,
    lengths,
    fade,
    sums,
    ends,
    later,
    batch,
    tokens,
    longest,
    growth_high,
    growth_low,
    ROWS: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Sums [2, B] of Q and A; M_j + M'_j [B, S] and their sums over i >= j [B, L] for GRADIENT."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < batch
    length = tl.load(lengths + rows, mask=inside, other=0)
    states = rows.to(tl.int64) * (tokens + 1)
    log_pf += rows.to(tl.int64) * tokens
    later += rows.to(tl.int64) * tokens
    log_pterm += states
    log_reward += states
    ends += states
    zero = tl.zeros([ROWS], tl.float64)
    # A number passed to a kernel is fp32: this one comes in two.
    growth = zero + growth_high + growth_low
    a, m, q, sum_q, sum_a = zero, zero, zero, zero, zero
    for j in range(1, longest + 1):
        on = j <= length
        delta = _delta(log_pf, log_pterm, log_reward, j, on)
        a = growth * a + tl.load(fade + j - 1)
        q = growth * (q - 2.0 * delta * m) + a * delta * delta
        m = growth * m - a * delta
        scale = tl.load(fade + longest - j)
        sum_q += tl.where(on, q * scale, 0.0)
        sum_a += tl.where(on, a * scale, 0.0)
        if GRADIENT:
            tl.store(ends + j, m * scale, mask=on)
    tl.store(sums + rows, sum_q, mask=inside)
    tl.store(sums + batch + rows, sum_a, mask=inside)

    if GRADIENT:
        tl.debug_barrier()
        a, m, starts, later_sum = zero, zero, zero, zero
        for back in range(longest):
            j = longest - back
            on = j <= length
            both = tl.load(ends + j, mask=on, other=0.0) + starts
            later_sum += both
            tl.store(ends + j, both, mask=on)
            tl.store(later + j - 1, later_sum, mask=on)
            # Rows begin at their own ends: they take their own steps.
            step = length + 1 - j
            a = growth * a + tl.load(fade + step - 1, mask=on, other=0.0)
            m = growth * m + a * _delta(log_pf, log_pterm, log_reward, j, on)
            starts = m * tl.load(fade + longest - step, mask=on, other=0.0)
        tl.store(ends, starts, mask=length > 0)


def subtb_loss(
    log_pf: Tensor,
    log_pterm: Tensor,
    log_reward: Tensor,
    lengths: Tensor,
    lam: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch :func:`recursions`. Returns (loss [], d log_reward [B, S], d log_pf [B, L]), fp32."""
    batch, tokens = log_pf.shape
    longest = check_lengths(lengths, tokens)
    rows = batch if with_gradient else 0
    ends_BS = log_pf.new_zeros((rows, tokens + 1), dtype=torch.float64)
    later_BL = log_pf.new_zeros((rows, tokens), dtype=torch.float64)
    if longest == 0:
        return log_pf.new_zeros(()), ends_BS.float(), later_BL.float()
    growth, fade = subtb_rates(lam)
    fade_S = fade ** torch.arange(longest + 1, device=log_pf.device, dtype=torch.float64)
    sums_2B = log_pf.new_empty((2, batch), dtype=torch.float64)
    growth_high = torch.tensor(growth, dtype=torch.float32, device="cpu").item()
    recursions[False][(cdiv(batch, ROWS),)](
        log_pf.contiguous(),
        log_pterm.contiguous(),
        log_reward.contiguous(),
        lengths.contiguous(),
        fade_S,
        sums_2B,
        ends_BS,
        later_BL,
        batch,
        tokens,
        longest,
        growth_high,
        growth - growth_high,
        ROWS=ROWS,
        GRADIENT=with_gradient,
        num_warps=1,
    )
    total, weights = sums_2B.sum(1)
    factor = 2 / weights
    return (total / weights).float(), (-factor * ends_BS).float(), (factor * later_BL).float()


def launches(capability: int) -> list[Launch]:
    """Every form: with and without gradients."""
    del capability
    types = [
        ("*fp32", "log_pf log_pterm log_reward"),
        ("*i64", "lengths"),
        ("*fp64", "fade sums ends later"),
        ("i32", "batch tokens longest"),
        ("fp32", "growth_high growth_low"),
    ]
    options = {"ROWS": ROWS, "num_warps": 1}
    return [
        Launch.of(recursions, False, types, {**options, "GRADIENT": gradient})
        for gradient in (False, True)
    ]
