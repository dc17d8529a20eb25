"""Log-probabilities of target tokens from logits, without the [N, V] softmax.

    z'_v = cap(z_v) / temperature,    lp_k = z'_y(k) - m - log s,
    m = max_v z'_v,                   s = sum_v e^(z'_v - m)

takes one read of the logits z. Only the normaliser of each row is kept, and the gradient

    d loss / d z_v = slope_v (sum_k g_k [y(k) = v] - p_v sum_k g_k),
    slope_v = d z'_v / d z_v,    p_v = e^(z'_v - m - log s)

takes one more read and one write. The normaliser is kept as its two parts, m and log s: their sum,
rounded, would lose the digits that p needs where logits are large and p is near 1.

One operator, ``alphaspin::logits_logprob``, dispatched by device: the portable version below,
Triton for CUDA (``_triton/logits_logprob.py``), C++ for the CPU (``csrc/logits_logprob.cpp``).

Shape suffixes: N rows, V vocabulary, K targets per row, A active rows (with at least one target
that is not ignored), R rows of one chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alphaspin_kernels import _dispatch
from alphaspin_kernels.checks import accumulation_dtype, check_logits_logprob, check_targets

# Workspace of the portable version: logits of one chunk of rows in fp32, at least one row.
CHUNK = 1 << 20


def logits_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> Tensor:
    """Return ``log_softmax(cap(logits) / temperature)`` at the targets.

    ``cap(z) = softcap * tanh(z / softcap)``, or z itself when ``softcap`` is None. Sums are taken
    in fp32 (float64 for float64 logits) whatever the dtype of the logits, also under autocast.

    Args:
        logits: [N, V], bf16, fp16, fp32 or float64. Rows at any stride; logits that are not
            contiguous along the vocabulary are copied.
        targets: [N] or [N, K] int64; K tokens scored under the same row.
        softcap: bound of the logits (Gemma 2), positive, or None.
        temperature: divides the logits, positive.
        ignore_index: target whose log-prob is 0 and has no gradient. Rows with no other target are
            skipped: their logits are not read, their gradient is 0.
        inplace_backward: write the gradient of the logits over the logits, which saves a second
            [N, V] tensor. In exchange, once the backward pass has run, the logits are gone: their
            memory (and that of the tensor they are a view of) holds the gradient. A second
            backward pass, and that of any other operation that saved the logits, then raises
            autograd's RuntimeError "modified by an inplace operation". Other uses of the logits
            still get the right gradient. Compiled graphs may copy the logits instead.

    Returns:
        Log-probs in nats, shaped like ``targets``, fp32 (float64 for float64 logits).
        Differentiable once, in ``logits``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a target outside [0, V), a
            softcap or temperature that is not positive; with ``inplace_backward`` and logits that
            require a gradient, logits that are a leaf or whose rows are strided or overlap.

    Source: section 5 of `docs/theory.md`; the running log-sum-exp is Milakov and
    Gimelshein, "Online normalizer calculation for softmax" (2018).
    """
    check_logits_logprob(logits, targets, softcap, temperature, inplace_backward)
    logp_NK, _ = _logits_logprob(
        logits,
        targets if targets.dim() == 2 else targets[:, None],
        softcap,
        float(temperature),
        ignore_index,
        inplace_backward,
    )
    return logp_NK.reshape(targets.shape)


def _portable(
    logits_NV: Tensor,
    targets_NK: Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Portable version. Returns (logp [N, K], normaliser [N, 2]: maximum and log-sum)."""
    check_targets(targets_NK, logits_NV.shape[1], ignore_index)
    logp_NK, normaliser_N2 = _empty_outputs(logits_NV, targets_NK)
    logp_NK.zero_()
    normaliser_N2.zero_()
    ignored_NK = targets_NK == ignore_index
    for rows_R, z_RV, _ in _chunks(logits_NV, ignored_NK, softcap, temperature):
        z_RK = z_RV.gather(1, targets_NK[rows_R].masked_fill(ignored_NK[rows_R], 0))
        max_R1 = z_RV.amax(1, keepdim=True)
        log_sum_R1 = z_RV.sub_(max_R1).exp_().sum(1, keepdim=True).log_()
        # z - max first: both are large together on peaked rows, and the rest is what matters.
        logp_RK = z_RK - max_R1 - log_sum_R1
        logp_NK[rows_R] = logp_RK.masked_fill_(ignored_NK[rows_R], 0.0)
        normaliser_N2[rows_R] = torch.cat((max_R1, log_sum_R1), 1)
    return logp_NK, normaliser_N2


