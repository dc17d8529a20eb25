"""Log-probabilities of target tokens from hidden states, without the [N, V] logits.

The softmax over the vocabulary is taken tile by tile with a running maximum and a running sum, so
the workspace is one tile of logits. The gradient of a log-prob with respect to its hidden row,

    d lp / d hidden = slope_y W[y] - E_p[slope W],    slope_v = d z'_v / d z_v,

(z the raw logit, z' the logit after softcap and temperature) does not depend on the loss. With a
frozen head it is therefore computed in the forward pass, from the tile that is there anyway, and
the backward pass only scales it: 2 products instead of 3. A trainable head recomputes the tiles.

One operator, ``alphaspin::linear_logprob``, dispatched by device: the portable version below, and
for the CPU the C++ one of ``csrc/linear_logprob.cpp``.

Shape suffixes: N rows, H hidden size, V vocabulary, K targets per row, A active rows (with at least
one target that is not ignored), R rows of one chunk, T vocabulary entries of one tile.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alphaspin_kernels import _dispatch
from alphaspin_kernels.checks import accumulation_dtype, check_linear_logprob, check_targets
from alphaspin_kernels.numerics import active_rows, target_slope

# Workspace of the portable version: ROWS x TILE logits and a TILE x H copy of the head in fp32.
ROWS = 1024
TILE = 2048


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    skip_below: float = 0.0,
    skipped_mass: Tensor | None = None,
) -> Tensor:
    """Return ``log_softmax(cap(hidden @ weight.T + bias) / temperature)`` at the targets.

    ``cap(z) = softcap * tanh(z / softcap)``, or z itself when ``softcap`` is None. Logits are
    formed and summed in fp32 (float64 for float64 inputs) whatever the dtype, also under autocast.

    Args:
        hidden: [N, H], bf16, fp16, fp32 or float64; any strides.
        weight: [V, H], the head, same dtype and device.
        targets: [N] or [N, K] int64; K tokens scored under the same row.
        bias: [V] or None, same dtype and device.
        softcap: bound of the logits (Gemma 2), positive, or None.
        temperature: divides the logits, positive.
        ignore_index: target whose log-prob is 0 and has no gradient. Rows with no other target
            are skipped: their hidden states are not read.
        skip_below: ε in [0, 1); with a frozen head, parts of the vocabulary in which no probability
            reaches ε are left out of the gradient's E_p[W]: single entries for 128 rows where
            :mod:`frozen_head` serves, else tiles of some hundred entries and rows. Log-probs stay
            exact. The vocabulary is walked once, so its first part, where little of the sum is
            known, is rarely left out.
        skipped_mass: [N] buffer, fp32 (float64 for float64 inputs), that receives the probability
            mass left out of each row. It bounds the error of d lp / d hidden, elementwise by
            mass x max |W| / temperature.

    Returns:
        Log-probs in nats, shaped like ``targets``, fp32 (float64 for float64 inputs).
        Differentiable once, in reverse mode, in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a target outside [0, V), a
            softcap or temperature that is not positive, ε outside [0, 1) or with a head that
            requires a gradient.

    Example, the log-probs of a DPO loop without its logits::

        hidden = model.model(input_ids, attention_mask).last_hidden_state[:, :-1]
        logps = linear_logprob(hidden.flatten(0, 1), model.lm_head.weight, labels[:, 1:].flatten())
        logps = logps.view(len(labels), -1).sum(1)  # one per sequence; labels of -100 count as 0

    Source: the two-product form is section 5 of `docs/theory.md`; the running
    log-sum-exp is Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
    """
    check_linear_logprob(hidden, weight, targets, bias, softcap, temperature)
    trainable_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    if skipped_mass is not None and skipped_mass.shape != hidden.shape[:1]:
        raise ValueError(
            f"skipped_mass must be [N] with N = {len(hidden)}, got {list(skipped_mass.shape)}"
        )
    if not 0 <= skip_below < 1:
        raise ValueError(f"skip_below must be in [0, 1), got {skip_below}")
    if skip_below and trainable_head:
        raise ValueError(
            f"skip_below = {skip_below} needs a frozen head, but weight or bias requires a gradient"
        )
    with_row = torch.is_grad_enabled() and hidden.requires_grad and not trainable_head
    logp_NK, _, _, skipped_N = _linear_logprob(
        hidden,
        weight,
        targets.reshape(hidden.shape[0], 1) if targets.dim() == 1 else targets,
        bias,
        softcap,
        float(temperature),
        ignore_index,
        with_row,
        float(skip_below),
    )
    if skipped_mass is not None:
        skipped_mass.copy_(skipped_N)
    return logp_NK.reshape(targets.shape)


def _portable(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    with_row: bool,
    skip_below: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Portable version.

    Returns (logp [N, K], log-normaliser [N], row [N, H] or [0, H], skipped mass [N]).

    ``row`` is what the backward pass of a frozen head needs. With one target per row it is the
    finished d lp / d hidden, in the dtype of hidden: the head need not be kept. With K targets it
    is E_p[slope W] in fp32, because subtracting it from K different W[y] must not lose digits.
    """
    dtype = accumulation_dtype(hidden.dtype)
    vocabulary, single = weight.shape[0], targets.shape[1] == 1
    logp_NK, lse_N, row_NH, skipped_N = _empty_outputs(hidden, targets, with_row)
    for output in (logp_NK, lse_N, row_NH, skipped_N):
        output.zero_()
    check_targets(targets, vocabulary, ignore_index)
    active_A = active_rows(targets, ignore_index)

    # Inside autocast the products of the fp32 tiles would be rounded to bf16.
    with torch.autocast(hidden.device.type, enabled=False):
        for rows_R in active_A.split(ROWS):
            hidden_RH = hidden[rows_R].to(dtype)
            targets_RK = targets[rows_R]
            count = len(rows_R)
            # Not -inf: a first tile of nothing but -inf (masked padding) would give -inf - -inf.
            max_R = hidden_RH.new_full((count,), torch.finfo(dtype).min)
            sum_R, skipped_R = hidden_RH.new_zeros((2, count))
            z_RK = hidden_RH.new_zeros(targets_RK.shape)
            mean_RH = torch.zeros_like(hidden_RH) if with_row else None
            for start in range(0, vocabulary, TILE):
                weight_TH = weight[start : start + TILE].to(dtype)
                z_RT, slope_RT = logit_tile(
                    hidden_RH, weight_TH, bias, start, softcap, temperature, with_row
                )
                inside_RK, local_RK = local_targets(targets_RK, start, len(weight_TH))
                z_RK = torch.where(inside_RK, z_RT.gather(1, local_RK), z_RK)
                new_max_R = torch.maximum(max_R, z_RT.amax(1))
                rescale_R = torch.exp(max_R - new_max_R)
                max_R = new_max_R
                p_RT = z_RT.sub_(max_R[:, None]).exp_()
                mass_R = p_RT.sum(1)
                sum_R = sum_R * rescale_R + mass_R
                skipped_R *= rescale_R
                if mean_RH is not None:
                    mean_RH *= rescale_R[:, None]
                    # p / sum so far is no less than the final probability.
                    if (p_RT.amax(1) < skip_below * sum_R).all():
                        skipped_R += mass_R
                        continue
                    mean_RH.addmm_(p_RT if slope_RT is None else p_RT.mul_(slope_RT), weight_TH)
            # z - max first: both are large together on peaked rows, and the rest is what matters.
            logp_RK = z_RK - max_R[:, None] - sum_R.log()[:, None]
            logp_NK[rows_R] = logp_RK.masked_fill(targets_RK == ignore_index, 0.0)
            lse_N[rows_R] = max_R + sum_R.log()
            skipped_N[rows_R] = skipped_R / sum_R
            if mean_RH is not None:
                row_RH = mean_RH.div_(sum_R[:, None]).div_(temperature)
                if single:
                    slope_R1 = target_slope(z_RK, softcap, temperature)
                    row_RH = slope_R1 * weight[targets_RK[:, 0]].to(dtype) - row_RH
                row_NH[rows_R] = row_RH.to(row_NH.dtype)
    return logp_NK, lse_N, row_NH, skipped_N


