"""The two-product form of mixture_logprob on the GPU: the forward pass of :mod:`head` for two rows.

Shape suffixes: A active rows, R rows of a launch, H hidden size, K targets per row.
"""

import torch
from torch import Tensor

from alphaspin_kernels._triton import head
from alphaspin_kernels._triton.common import Launch, unit_stride
from alphaspin_kernels.checks import check_targets
from alphaspin_kernels.numerics import active_rows, finish_mixture, mix


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
    check_targets(targets, len(weight), ignore_index)
    weight = unit_stride(weight)
    logp_NK = hidden_prev.new_zeros(targets.shape, dtype=torch.float32)
    log_z_N = hidden_prev.new_zeros(targets.shape[:1], dtype=torch.float32)
    if alpha in (0, 1):
        # A weight of 0 ignores the policy, also where it is not finite: the other one twice.
        hidden_prev = hidden_base = hidden_prev if alpha else hidden_base
        alpha = 0.5
    # Half of a launch's rows are of the previous iterate, half of the base.
    for rows_R in active_rows(targets, ignore_index).split(head.ROWS // 2):
        hidden = head.interleave(hidden_prev[rows_R], hidden_base[rows_R])
        targets_RK = targets[rows_R]
        options = (bias, softcap, temperature)
        peak_3R, sum_3R = (
            x[:, : len(rows_R)] for x in head.log_sums(hidden, weight, *options, alpha)
        )
        y = head.at_targets(hidden, weight, head.interleave(targets_RK, targets_RK), *options)
        y_2RK = y.unflatten(0, (-1, 2, 8)).transpose(0, 1).flatten(1, 2)[:, : len(rows_R)]
        y_RK = mix(y_2RK[0].double(), y_2RK[1].double(), alpha)
        logp_RK, log_z_R = finish_mixture(
            y_RK * head.LN2, peak_3R.double() * head.LN2, sum_3R, alpha
        )
        logp_NK[rows_R] = logp_RK.float()
        log_z_N[rows_R] = log_z_R.float()
    return logp_NK.masked_fill_(targets == ignore_index, 0.0), log_z_N


def launches(capability: int) -> list[Launch]:
    """Every form in which the kernel can be launched."""
    return head.launches(capability, mixed=True)
