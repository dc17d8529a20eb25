"""Log-probabilities under the token-normalised geometric mixture of two policies with one head.

    p(v) = prev(v)^alpha base(v)^(1 - alpha) / Z,    Z = sum_v prev(v)^alpha base(v)^(1 - alpha)

Both policies share a linear head, so the mixed logits are those of the mixed hidden states,
W (alpha h_prev + (1 - alpha) h_base): one product instead of two. That does not hold for
soft-capped logits, and log Z needs the normaliser of each policy; both take the two logits of a
tile, mix them there, and keep three running sums.

Shape suffixes: N rows, H hidden size, V vocabulary, K targets per row, A active rows, R rows of one
chunk, T vocabulary entries of one tile.
"""

import torch
from torch import Tensor

from alphaspin_kernels import _dispatch
from alphaspin_kernels.checks import (
    accumulation_dtype,
    check_mixture_logprob,
    check_targets,
)
from alphaspin_kernels.linear_logprob import (
    ROWS,
    TILE,
    linear_logprob,
    local_targets,
    logit_tile,
)
from alphaspin_kernels.numerics import active_rows, finish_mixture, mix


def mixture_logprob(
    hidden_prev: Tensor,
    hidden_base: Tensor,
    weight: Tensor,
    targets: Tensor,
    alpha: float,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    log_normaliser: Tensor | None = None,
) -> Tensor:
    """Return log p(y) of the token-normalised mixture at the targets.

    Args:
        hidden_prev: [N, H], of the previous iterate; bf16, fp16, fp32 or float64.
        hidden_base: [N, H], of the base; same dtype and device.
        weight: [V, H], the head of both.
        targets: [N] or [N, K] int64.
        alpha: weight of the previous iterate, in [0, 1].
        bias: [V] or None.
        softcap: bound of each policy's logits (Gemma 2), or None. Takes two products.
        temperature: divides each policy's logits, before they are mixed.
        ignore_index: target whose log-prob is 0; rows with no other target are not read.
        log_normaliser: [N] buffer, fp32 (float64 for float64 inputs), that receives log Z of each
            row, at most 0 (Hölder); 0 for rows that are skipped. Takes two products.

    Returns:
        Log-probs in nats, shaped like ``targets``, fp32 (float64 for float64 inputs). With one
        product and 16-bit inputs the mixed hidden state is rounded to their dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; alpha outside [0, 1]; a
            target outside [0, V); tensors that require a gradient while gradients are enabled:
            the mixture is a reference and a sampler, and has no derivative here.

    Source: section 4 of `docs/theory.md`; the mixture is the token-level form of the
    reference of α-SPIN (Alami et al., arXiv 2404.04291) and of Nash-MD's opponent (Munos et al.,
    arXiv 2312.00886).
    """
    check_mixture_logprob(
        hidden_prev, hidden_base, weight, targets, alpha, bias, softcap, temperature, log_normaliser
    )
    named = {"hidden_prev": hidden_prev, "hidden_base": hidden_base, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, but mixture_logprob is not differentiable: call it "
                "under torch.no_grad() or pass detached tensors"
            )
    targets_NK = targets.reshape(len(targets), 1) if targets.dim() == 1 else targets
    with torch.no_grad():
        if softcap is None and log_normaliser is None:
            dtype = accumulation_dtype(hidden_prev.dtype)
            mixed_NH = mix(hidden_prev.to(dtype), hidden_base.to(dtype), float(alpha))
            logp_NK = linear_logprob(
                mixed_NH.to(hidden_prev.dtype),
                weight,
                targets_NK,
                bias=bias,
                temperature=temperature,
                ignore_index=ignore_index,
            )
        else:
            logp_NK, log_z_N = _mixture_logprob(
                hidden_prev,
                hidden_base,
                weight,
                targets_NK,
                bias,
                float(alpha),
                softcap,
                float(temperature),
                ignore_index,
            )
            if log_normaliser is not None:
                log_normaliser.copy_(log_z_N)
    return logp_NK.reshape(targets.shape)


def _portable(
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
    """Portable version of the two products. Returns (logp [N, K], log Z [N])."""
    check_targets(targets, len(weight), ignore_index)
    dtype = accumulation_dtype(hidden_prev.dtype)
    logp_NK = hidden_prev.new_zeros(targets.shape, dtype=dtype)
    log_z_N = hidden_prev.new_zeros(targets.shape[:1], dtype=dtype)
    active_A = active_rows(targets, ignore_index)
    with torch.autocast(hidden_prev.device.type, enabled=False):
        for rows_R in active_A.split(ROWS):
            hidden_2RH = torch.stack((hidden_prev[rows_R], hidden_base[rows_R])).to(dtype)
            targets_RK = targets[rows_R]
            z_RK = hidden_2RH.new_zeros(targets_RK.shape)
            # Of the previous iterate, the base and the mixture.
            peak_3R = hidden_2RH.new_full((3, len(rows_R)), torch.finfo(dtype).min)
            sum_3R = torch.zeros_like(peak_3R)
            for start in range(0, len(weight), TILE):
                weight_TH = weight[start : start + TILE].to(dtype)
                z_RT, _ = logit_tile(
                    hidden_2RH.flatten(0, 1),
                    weight_TH,
                    bias,
                    start,
                    softcap,
                    temperature,
                    False,
                )
                z_2RT = z_RT.unflatten(0, (2, -1))
                mixed_RT = mix(z_2RT[0], z_2RT[1], alpha)
                inside_RK, local_RK = local_targets(targets_RK, start, len(weight_TH))
                z_RK = torch.where(inside_RK, mixed_RT.gather(1, local_RK), z_RK)
                for i, z in enumerate((z_2RT[0], z_2RT[1], mixed_RT)):
                    peak_R = torch.maximum(peak_3R[i], z.amax(1))
                    sum_3R[i] *= torch.exp(peak_3R[i] - peak_R)
                    sum_3R[i] += z.sub_(peak_R[:, None]).exp_().sum(1)
                    peak_3R[i] = peak_R
            logp_RK, log_z_N[rows_R] = finish_mixture(z_RK, peak_3R, sum_3R, alpha)
            logp_NK[rows_R] = logp_RK.masked_fill(targets_RK == ignore_index, 0.0)
    return logp_NK, log_z_N


def _empty_outputs(hidden_prev: Tensor, targets: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(hidden_prev.dtype)
    return (
        hidden_prev.new_empty(targets.shape, dtype=dtype),
        hidden_prev.new_empty(targets.shape[:1], dtype=dtype),
    )


_mixture_logprob = _dispatch.Operator(
    "mixture_logprob", _portable, _empty_outputs, by="hidden_prev"
)
