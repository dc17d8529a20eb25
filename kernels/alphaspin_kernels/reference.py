"""The operators in plain PyTorch: what they mean, with no regard for memory or speed.

They run in fp32, or in float64 when the inputs are float64, and are what the tests compare with.

Shape suffixes: N rows, H hidden size, V vocabulary, K targets per row; B sequences, C = B + 1
boundaries, L tokens,
S = L + 1 states of a sequence; of segmented_lora: I and O width in and out, R rank or rows of a
segment, C columns.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from alphaspin_kernels.checks import (
    Adapter,
    accumulation_dtype,
    check_boundaries,
    check_cu_seqlens,
    check_lengths,
    check_linear_logprob,
    check_logits_logprob,
    check_mixture_logprob,
    check_segmented_lora,
    check_subtb_loss,
    check_targets,
    dropout_mask,
)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Definition of :func:`alphaspin_kernels.linear_logprob`; builds the [N, V] logits.

    Arguments, result and errors are those of the fused operator; autograd goes through it.
    """
    check_linear_logprob(hidden, weight, targets, bias, softcap, temperature)
    check_targets(targets, weight.shape[0], ignore_index)
    dtype = accumulation_dtype(hidden.dtype)
    logits_NV = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits_NV = logits_NV + bias.to(dtype)
    return logits_logprob(
        logits_NV, targets, softcap=softcap, temperature=temperature, ignore_index=ignore_index
    )


def logits_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> Tensor:
    """Definition of :func:`alphaspin_kernels.logits_logprob`; builds the [N, V] log-softmax.

    Arguments, result and errors are those of the fused operator; autograd goes through it, and
    ``inplace_backward`` changes nothing.
    """
    check_logits_logprob(logits, targets, softcap, temperature, inplace_backward)
    check_targets(targets, logits.shape[1], ignore_index)
    targets_NK = targets if targets.dim() == 2 else targets[:, None]
    ignored_NK = targets_NK == ignore_index
    # Rows with nothing to score are not read: a NaN there reaches no gradient.
    logits_NV = logits.to(accumulation_dtype(logits.dtype))
    logits_NV = logits_NV.masked_fill(ignored_NK.all(1, keepdim=True), 0.0)
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    logp_NV = torch.log_softmax(logits_NV / temperature, dim=-1)
    logp_NK = logp_NV.gather(1, targets_NK.masked_fill(ignored_NK, 0))
    return logp_NK.masked_fill(ignored_NK, 0.0).reshape(targets.shape)


def sequence_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor, **options: Any
) -> Tensor:
    """Definition of :func:`alphaspin_kernels.sequence_logprob`: options of linear_logprob.

    Arguments, result and errors are those of the fused operator; autograd goes through it.
    """
    check_cu_seqlens(hidden, cu_seqlens)
    logp = linear_logprob(hidden, weight, targets, **options)
    check_boundaries(cu_seqlens, len(targets))
    bounds = cu_seqlens.tolist()
    return torch.stack([logp[a:b].sum(0) for a, b in pairwise(bounds)] or [logp.sum(0)])[
        : len(bounds) - 1
    ]


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
    """Definition of :func:`alphaspin_kernels.mixture_logprob`: two softmaxes, mixed, normalised.

    Arguments, result and errors are those of the fused operator, but it is differentiable.
    """
    check_mixture_logprob(
        hidden_prev, hidden_base, weight, targets, alpha, bias, softcap, temperature, log_normaliser
    )
    check_targets(targets, weight.shape[0], ignore_index)
    dtype = accumulation_dtype(hidden_prev.dtype)

    def log_softmax(hidden_NH: Tensor) -> Tensor:
        z_NV = hidden_NH.to(dtype) @ weight.to(dtype).T
        if bias is not None:
            z_NV = z_NV + bias.to(dtype)
        if softcap is not None:
            z_NV = softcap * torch.tanh(z_NV / softcap)
        return torch.log_softmax(z_NV / temperature, dim=-1)

    if alpha in (0, 1):
        mixed_NV = log_softmax(hidden_prev if alpha else hidden_base)
    else:
        mixed_NV = alpha * log_softmax(hidden_prev) + (1 - alpha) * log_softmax(hidden_base)
    log_z_N = mixed_NV.logsumexp(-1)
    targets_NK = targets if targets.dim() == 2 else targets[:, None]
    ignored_NK = targets_NK == ignore_index
    if log_normaliser is not None:
        log_normaliser.copy_(log_z_N.masked_fill(ignored_NK.all(1), 0.0))
    logp_NK = mixed_NV.gather(1, targets_NK.masked_fill(ignored_NK, 0)) - log_z_N[:, None]
    return logp_NK.masked_fill(ignored_NK, 0.0).reshape(targets.shape)


