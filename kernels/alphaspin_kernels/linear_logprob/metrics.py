"""What TRL logs of each token's distribution, besides the log-prob, without the [N, V] logits.

``entropy`` (nats), ``log_sum_sq_probs``, log sum_v p_v^2, ``mean_logits``, the mean of z' over the
vocabulary, and ``is_top1``, whether no entry before y has as large a logit and none after it a
larger one. From d lp / d hidden where it is there (a frozen head, plain logits), else from one
product, tile by tile.

Shape suffixes as in `linear_logprob`.
"""

import math

import torch
from torch import Tensor

from alphaspin_kernels.checks import accumulation_dtype, check_targets
from alphaspin_kernels.linear_logprob import local_targets

# Rows and vocabulary entries of one tile of logits: 8 MiB in fp32, or 128 MiB on a GPU.
TILE, TILE_GPU = (1024, 2048), (4096, 8192)


def metrics_from_row(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    logp_N: Tensor,
    row_NH: Tensor,
    temperature: float,
    wanted: set[str],
) -> dict[str, Tensor]:
    """Return the wanted metrics, all but ``log_sum_sq_probs``, of logits without cap and bias.

    h · row = z'_y - E_p[z'] with row = d lp / d h, so that the entropy is h · row - lp. y is the
    most likely token if p_y > 1/2, and is not if z'_y < E_p[z']; rows between the two, rounding
    included, are scored once more.
    """
    dtype = accumulation_dtype(hidden_NH.dtype)
    wide_NH, wide_row_NH = hidden_NH.to(dtype), row_NH.to(dtype)
    product_N = torch.linalg.vecdot(wide_NH, wide_row_NH)
    found: dict[str, Tensor] = {}
    if "entropy" in wanted:
        found["entropy"] = (product_N - logp_N).clamp_(min=0.0)
    if "mean_logits" in wanted:
        mean_H = weight_VH.mean(0, dtype=dtype) / temperature
        found["mean_logits"] = wide_NH @ mean_H
    if "is_top1" in wanted:
        # Cauchy-Schwarz bounds what rounding the row can have done to the product.
        sizes_N = wide_NH.norm(dim=1) * wide_row_NH.norm(dim=1)
        slack_N = 1e-4 + torch.finfo(row_NH.dtype).eps * sizes_N
        top_N = logp_N > math.log(0.5) + 1e-4
        open_U = (~top_N & (product_N > -slack_N)).nonzero()[:, 0]
        _, _, again = metrics_from_tiles(
            hidden_NH[open_U],
            weight_VH,
            None,
            targets_N[open_U],
            None,
            temperature,
            {"is_top1"},
        )
        found["is_top1"] = top_N.index_copy_(0, open_U, again["is_top1"])
    return found


@torch.no_grad()
def metrics_from_tiles(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    softcap: float | None,
    temperature: float,
    wanted: set[str],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return (log-probs, log-normalisers, the wanted metrics), each [N], by one product.

    Raises:
        ValueError: a target outside the vocabulary.
    """
    dtype = accumulation_dtype(hidden_NH.dtype)
    vocabulary, count = len(weight_VH), len(hidden_NH)
    check_targets(targets_N, vocabulary, -100)
    # On a GPU 16-bit factors are summed in fp32 by the product itself; the CPU wants them in fp32.
    native = hidden_NH.is_cuda and hidden_NH.dtype != dtype
    rows, entries = TILE_GPU if hidden_NH.is_cuda else TILE
    max_N = hidden_NH.new_full((count,), torch.finfo(dtype).min, dtype=dtype)
    sum_N, first_N, square_N, flat_N, z_N = hidden_NH.new_zeros((5, count), dtype=dtype)
    best_N = torch.full_like(targets_N, -1)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for start in range(0, vocabulary, entries):
            weight_TH = weight_VH[start : start + entries]
            weight_TH = weight_TH if native else weight_TH.to(dtype)
            for low in range(0, count, rows):
                part = slice(low, low + rows)
                hidden_RH = hidden_NH[part]
                if native:
                    z_RT = torch.mm(hidden_RH, weight_TH.T, out_dtype=dtype)
                else:
                    z_RT = hidden_RH.to(dtype) @ weight_TH.T
                if bias_V is not None:
                    z_RT += bias_V[start : start + entries]
                if softcap is not None:
                    z_RT.div_(softcap).tanh_().mul_(softcap)
                if temperature != 1.0:
                    z_RT.div_(temperature)
                inside_R1, local_R1 = local_targets(targets_N[part, None], start, len(weight_TH))
                z_N[part] = torch.where(inside_R1, z_RT.gather(1, local_R1), z_N[part, None])[:, 0]
                if "mean_logits" in wanted:
                    flat_N[part] += z_RT.sum(1)
                top_R, at_R = z_RT.max(1)  # the first of equals
                old_R = max_N[part]
                best_N[part] = torch.where(top_R > old_R, at_R + start, best_N[part])
                new_R = torch.maximum(old_R, top_R)
                fall_R = old_R - new_R
                scale_R = fall_R.exp()
                z_RT.sub_(new_R[:, None])
                e_RT = z_RT.exp()
                if "entropy" in wanted:  # sums of e^(z - max) (z - max)
                    moved_R = (first_N[part] + sum_N[part] * fall_R) * scale_R
                    first_N[part] = moved_R + torch.linalg.vecdot(e_RT, z_RT)
                if "log_sum_sq_probs" in wanted:
                    square_N[part] *= scale_R.square()
                    square_N[part] += torch.linalg.vecdot(e_RT, e_RT)
                sum_N[part] = sum_N[part] * scale_R + e_RT.sum(1)
                max_N[part] = new_R
    log_N = sum_N.log()
    metrics = {
        "entropy": lambda: (log_N - first_N / sum_N).clamp_(min=0.0),
        "log_sum_sq_probs": lambda: square_N.log() - 2 * log_N,
        "mean_logits": lambda: flat_N / vocabulary,
        "is_top1": lambda: best_N == targets_N,
    }
    found = {name: metrics[name]() for name in wanted}
    # z - max first: both are large together on peaked rows, and the rest is what matters.
    return z_N - max_N - log_N, max_N + log_N, found
