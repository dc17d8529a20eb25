"""The language-model head: logits = softcap(c (W h + b)), c and the cap as found."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alphaspin.errors import InputError

# At once on a CPU: what its BLAS repacks in each call then stays in the cache. 32 rows times
# 512 × 128,000 took 92 ms in one product and 80 ms in parts (fp32, one thread).
HEAD_ROWS = 2048


def head_product(head: nn.Linear, hidden_NH: Tensor) -> Tensor:
    """W h + b, [..., V] in fp32 (float64 of a float64 model)."""
    weight_VH: Tensor = head.weight
    rows = HEAD_ROWS if weight_VH.device.type == "cpu" else len(weight_VH)
    parts = [_product(hidden_NH, part) for part in weight_VH.split(rows)]
    product = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    bias = cast(Tensor | None, head.bias)
    if bias is not None:
        product += bias
    return product


def _product(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T, [..., O], with sums that are not rounded to 16 bits where the factors have 16."""
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    if weight_OI.dtype == wide:
        return nn.functional.linear(x, weight_OI)
    if weight_OI.is_cuda and not weight_OI.requires_grad:
        found = cast(Tensor, _WideProduct.apply(x.reshape(-1, x.shape[-1]), weight_OI))
        return found.view(*x.shape[:-1], -1)
    return nn.functional.linear(x.to(wide), weight_OI.to(wide))


class _WideProduct(torch.autograd.Function):
    """x W^T [N, O] in fp32 of 16-bit x [N, I] and a frozen W [O, I], on a GPU.

    PyTorch has no derivative of products with an `out_dtype`. The gradient is rounded to 16 bits
    for its product with W, each row in units of its largest entry, lest fp16 underflows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return torch.mm(x, weight_OI.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight_OI,) = ctx.saved_tensors
        size_N1 = torch.linalg.vector_norm(grads[0], torch.inf, dim=1, keepdim=True)
        size_N1.clamp_(min=torch.finfo(size_N1.dtype).tiny)
        near_NO = (grads[0] / size_N1).to(weight_OI.dtype)
        dx = torch.mm(near_NO, weight_OI, out_dtype=torch.float32) * size_N1
        return dx.to(weight_OI.dtype), None


@torch.no_grad()
def scale_and_cap(
    model: PreTrainedModel, ids_1S: Tensor, hidden_of: Callable[[Tensor], Tensor], path: str
) -> tuple[float, float | None]:
    """c and the cap in softcap(c (W h + b)), compared with the model's own logits.

    Granite divides its logits by `logits_scaling`, Cohere multiplies them by `logit_scale`;
    Gemma caps them at `final_logit_softcapping`, xLSTM at `output_logit_soft_cap`: the
    configuration's values that fit are taken, whatever their names are.

    Args:
        model: a causal language model as transformers loads it.
        ids_1S: a few tokens.
        hidden_of: the hidden states [1, S, H] below the head.
        path: what errors call the model.

    Raises:
        InputError: the logits are not of that form.
    """
    head, run = cast(nn.Linear, model.get_output_embeddings()), cast(Any, model)
    # A cap hardly shows in small logits: they are made large, by a factor that rounds nothing.
    size = float(run(input_ids=ids_1S, use_cache=False).logits.abs().max())
    factor = 2.0 ** max(0, math.ceil(math.log2(64 / max(size, 1e-6))))
    head.weight *= factor
    try:
        expected = run(input_ids=ids_1S, use_cache=False).logits.float()
        found = head_product(head, hidden_of(ids_1S)).float()
    finally:
        head.weight /= factor
    caps = [v for key, v in numbers(model.config) if "cap" in key]
    rounding = torch.finfo(head.weight.dtype).eps
    best = (math.inf, 1.0, None)
    for cap in (None, *sorted(set(caps))):
        inner, linear = expected, found
        if cap:
            bent = (expected / cap).abs() < 0.9  # where tanh can be undone
            inner, linear = cap * torch.atanh(expected[bent] / cap), found[bent]
        ratio = _ratio(linear, inner)
        if abs(ratio - 1) <= 8 * rounding:
            ratio = 1.0
        else:
            ratio = _configured(model.config, ratio, 32 * rounding)
        mine = cap * torch.tanh(ratio * found / cap) if cap else ratio * found
        error = float((mine - expected).abs().max() / expected.abs().max())
        best = min(best, (error, ratio, cap), key=lambda item: item[0])
    # bf16 rounds logits to 1/256 of their size.
    if not best[0] < (0.02 if head.weight.dtype == torch.bfloat16 else 1e-3):
        raise InputError(
            f"{path}: its logits are not softcap(c (W h + b)) (relative difference "
            f"{best[0]:.2g}): log-probs are taken from the head's weight here, and this model "
            "family does more than that"
        )
    return best[1:]


def _ratio(found: Tensor, expected: Tensor) -> float:
    """The factor c of least squares in expected = c · found."""
    found, expected = found.double(), expected.double()
    return float((found * expected).sum() / (found * found).sum())


def numbers(config: Any) -> list[tuple[str, float]]:
    """The numbers other than 0 of a configuration, and what they are called."""
    return [
        (key, float(value))
        for part in (config, config.get_text_config())
        for key, value in part.to_dict().items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value
    ]


def _configured(config: Any, ratio: float, tolerance: float) -> float:
    """The number of a configuration, or one over it, that is `ratio`; `ratio` if there is none."""
    candidates = [c for _, v in numbers(config) for c in (v, 1 / v)]
    near = [c for c in candidates if abs(c / ratio - 1) < tolerance]
    return min(near, key=lambda c: abs(c / ratio - 1)) if near else ratio
