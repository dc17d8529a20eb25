"""TRL's trainers with their log-probs by `linear_logprob`: DPO, KTO, GRPO, RLOO, SFT and CPO/SimPO.

Since 1.16 TRL builds no logits either: one function, ``ChunkedLogProbFunction``, turns hidden
states into log-probs and per-token metrics for all its trainers. It takes three products with a
frozen head and four with a trainable one. That function is the seam: everything around it (masks,
adapters, references, sharding, losses) stays TRL's, which a subclass per trainer would have to
copy. CPO still builds logits; its ``concatenated_forward`` is replaced by one that asks the same
function.

With a frozen head the metrics come out of what the gradient needs anyway (`metrics`): two products
for GRPO and KTO, and at most three for DPO. Elsewhere one product makes log-probs and metrics, and
the backward pass is that of `linear_logprob`.

Shape suffixes as in `linear_logprob`.
"""

import functools
import importlib
import inspect
import sys
import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from alphaspin_kernels.linear_logprob import _linear_logprob, _linear_logprob_backward
from alphaspin_kernels.linear_logprob.cpo import with_fused_head, without_logits
from alphaspin_kernels.linear_logprob.metrics import metrics_from_row, metrics_from_tiles
from alphaspin_kernels.linear_logprob.probe import check_fused_head