def _empty_outputs(
    hidden: Tensor, targets: Tensor, with_row: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(hidden.dtype)
    rows, width = hidden.shape
    row_dtype = hidden.dtype if targets.shape[1] == 1 else dtype
    return (
        hidden.new_empty(targets.shape, dtype=dtype),
        hidden.new_empty((rows,), dtype=dtype),
        hidden.new_empty((rows if with_row else 0, width), dtype=row_dtype),
        hidden.new_empty((rows,), dtype=dtype),
    )


def _portable_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by recomputing the tiles: (d hidden, d weight, d bias), empty where not needed.

    The vocabulary is the outer loop, so that each tile of d weight is summed over all rows in fp32
    and rounded once, without an fp32 copy of the whole [V, H] gradient.
    """
    dtype = accumulation_dtype(hidden.dtype)
    needs_hidden, needs_weight, needs_bias = needs
    vocabulary = weight.shape[0]
    d_hidden_NH, d_weight_VH, d_bias_V = _empty_gradients(hidden, weight, needs)
    d_hidden_NH.zero_()
    active_A = active_rows(targets, ignore_index)
    hidden_AH, targets_AK, lse_A = hidden[active_A].to(dtype), targets[active_A], lse[active_A]
    grad_AK = grad[active_A].to(dtype).masked_fill(targets_AK == ignore_index, 0.0)
    d_hidden_AH = torch.zeros_like(hidden_AH) if needs_hidden else None

    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, vocabulary, TILE):
            weight_TH = weight[start : start + TILE].to(dtype)
            d_weight_TH = torch.zeros_like(weight_TH) if needs_weight else None
            d_bias_T = weight_TH.new_zeros(len(weight_TH)) if needs_bias else None
            for first in range(0, len(active_A), ROWS):
                chunk = slice(first, first + ROWS)
                hidden_RH, grad_RK = hidden_AH[chunk], grad_AK[chunk]
                z_RT, slope_RT = logit_tile(
                    hidden_RH, weight_TH, bias, start, softcap, temperature, True
                )
                # d loss / d z' = sum_k g_k (onehot(y_k) - p)
                g_RT = z_RT.sub_(lse_A[chunk, None]).exp_().mul_(-grad_RK.sum(1, keepdim=True))
                inside_RK, local_RK = local_targets(targets_AK[chunk], start, len(weight_TH))
                g_RT.scatter_add_(1, local_RK, grad_RK.masked_fill(~inside_RK, 0.0))
                if slope_RT is not None:
                    g_RT.mul_(slope_RT)
                g_RT.div_(temperature)
                if d_hidden_AH is not None:
                    d_hidden_AH[chunk].addmm_(g_RT, weight_TH)
                if d_weight_TH is not None:
                    d_weight_TH.addmm_(g_RT.T, hidden_RH)
                if d_bias_T is not None:
                    d_bias_T.add_(g_RT.sum(0))
            if d_weight_TH is not None:
                d_weight_VH[start : start + TILE] = d_weight_TH
            if d_bias_T is not None:
                d_bias_V[start : start + TILE] = d_bias_T
    if d_hidden_AH is not None:
        d_hidden_NH[active_A] = d_hidden_AH.to(hidden.dtype)
    return d_hidden_NH, d_weight_VH, d_bias_V


def _empty_gradients(
    hidden: Tensor, weight: Tensor, needs: list[bool], **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_hidden, needs_weight, needs_bias = needs
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty(weight.shape[:1] if needs_bias else (0,)),
    )


_linear_logprob_backward = _dispatch.Operator(
    "linear_logprob_backward", _portable_backward, _empty_gradients, by="hidden"
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, *options, with_row, _ = inputs
    ctx.softcap, ctx.temperature, ctx.ignore_index = options
    logp, lse, row, skipped = output
    needs_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
    ctx.mark_non_differentiable(lse, row, skipped)
    ctx.scales_row = with_row and not needs_head
    ctx.single = targets.shape[1] == 1
    if ctx.scales_row and ctx.single:
        ctx.save_for_backward(row, targets)
    elif ctx.scales_row:
        ctx.save_for_backward(row, weight, targets, logp, lse)
    else:
        ctx.save_for_backward(hidden, weight, targets, bias, lse)


def _backward(ctx: Any, grad_NK: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    d_hidden = d_weight = d_bias = None
    if not ctx.scales_row:
        hidden, weight, targets, bias, lse = ctx.saved_tensors
        needs = [bool(ctx.needs_input_grad[index]) for index in (0, 1, 3)]
        gradients = _linear_logprob_backward(
            grad_NK,
            hidden,
            weight,
            targets,
            bias,
            lse,
            ctx.softcap,
            ctx.temperature,
            ctx.ignore_index,
            needs,
        )
        d_hidden, d_weight, d_bias = (
            gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
        )
    elif ctx.single:
        row_NH, targets_N1 = ctx.saved_tensors
        # What arrives at an ignored target counts for nothing, a NaN too. grad is fp32: the product
        # is rounded to the dtype of hidden once, here.
        grad_N1 = grad_NK.masked_fill(targets_N1 == ctx.ignore_index, 0.0)
        d_hidden = (grad_N1 * row_NH).to(row_NH.dtype)
    else:
        mean_NH, weight, targets_NK, logp_NK, lse_N = ctx.saved_tensors
        valid_NK = targets_NK != ctx.ignore_index
        grad_NK = grad_NK.masked_fill(~valid_NK, 0.0)
        slope_NK = target_slope(logp_NK + lse_N[:, None], ctx.softcap, ctx.temperature)
        sum_NH = -grad_NK.sum(1, keepdim=True) * mean_NH
        for k in range(targets_NK.shape[1]):
            weight_NH = weight[targets_NK[:, k] * valid_NK[:, k]].to(mean_NH.dtype)
            sum_NH = torch.addcmul(sum_NH, (grad_NK * slope_NK)[:, k, None], weight_NH)
        d_hidden = sum_NH.to(weight.dtype)
    return d_hidden, d_weight, None, d_bias, None, None, None, None, None


# A second differentiation would take the saved row for a constant; better an error than that.
_linear_logprob = _dispatch.Operator(
    "linear_logprob",
    _portable,
    _empty_outputs,
    by="hidden",
    setup_context=_setup_context,
    backward=once_differentiable(_backward),
)


def logit_tile(
    hidden_RH: Tensor,
    weight_TH: Tensor,
    bias_V: Tensor | None,
    start: int,
    softcap: float | None,
    temperature: float,
    with_slope: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return (z', d cap(z) / d z or None) of the entries from `start`, in fp32/64.

    z' are the logits after softcap and temperature.
    """
    z_RT = hidden_RH @ weight_TH.T
    if bias_V is not None:
        z_RT += bias_V[start : start + len(weight_TH)]
    slope_RT = None
    if softcap is not None:
        z_RT.div_(softcap).tanh_()
        slope_RT = 1.0 - z_RT.square() if with_slope else None
        z_RT.mul_(softcap)
    if temperature != 1.0:
        z_RT.div_(temperature)
    return z_RT, slope_RT


def local_targets(targets_RK: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Return (which targets lie in the tile, their column in it; 0 where they do not)."""
    local_RK = targets_RK - start
    inside_RK = (local_RK >= 0) & (local_RK < width)
    return inside_RK, local_RK.masked_fill(~inside_RK, 0)
