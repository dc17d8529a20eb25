"""The operators in plain PyTorch: what they mean, with no regard for memory or speed.

They run in fp32, or in float64 when the inputs are float64, and are what the tests compare with.

Shape suffixes: N rows, H hidden size, V vocabulary, K targets per row.
"""

import math

import torch
from torch import Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the logits of ``dtype`` inputs: fp32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    temperature: float,
) -> None:
    """Raise ValueError, naming both sides, if the arguments do not fit together.

    Looks at shapes, dtypes and devices only, so it costs no synchronisation and can be traced by
    ``torch.compile``; target values are checked by :func:`check_targets` where they are read.
    """
    if hidden_NH.dim() != 2 or weight_VH.dim() != 2:
        raise ValueError(
            "hidden must be [N, H] and weight [V, H], "
            f"got {list(hidden_NH.shape)} and {list(weight_VH.shape)}"
        )
    if hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden has H = {hidden_NH.shape[1]} but weight has H = {weight_VH.shape[1]}"
        )
    if targets.dim() not in (1, 2) or targets.shape[0] != hidden_NH.shape[0]:
        raise ValueError(
            f"targets must be [N] or [N, K] with N = {hidden_NH.shape[0]}, "
            f"got {list(targets.shape)}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be torch.int64, got {targets.dtype}")
    if hidden_NH.dtype not in _FLOATS:
        raise ValueError(f"hidden must be one of {_FLOATS}, got {hidden_NH.dtype}")
    if bias_V is not None and bias_V.shape != weight_VH.shape[:1]:
        raise ValueError(
            f"bias must be [V] with V = {weight_VH.shape[0]}, got {list(bias_V.shape)}"
        )
    for name, tensor in (("weight", weight_VH), ("bias", bias_V)):
        if tensor is not None and tensor.dtype != hidden_NH.dtype:
            raise ValueError(f"hidden is {hidden_NH.dtype} but {name} is {tensor.dtype}")
    for name, tensor in (("weight", weight_VH), ("targets", targets), ("bias", bias_V)):
        if tensor is not None and tensor.device != hidden_NH.device:
            raise ValueError(f"hidden is on {hidden_NH.device} but {name} is on {tensor.device}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be None or positive and finite, got {softcap}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise ValueError if a target that is not ``ignore_index`` is outside [0, vocabulary)."""
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    if outside.any():
        raise ValueError(
            f"target {targets[outside][0].item()} is outside the vocabulary [0, {vocabulary}) "
            f"and is not ignore_index = {ignore_index}"
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
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    logp_NV = torch.log_softmax(logits_NV / temperature, dim=-1)
    targets_NK = targets.reshape(len(targets), -1)
    ignored_NK = targets_NK == ignore_index
    logp_NK = logp_NV.gather(1, targets_NK.masked_fill(ignored_NK, 0))
    return logp_NK.masked_fill(ignored_NK, 0.0).reshape(targets.shape)