def _portable_gradient(
    out_NV: Tensor,
    grad_NK: Tensor,
    logits_NV: Tensor,
    targets_NK: Tensor,
    normaliser_N2: Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> None:
    """Write d loss / d logits to ``out``, which may be the logits themselves."""
    ignored_NK = targets_NK == ignore_index
    grad_NK = grad_NK.masked_fill(ignored_NK, 0.0)
    for rows_R, z_RV, slope_RV in _chunks(logits_NV, ignored_NK, softcap, temperature, True):
        grad_RK = grad_NK[rows_R]
        max_R1, log_sum_R1 = normaliser_N2[rows_R].split(1, dim=1)
        g_RV = z_RV.sub_(max_R1).sub_(log_sum_R1).exp_().mul_(-grad_RK.sum(1, keepdim=True))
        g_RV.scatter_add_(1, targets_NK[rows_R].masked_fill(ignored_NK[rows_R], 0), grad_RK)
        if slope_RV is not None:
            g_RV.mul_(slope_RV)
        out_NV[rows_R] = g_RV.div_(temperature).to(out_NV.dtype)
    out_NV[ignored_NK.all(1)] = 0.0


def _chunks(
    logits_NV: Tensor,
    ignored_NK: Tensor,
    softcap: float | None,
    temperature: float,
    with_slope: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield (active rows, a fresh z' in fp32/64, d cap(z) / d z or None), a chunk at a time."""
    active_A = (~ignored_NK).any(1).nonzero().squeeze(1)
    for rows_R in active_A.split(max(1, CHUNK // max(1, logits_NV.shape[1]))):
        z_RV = logits_NV[rows_R].to(accumulation_dtype(logits_NV.dtype))
        slope_RV = None
        if softcap is not None:
            z_RV.div_(softcap).tanh_()
            slope_RV = 1.0 - z_RV.square() if with_slope else None
            z_RV.mul_(softcap)
        yield rows_R, z_RV.div_(temperature), slope_RV


def _forward(
    logits: Tensor,
    targets: Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor]:
    del inplace_backward  # read by the backward pass
    forward = _dispatch.version("logits_logprob", _portable, logits)
    return forward(logits, targets, softcap, temperature, ignore_index)


def _empty_outputs(logits: Tensor, targets: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    dtype, rows = accumulation_dtype(logits.dtype), logits.shape[0]
    return (
        logits.new_empty((rows, targets.shape[1]), dtype=dtype),
        logits.new_empty((rows, 2), dtype=dtype),
    )


def _gradient(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    d_logits = logits.new_empty(logits.shape)
    _write_gradient(d_logits, grad, logits, targets, normaliser, softcap, temperature, ignore_index)
    return d_logits


def _gradient_inplace(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> None:
    _write_gradient(logits, grad, logits, targets, normaliser, softcap, temperature, ignore_index)


def _write_gradient(out: Tensor, grad: Tensor, logits: Tensor, *rest: Any) -> None:
    gradient = _dispatch.version("logits_logprob_gradient", _portable_gradient, logits)
    gradient(out, grad, logits, *rest)


_logits_logprob_backward = _dispatch.Operator(
    "logits_logprob_backward",
    _gradient,
    lambda logits, **_: logits.new_empty(logits.shape),
    by=None,
)
_logits_logprob_backward_inplace = _dispatch.Operator(
    "logits_logprob_backward_inplace",
    _gradient_inplace,
    lambda **_: None,
    by=None,
    mutates=("logits",),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, *ctx.options, ctx.inplace = inputs
    _, normaliser = output
    ctx.mark_non_differentiable(normaliser)
    ctx.save_for_backward(logits, targets, normaliser)


def _backward(ctx: Any, grad_NK: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    # Reading saved_tensors compares versions: logits that changed since, also by the in-place
    # gradient of an earlier pass, are an error here and not a wrong number.
    logits, targets, normaliser = ctx.saved_tensors
    if ctx.inplace:
        # Without its graph, but with the same memory and version counter.
        d_logits = logits.detach()
        _logits_logprob_backward_inplace(grad_NK, d_logits, targets, normaliser, *ctx.options)
    else:
        d_logits = _logits_logprob_backward(grad_NK, logits, targets, normaliser, *ctx.options)
    return d_logits, None, None, None, None, None


_logits_logprob = _dispatch.Operator(
    "logits_logprob",
    _forward,
    _empty_outputs,
    by=None,
    setup_context=_setup_context,
    backward=once_differentiable(_backward),
)