ARGUMENTS = (
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
IGNORED = -100


def patch_trl() -> ExitStack:
    """Let TRL's trainers take log-probs by `linear_logprob`, until the result is closed.

    DPO, KTO, GRPO, RLOO, SFT and asynchronous GRPO, and CPO/SimPO (no other experimental trainer),
    those that exist already too, except for CPO's. Losses, gradients and metrics are TRL's. On the
    CPU only tokens with a label are scored; TRL scores all.

    What stays TRL's own: devices other than CPU and CUDA, logits scaled by a factor that is not
    positive, the gradient of the entropy (``entropy_coef``); in CPO, encoder-decoders, auxiliary
    losses of experts, ``use_liger_kernel``, and (with a warning) models that are refused elsewhere.

    CPO logs ``logits/chosen`` and ``logits/rejected`` over labelled tokens, as TRL's DPO does, not
    over prompts and padding too.

    Returns:
        A context manager: ``with patch_trl(): ...``, or ``undo = patch_trl()`` and
        ``undo.close()``. Nothing happens if TRL is patched already.

    Raises:
        ImportError: trl is not installed, or is a version without that function.

    From then on, a trainer raises ValueError for a model whose logits are not what TRL's fused head
    takes them for, softcap(c (W h + b)) with c and the cap of its configuration, or whose head is
    no plain linear layer.
    """
    utils: Any = importlib.import_module("trl.trainer.utils")
    undo = ExitStack()
    if isinstance(getattr(utils, "_ChunkedLogProbFunction", None), _Patched):
        return undo
    names = ("_ChunkedLogProbFunction", "add_fused_lm_head", "_use_triton")
    original, add, use_triton = (getattr(utils, name, None) for name in names)
    forward = getattr(original, "forward", None)
    takes = forward and tuple(inspect.signature(forward).parameters)
    if takes != ARGUMENTS or add is None or use_triton is None:
        version = getattr(sys.modules["trl"], "__version__", "?")
        raise ImportError(
            f"patch_trl knows how TRL 1.16 takes log-probs, and trl {version} does it otherwise: "
            "`pip install trl==1.16.0`, or train without patch_trl"
        )

    @functools.wraps(add)
    def checked_add(model: Any, temperature: float = 1.0, *rest: Any, **options: Any) -> None:
        add(model, temperature, *rest, **options)
        check_fused_head(model, temperature)

    def scored_alone(device: torch.device) -> bool:  # tokens without a label are left out
        return device.type == "cpu" or use_triton(device)

    _set(undo, utils, "_ChunkedLogProbFunction", _Patched(original, utils))
    _set(undo, utils, "_use_triton", scored_alone)
    _rename(add, checked_add)
    undo.callback(_rename, checked_add, add)
    try:
        with warnings.catch_warnings(action="ignore"):  # that it is experimental
            cpo: Any = importlib.import_module("trl.experimental.cpo.cpo_trainer").CPOTrainer
    except (ImportError, AttributeError):
        warnings.warn("this TRL has no CPOTrainer to patch", stacklevel=2)
    else:
        _set(undo, cpo, "__init__", with_fused_head(cpo.__init__, utils))
        _set(undo, cpo, "concatenated_forward", without_logits(cpo.concatenated_forward))
    return undo


def _set(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _rename(old: Any, new: Any) -> None:
    """Each trainer's module has imported the function under its own name."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "trl" and vars(module).get("add_fused_lm_head") is old:
            module.add_fused_lm_head = new  # type: ignore[attr-defined]


class _Patched:
    """What TRL calls in place of its autograd function."""

    def __init__(self, original: Any, utils: Any):
        self.original, self.utils = original, utils

    def apply(self, hidden_NH: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
        scale = arguments[-2]
        if hidden_NH.device.type not in ("cpu", "cuda") or not scale > 0:
            return self.original.apply(hidden_NH, *arguments)
        return _Scored.apply(self, hidden_NH, *arguments)  # type: ignore[return-value]


class _Scored(torch.autograd.Function):
    """ChunkedLogProbFunction, argument by argument and result by result."""

    @staticmethod
    def forward(
        ctx: Any,
        patched: _Patched,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)  # None says that nobody asks for the entropy's gradient
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        # cap(c z) / T = cap'(z) / T' with both divided by c.
        ctx.options = None if softcap is None else softcap / scale, temperature / scale
        ctx.patched, ctx.rest = patched, (temperature, chunk_size, softcap, scale)
        h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        b = None if bias is None else bias.to(ctx.dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[1:4]
        ctx.scales_row = needs_hidden and not needs_weight and not needs_bias
        extra = set(outputs) - {"log_probs"}
        free = bias is None and softcap is None and "log_sum_sq_probs" not in outputs
        found: dict[str, Tensor] = {}
        row = hidden.new_empty(0)
        if not extra or (ctx.scales_row and free):
            options = (*ctx.options, IGNORED, ctx.scales_row, 0.0)
            logp_N1, lse, row, _ = _linear_logprob(h, w, targets[:, None], b, *options)
            logp = logp_N1[:, 0]
            if extra:
                found = metrics_from_row(h, w, targets, logp, row, ctx.options[1], extra)
        else:
            ctx.scales_row = False
            logp, lse, found = metrics_from_tiles(h, w, b, targets, *ctx.options, extra)
        keep = not ctx.scales_row or "entropy" in outputs
        ctx.save_for_backward(row, lse, targets, *((hidden, weight, bias) if keep else ()))
        rest = [found.get(name) for name in ("log_sum_sq_probs", "mean_logits", "is_top1")]
        ctx.mark_non_differentiable(*(x for x in rest if x is not None))
        return (logp, found.get("entropy"), *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad_N, grad_entropy_N = grads[:2]
        row, lse, targets, *inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        total: list[Any] = [None, None, None]
        if grad_N is not None and ctx.scales_row:
            total[0] = (grad_N[:, None] * row).to(row.dtype)
        elif grad_N is not None:
            gather = ctx.patched.utils.maybe_gather_lm_head_ctx  # DeepSpeed's shards
            with gather(*inputs[1:]):
                hidden, weight, bias = (None if x is None else x.to(ctx.dtype) for x in inputs)
                arguments = (hidden, weight, targets[:, None], bias, lse, *ctx.options, IGNORED)
                parts = _linear_logprob_backward(grad_N[:, None], *arguments, list(needs))
            total = [part if need else None for part, need in zip(parts, needs, strict=True)]
        if grad_entropy_N is not None:
            with torch.enable_grad(), torch.autocast(grad_entropy_N.device.type, enabled=False):
                leaves: list[Any] = [x if x is None else x.detach() for x in inputs]
                leaves[0] = leaves[0].to(ctx.dtype)  # what TRL computes in
                wanted = [x.requires_grad_() for x, need in zip(leaves, needs, strict=True) if need]
                apply = ctx.patched.original.apply
                _, entropy, *_ = apply(*leaves, targets, *ctx.rest, ("entropy",))
                parts = iter(torch.autograd.grad(entropy, wanted, grad_entropy_N))
            for k in (k for k in range(3) if needs[k]):
                part = next(parts)
                total[k] = part if total[k] is None else total[k] + part
        # Autograd itself rounds to the dtype of the input.
        return (None, *total, *[None] * 6)
