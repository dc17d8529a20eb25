r"""Sub-trajectory balance over all pairs of states of a sequence, in O(L) instead of O(L^2).

With the states 0 ... n of a sequence of n tokens (the prefixes, each of which may terminate),

    r_i  = log_reward_i - log_pterm_i - sum_{k<=i} log_pf_k,
    loss = sum_{i<j} w_ij (r_i - r_j)^2 / sum_{i<j} w_ij,    w_ij = lam^(j-i-1),

sums over all rows. Only differences of r count, so let delta_j = r_j - r_{j-1}, which has no sum of
log-probs in it, and let state j gather all pairs that end in it, measured from r_j:

    A_j = sum_{i<j} w_ij               = lam A_{j-1} + 1
    M_j = sum_{i<j} w_ij (r_i - r_j)   = lam M_{j-1} - A_j delta_j
    Q_j = sum_{i<j} w_ij (r_i - r_j)^2 = lam (Q_{j-1} - 2 delta_j M_{j-1}) + A_j delta_j^2

(insert r_i - r_j = (r_i - r_{j-1}) - delta_j, and add the pair i = j-1). Then loss = sum Q / sum A,
and no large numbers are subtracted, however large r. State j is the end of the pairs in M_j and the
start of those in M'_j = sum_{i>j} w_ji (r_i - r_j), the same recursion from the other end with
-delta, so

    g_j = d loss / d r_j = -2 (M_j + M'_j) / sum A,
    d log_reward = g,    d log_pterm = -g,    d log_pf_k = -sum_{i>=k} g_i.

These do not depend on what the loss is used for: the forward pass computes them and the backward
pass scales them. For lam > 1 all weights are divided by the largest possible one, lam^(longest-1),
which cancels in the loss, and the recursions are those of lam^-(j-1) A, M, Q: nothing overflows.

Shape suffixes: B sequences, L tokens, S = L + 1 states.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alphaspin_kernels import _dispatch
from alphaspin_kernels.checks import accumulation_dtype, check_lengths, check_subtb_loss
from alphaspin_kernels.numerics import subtb_rates


def subtb_loss(
    log_pf: Tensor, log_pterm: Tensor, log_reward: Tensor, lengths: Tensor, lam: float
) -> Tensor:
    """Return the sub-trajectory-balance loss, the weighted mean over all pairs of all sequences.

    Args:
        log_pf: [B, L] log q(z_k | z_<k) in nats, token k = 1 ... L; bf16, fp16, fp32 or float64.
        log_pterm: [B, L + 1] log q(end | z_1 ... z_i), state i = 0 ... L, same dtype and device.
        log_reward: [B, L + 1] log R(z_1 ... z_i end), same dtype and device.
        lengths: [B] int64, in tokens: row b has the states 0 ... lengths[b]. What lies beyond is
            padding: it may hold anything, is not read, and gets a gradient of 0.
        lam: weight lam^(j-i-1) of the pair i < j, finite, at least 0. At 0, neighbours only.

    Returns:
        Scalar, nats squared, fp32 (float64 for float64 inputs); 0 if there is no pair. Computed in
        float64. Differentiable once, in ``log_pf``, ``log_pterm`` and ``log_reward``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a length outside [0, L],
            a lam that is negative or not finite.

    Source: Madan et al., "Learning GFlowNets from partial episodes" (2209.12782), eq. 6, with the
    flows of Hu et al. (2310.04363), eq. 3; section 4 of `docs/theory.md`.
    """
    check_subtb_loss(log_pf, log_pterm, log_reward, lengths, lam)
    dtype = accumulation_dtype(log_pf.dtype)
    inputs = tuple(tensor.to(dtype) for tensor in (log_pf, log_pterm, log_reward))
    with_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    loss, _, _ = _subtb_loss(*inputs, lengths, float(lam), with_gradient)
    return loss


def _portable(
    log_pf: Tensor,
    log_pterm: Tensor,
    log_reward: Tensor,
    lengths: Tensor,
    lam: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Portable version. Returns (loss [], d log_reward [B, S], d log_pf [B, L]).

    The gradients are empty unless ``with_gradient``. One small operation per state and recursion,
    on all rows at once.
    """
    longest = check_lengths(lengths, log_pf.shape[1])
    loss, g_BS, d_log_pf_BL = outputs = _empty_outputs(log_pf, with_gradient)
    if longest == 0:
        for output in outputs:
            output.zero_()
        return outputs
    growth, fade = subtb_rates(lam)

    # The states 1 ... longest, as rows of one tensor: a step of a recursion is then one operation.
    states_L = torch.arange(1, longest + 1, device=lengths.device)
    ended_LB = states_L[:, None] > lengths
    steps = [x.T[: longest + 1].double().diff(dim=0) for x in (log_reward, log_pterm)]
    step_LB = steps[0] - steps[1] - log_pf.T[:longest]
    delta_LB = step_LB.masked_fill_(ended_LB, 0.0)
    fade_L = fade ** (longest - states_L).double()  # lam^-(j-1) to lam^-(longest-1)

    a_L = _recursion(fade ** (states_L - 1).double(), growth)[:, None]
    m_LB = _recursion(-a_L * delta_LB, growth)
    before_LB = torch.nn.functional.pad(m_LB, (0, 0, 1, 0))[:-1]
    q_LB = _recursion(a_L * delta_LB.square() - 2 * growth * delta_LB * before_LB, growth)
    weights = (a_L * fade_L[:, None]).expand_as(q_LB).masked_fill(ended_LB, 0.0).sum()
    loss.copy_((q_LB * fade_L[:, None]).masked_fill_(ended_LB, 0.0).sum() / weights)
    if not with_gradient:
        return outputs

    # Token k of a row, seen from its end, is token length + 1 - k; padding stays where it is.
    mirror_LB = torch.where(ended_LB, states_L[:, None], lengths + 1 - states_L[:, None]) - 1
    back_LB = _recursion(a_L * delta_LB.gather(0, mirror_LB), growth) * fade_L[:, None]
    ends_LB = (m_LB * fade_L[:, None]).masked_fill_(ended_LB, 0.0)
    starts_LB = back_LB.gather(0, mirror_LB).masked_fill_(ended_LB, 0.0)
    g_SB = torch.nn.functional.pad(ends_LB, (0, 0, 1, 0))  # nothing ends in state 0
    g_SB[:-1] += starts_LB  # token k leaves state k-1
    g_SB *= -2 / weights
    g_BS.zero_()[:, : longest + 1] = g_SB.T
    d_log_pf_BL.zero_()[:, :longest] = -_recursion(g_SB[1:].flip(0), 1.0).flip(0).T
    return outputs