def subtb_loss(
    log_pf: Tensor, log_pterm: Tensor, log_reward: Tensor, lengths: Tensor, lam: float
) -> Tensor:
    """Definition of :func:`alphaspin_kernels.subtb_loss`: all O(L^2) pairs of states.

    Arguments, result and errors are those of the fused operator; autograd goes through it.
    """
    check_subtb_loss(log_pf, log_pterm, log_reward, lengths, lam)
    check_lengths(lengths, log_pf.shape[1])
    dtype = accumulation_dtype(log_pf.dtype)
    state_S = torch.arange(log_pf.shape[1] + 1, device=log_pf.device)
    valid_BS = state_S <= lengths[:, None]

    def read(values: Tensor, valid: Tensor) -> Tensor:
        return values.to(dtype).masked_fill(~valid, 0.0)

    sum_pf_BS = torch.nn.functional.pad(read(log_pf, valid_BS[:, 1:]).cumsum(1), (1, 0))
    r_BS = read(log_reward, valid_BS) - read(log_pterm, valid_BS) - sum_pf_BS
    # lam^(j-i-1), over the weight of the longest pair if that is the largest: no overflow.
    gap_SS = state_S - state_S[:, None] - 1
    largest = max(int(lengths.max()) - 1, 0) if lam > 1 and len(lengths) else 0
    weight_SS = torch.pow(
        torch.tensor(lam, dtype=torch.float64, device=log_pf.device), gap_SS - largest
    )
    pair_BSS = valid_BS[:, :, None] & valid_BS[:, None, :] & (gap_SS >= 0)
    weight_BSS = torch.where(pair_BSS, weight_SS, 0.0).to(dtype)
    squares_BSS = (r_BS[:, :, None] - r_BS[:, None, :]).square()
    total = weight_BSS.sum()
    return (weight_BSS * squares_BSS).sum() / torch.where(total > 0, total, 1.0)


def segmented_lora(
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[Adapter],
    segments: Sequence[int],
    scaling: float | Sequence[float],
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Definition of :func:`alphaspin_kernels.segmented_lora`, segment by segment.

    Arguments, result and errors are those of the fused operator; autograd goes through it.
    """
    scalings = check_segmented_lora(x, weight, adapters, segments, scaling, bias, dropout, seed)
    dtype = accumulation_dtype(x.dtype)
    outputs: list[Tensor] = []
    for s, x_RI in enumerate(x.split(list(segments))):
        x_RI = (x_RI if s == 0 else x_RI.detach()).to(dtype)
        y_RO = x_RI @ weight.to(dtype).T
        if bias is not None:
            y_RO = y_RO + bias.to(dtype)
        pair = adapters[s]
        if pair is not None:
            if s == 0 and dropout:
                mask_RI = dropout_mask(len(x_RI), range(x_RI.shape[1]), dropout, seed, x.device)
                x_RI = x_RI * mask_RI / (1 - dropout)
            y_RO = y_RO + scalings[s] * (x_RI @ pair[0].to(dtype).T) @ pair[1].to(dtype).T
        outputs.append(y_RO)
    return torch.cat(outputs).to(x.dtype)
