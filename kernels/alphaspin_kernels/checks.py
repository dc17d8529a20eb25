"""What the operators have in common: checks of their arguments, and the hash of dropout masks.

Shape suffixes as in `reference`.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

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


def check_lengths(lengths_B: Tensor, limit: int) -> int:
    """The largest of the lengths, 0 of none; ValueError if one is outside [0, limit]."""
    if not len(lengths_B):
        return 0
    # Both by one wait for the device.
    shortest, longest = torch.stack(lengths_B.aminmax()).tolist()
    if shortest < 0 or longest > limit:
        wrong = shortest if shortest < 0 else longest
        raise ValueError(f"length {wrong} is outside [0, L = {limit}]")
    return longest


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
    """Return one scaling per segment; raise ValueError, naming both sides, if something is off.

    Every linear of every pass comes through here: each attribute is asked for once.
    """
    shape, dtype, device = x_NI.shape, x_NI.dtype, x_NI.device
    if len(shape) != 2 or weight_OI.dim() != 2 or shape[1] != weight_OI.shape[1]:
        raise ValueError(
            f"x must be [N, I] and weight [O, I], got {list(shape)} and {list(weight_OI.shape)}"
        )
    if dtype not in _FLOATS:
        raise ValueError(f"x must be one of {_FLOATS}, got {dtype}")
    width_out, width_in = weight_OI.shape
    if bias_O is not None and bias_O.shape != (width_out,):
        raise ValueError(f"bias must be [O] with O = {width_out}, got {list(bias_O.shape)}")
    if not segments or len(adapters) != len(segments):
        raise ValueError(f"{len(adapters)} adapters for {len(segments)} segments")
    if min(segments) < 0 or sum(segments) != shape[0]:
        raise ValueError(f"segments {list(segments)} must be row counts that add up to {shape[0]}")
    many = isinstance(scaling, Sequence)
    scalings = [float(value) for value in (scaling if many else [scaling] * len(segments))]
    if len(scalings) != len(segments):
        raise ValueError(f"{len(scalings)} scalings for {len(segments)} segments")
    if not all(map(math.isfinite, scalings)):
        raise ValueError(f"scaling must be finite, got {scaling}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    graded = torch.is_grad_enabled()
    for name, tensor in (("weight", weight_OI), ("bias", bias_O)):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise ValueError(f"x is {dtype} but {name} is {tensor.dtype}")
        _check_frozen(name, tensor, device, graded)
    for s, pair in enumerate(adapters):
        if pair is None:
            continue
        a_RI, b_OR = pair
        down, up, kind = a_RI.shape, b_OR.shape, a_RI.dtype
        if (
            len(down) != 2
            or down[0] == 0
            or down[1] != width_in
            or len(up) != 2
            or up[0] != width_out
            or up[1] != down[0]
        ):
            raise ValueError(
                f"adapter {s} must be A [r, {width_in}] and B [{width_out}, r], "
                f"got {list(down)} and {list(up)}"
            )
        if kind != b_OR.dtype or kind not in (dtype, torch.float32):
            raise ValueError(
                f"adapter {s} must be {dtype} like x, or torch.float32, got {kind} and {b_OR.dtype}"
            )
        if graded and s and (a_RI.requires_grad or b_OR.requires_grad):
            for name, tensor in (("A", a_RI), ("B", b_OR)):
                _check_frozen(f"{name} of adapter {s}", tensor, device, graded)
        if a_RI.device != device or b_OR.device != device:
            other = a_RI.device if a_RI.device != device else b_OR.device
            raise ValueError(f"x is on {device} but adapter {s} is on {other}")
    return scalings


def _check_frozen(name: str, tensor: Tensor, device: torch.device, graded: bool) -> None:
    """Raise ValueError if a tensor is elsewhere, or would need a gradient."""
    if tensor.device != device:
        raise ValueError(f"x is on {device} but {name} is on {tensor.device}")
    if graded and tensor.requires_grad:
        raise ValueError(
            f"{name} requires grad but is frozen here: only x and the adapter of the first "
            "segment, the policy, get gradients"
        )


def dropout_key(seed: int) -> int:
    """The 32-bit key of a 64-bit seed, as a signed integer."""
    return signed(_mix_word(seed >> 32 & _WORD ^ _mix_word(seed & _WORD)))


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


_WORD = 0xFFFFFFFF


def _mix_word(h: int) -> int:
    """fmix32 of one unsigned number: a launch asks for it, and tensors would take 0.1 ms."""
    h = (h ^ h >> 16) * 0x85EBCA6B & _WORD
    h = (h ^ h >> 13) * 0xC2B2AE35 & _WORD
    return h ^ h >> 16


def signed(value: int) -> int:
    """The 32-bit signed integer with the bits of an unsigned one."""
    return value - (value >> 31 << 32)