def _recursion(x_LB: Tensor, factor: float) -> Tensor:
    """y_j = factor y_{j-1} + x_j along the first dimension, in place."""
    for before, row in pairwise(x_LB.unbind(0)):
        row.add_(before, alpha=factor)
    return x_LB


def _empty_outputs(log_pf: Tensor, with_gradient: bool, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = log_pf.shape
    rows = batch if with_gradient else 0
    return (
        log_pf.new_empty(()),
        log_pf.new_empty((rows, tokens + 1)),
        log_pf.new_empty((rows, tokens)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, g_BS, d_log_pf_BL = output
    ctx.mark_non_differentiable(g_BS, d_log_pf_BL)
    ctx.save_for_backward(g_BS, d_log_pf_BL)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    g_BS, d_log_pf_BL = ctx.saved_tensors
    needs_pf, needs_pterm, needs_reward = ctx.needs_input_grad[:3]
    return (
        grad * d_log_pf_BL if needs_pf else None,
        -grad * g_BS if needs_pterm else None,
        grad * g_BS if needs_reward else None,
        None,
        None,
        None,
    )


# A second differentiation would take the saved gradients for constants; better an error than that.
_subtb_loss = _dispatch.Operator(
    "subtb_loss",
    _portable,
    _empty_outputs,
    by="log_pf",
    setup_context=_setup_context,
    backward=once_differentiable(_backward),
)
