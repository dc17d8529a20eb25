"""The operators in plain PyTorch: what they mean, with no regard for memory or speed.

They run in fp32, or in float64 when the inputs are float64, and are what the tests compare with.

Shape suffixes: N rows, H hidden size, V vocabulary, K targets per row; B sequences, C = B + 1
boundaries, L tokens,
S = L + 1 states of a sequence; of segmented_lora: I and O width in and out, R rank or rows of a
segment, C columns.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

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
    _check_options(targets, hidden_NH.shape[0], softcap, temperature)


def _check_options(targets: Tensor, rows: int, softcap: float | None, temperature: float) -> None:
    """Raise ValueError if what all log-prob operators take does not fit together."""
    if targets.dim() not in (1, 2) or targets.shape[0] != rows:
        raise ValueError(
            f"targets must be [N] or [N, K] with N = {rows}, got {list(targets.shape)}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be torch.int64, got {targets.dtype}")
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
    return logits_logprob(
        logits_NV, targets, softcap=softcap, temperature=temperature, ignore_index=ignore_index
    )


def check_logits_logprob(
    logits_NV: Tensor,
    targets: Tensor,
    softcap: float | None,
    temperature: float,
    inplace_backward: bool,
) -> None:
    """Raise ValueError, naming both sides, if the arguments do not fit together.

    Reads no values: see :func:`check_linear_logprob`.
    """
    if logits_NV.dim() != 2:
        raise ValueError(f"logits must be [N, V], got {list(logits_NV.shape)}")
    if logits_NV.dtype not in _FLOATS:
        raise ValueError(f"logits must be one of {_FLOATS}, got {logits_NV.dtype}")
    _check_options(targets, logits_NV.shape[0], softcap, temperature)
    if targets.device != logits_NV.device:
        raise ValueError(f"logits is on {logits_NV.device} but targets is on {targets.device}")
    if not inplace_backward or not logits_NV.requires_grad:
        return
    if logits_NV.is_leaf:
        raise ValueError(
            "inplace_backward=True would replace the logits by their own gradient, but logits "
            "is a leaf (logits.is_leaf = True): pass inplace_backward=False"
        )
    rows, vocabulary = logits_NV.shape
    if (vocabulary > 1 and logits_NV.stride(1) != 1) or (
        rows > 1 and logits_NV.stride(0) < vocabulary
    ):
        raise ValueError(
            "inplace_backward=True needs rows that are contiguous and do not overlap, "
            f"got logits of shape {list(logits_NV.shape)} and strides {logits_NV.stride()}"
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


def check_cu_seqlens(hidden_NH: Tensor, cu_seqlens_C: Tensor) -> None:
    """Raise ValueError if the boundaries have a wrong shape, dtype or device; reads no values."""
    if cu_seqlens_C.dim() != 1 or not len(cu_seqlens_C):
        raise ValueError(f"cu_seqlens must be [B + 1], got {list(cu_seqlens_C.shape)}")
    if cu_seqlens_C.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens_C.dtype}")
    if cu_seqlens_C.device != hidden_NH.device:
        raise ValueError(f"hidden is on {hidden_NH.device} but cu_seqlens on {cu_seqlens_C.device}")


def check_boundaries(cu_seqlens_C: Tensor, rows: int) -> None:
    """Raise ValueError if the boundaries do not rise from 0 to the number of rows."""
    bounds = cu_seqlens_C.tolist()
    if bounds[0] != 0 or bounds[-1] != rows or any(a > b for a, b in pairwise(bounds)):
        shown = bounds if len(bounds) < 9 else [bounds[0], "...", bounds[-1]]
        raise ValueError(f"cu_seqlens must rise from 0 to N = {rows}, got {shown}")


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


def check_mixture_logprob(
    prev_NH: Tensor,
    base_NH: Tensor,
    weight_VH: Tensor,
    targets: Tensor,
    alpha: float,
    bias_V: Tensor | None,
    softcap: float | None,
    temperature: float,
    log_normaliser_N: Tensor | None,
) -> None:
    """Raise ValueError, naming both sides, if the arguments do not fit together.

    Reads no values: see :func:`check_linear_logprob`.
    """
    check_linear_logprob(prev_NH, weight_VH, targets, bias_V, softcap, temperature)
    for what in ("shape", "dtype", "device"):
        prev, base = getattr(prev_NH, what), getattr(base_NH, what)
        if prev != base:
            raise ValueError(f"hidden_prev has {what} {prev} but hidden_base has {what} {base}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if log_normaliser_N is not None and log_normaliser_N.shape != prev_NH.shape[:1]:
        raise ValueError(
            f"log_normaliser must be [N] with N = {len(prev_NH)}, "
            f"got {list(log_normaliser_N.shape)}"
        )


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


def check_subtb_loss(
    log_pf_BL: Tensor, log_pterm_BS: Tensor, log_reward_BS: Tensor, lengths_B: Tensor, lam: float
) -> None:
    """Raise ValueError, naming both sides, if the arguments do not fit together.

    Reads no values; those of the lengths are checked by :func:`check_lengths`.
    """
    if log_pf_BL.dim() != 2:
        raise ValueError(f"log_pf must be [B, L], got {list(log_pf_BL.shape)}")
    if log_pf_BL.dtype not in _FLOATS:
        raise ValueError(f"log_pf must be one of {_FLOATS}, got {log_pf_BL.dtype}")
    batch, longest = log_pf_BL.shape
    for name, tensor in (("log_pterm", log_pterm_BS), ("log_reward", log_reward_BS)):
        if tensor.shape != (batch, longest + 1):
            raise ValueError(
                f"{name} must be [B, L + 1] = {[batch, longest + 1]} (log_pf is [B, L]), "
                f"got {list(tensor.shape)}"
            )
        if tensor.dtype != log_pf_BL.dtype:
            raise ValueError(f"log_pf is {log_pf_BL.dtype} but {name} is {tensor.dtype}")
    if lengths_B.shape != (batch,) or lengths_B.dtype != torch.int64:
        raise ValueError(
            f"lengths must be [B] torch.int64 with B = {batch}, "
            f"got {list(lengths_B.shape)} {lengths_B.dtype}"
        )
    for name, tensor in (
        ("log_pterm", log_pterm_BS),
        ("log_reward", log_reward_BS),
        ("lengths", lengths_B),
    ):
        if tensor.device != log_pf_BL.device:
            raise ValueError(f"log_pf is on {log_pf_BL.device} but {name} is on {tensor.device}")
    if not (lam >= 0 and math.isfinite(lam)):
        raise ValueError(f"lam must be finite and not negative, got {lam}")


def check_lengths(lengths_B: Tensor, limit: int) -> None:
    """Raise ValueError if a length is outside [0, limit]."""
    outside_B = (lengths_B < 0) | (lengths_B > limit)
    if outside_B.any():
        raise ValueError(f"length {lengths_B[outside_B][0].item()} is outside [0, L = {limit}]")


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


Adapter = tuple[Tensor, Tensor] | None


def check_segmented_lora(
    x_NI: Tensor,
    weight_OI: Tensor,
    adapters: Sequence[Adapter],
    segments: Sequence[int],
    scaling: float | Sequence[float],
    bias_O: Tensor | None,
    dropout: float,
    seed: int,
) -> list[float]:
    """Return one scaling per segment; raise ValueError, naming both sides, if something is off."""
    if x_NI.dim() != 2 or weight_OI.dim() != 2 or x_NI.shape[1] != weight_OI.shape[1]:
        raise ValueError(
            "x must be [N, I] and weight [O, I], "
            f"got {list(x_NI.shape)} and {list(weight_OI.shape)}"
        )
    if x_NI.dtype not in _FLOATS:
        raise ValueError(f"x must be one of {_FLOATS}, got {x_NI.dtype}")
    (width_out, width_in), dtype = weight_OI.shape, x_NI.dtype
    if bias_O is not None and bias_O.shape != (width_out,):
        raise ValueError(f"bias must be [O] with O = {width_out}, got {list(bias_O.shape)}")
    if not segments or len(adapters) != len(segments):
        raise ValueError(f"{len(adapters)} adapters for {len(segments)} segments")
    if min(segments) < 0 or sum(segments) != x_NI.shape[0]:
        raise ValueError(f"segments {list(segments)} must be row counts that add up to {len(x_NI)}")
    many = isinstance(scaling, Sequence)
    scalings = [float(value) for value in (scaling if many else [scaling] * len(segments))]
    if len(scalings) != len(segments):
        raise ValueError(f"{len(scalings)} scalings for {len(segments)} segments")
    if not all(math.isfinite(value) for value in scalings):
        raise ValueError(f"scaling must be finite, got {scaling}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    frozen: list[tuple[str, Tensor]] = [("weight", weight_OI)]
    if bias_O is not None:
        frozen.append(("bias", bias_O))
    for name, tensor in frozen:
        if tensor.dtype != dtype:
            raise ValueError(f"x is {dtype} but {name} is {tensor.dtype}")
    named = list(frozen)
    for s, pair in enumerate(adapters):
        if pair is None:
            continue
        a_RI, b_OR = pair
        if (
            a_RI.dim() != 2
            or a_RI.shape[0] == 0
            or a_RI.shape[1] != width_in
            or b_OR.shape != (width_out, a_RI.shape[0])
        ):
            raise ValueError(
                f"adapter {s} must be A [r, {width_in}] and B [{width_out}, r], "
                f"got {list(a_RI.shape)} and {list(b_OR.shape)}"
            )
        if a_RI.dtype != b_OR.dtype or a_RI.dtype not in (dtype, torch.float32):
            raise ValueError(
                f"adapter {s} must be {dtype} like x, or torch.float32, "
                f"got {a_RI.dtype} and {b_OR.dtype}"
            )
        both = [(f"A of adapter {s}", a_RI), (f"B of adapter {s}", b_OR)]
        named += both
        frozen += both if s else []
    for name, tensor in named:
        if tensor.device != x_NI.device:
            raise ValueError(f"x is on {x_NI.device} but {name} is on {tensor.device}")
    for name, tensor in frozen:
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad but is frozen here: only x and the adapter of the first "
                "segment, the policy, get gradients"
            )
    return scalings


def dropout_key(seed: int) -> int:
    """The 32-bit key of a 64-bit seed, as a signed integer."""
    halves = [signed(seed & 0xFFFFFFFF), signed(seed >> 32 & 0xFFFFFFFF)]
    low, high = torch.tensor(halves, dtype=torch.int32, device="cpu")
    return int(_mix(high ^ _mix(low)))


def dropout_threshold(dropout: float) -> int:
    """Random bits, as a signed 32-bit integer, below this are dropped."""
    return int(dropout * 2**32) - 2**31


def dropout_mask(
    rows: int, columns: range, dropout: float, seed: int, device: torch.device
) -> Tensor:
    """Which entries of [rows, columns] dropout keeps, [rows, len(columns)] bool.

    A function of (seed, row, column) alone: bits = mix(mix(mix(row) ^ key) ^ mix(column)), with the
    finaliser of MurmurHash3 (Appleby 2011, "fmix32") as mix.
    """
    row_R = torch.arange(rows, dtype=torch.int32, device=device)
    column_C = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=device)
    row_R, column_C = _mix(_mix(row_R) ^ dropout_key(seed)), _mix(column_C)
    kept_RC = torch.empty(rows, len(columns), dtype=torch.bool, device=device)
    for first in range(0, rows, 64):  # bits that stay in the processor's cache
        bits = _mix(row_R[first : first + 64, None] ^ column_C)
        torch.ge(bits, dropout_threshold(dropout), out=kept_RC[first : first + 64])
    return kept_RC


def _mix(h: Tensor) -> Tensor:
    """fmix32, in place: int32 products wrap, the masks make the shifts unsigned."""
    h ^= (h >> 16) & 0xFFFF
    h *= signed(0x85EBCA6B)
    h ^= (h >> 13) & 0x7FFFF
    h *= signed(0xC2B2AE35)
    h ^= (h >> 16) & 0xFFFF
    return h


def signed(value: int) -> int:
    """The 32-bit signed integer with the bits of an unsigned one."""
    return value - (value >> 31 << 32)


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
