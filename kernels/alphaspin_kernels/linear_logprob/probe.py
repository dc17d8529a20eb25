"""What the head of a causal model of transformers computes, found out on a few tokens.

Shape suffixes: S positions.
"""

import math
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PROBE = 6  # tokens of the text that a head is tried on
LARGE = 64.0  # to which logits are scaled for it: a cap hardly shows in small ones


def plain_head(model: Any) -> Any:
    """Return the head of a causal model.

    Raises:
        ValueError: it is no ``nn.Linear`` with weights in floating point.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    # PEFT's modules_to_save: a whole head for each adapter, and `weight` is that of the active one.
    plain = isinstance(head, torch.nn.Linear) or type(head).__name__ == "ModulesToSaveWrapper"
    if not plain or weight is None or not torch.is_floating_point(weight):
        raise ValueError(
            f"the head of {type(model).__name__} is a {type(head).__name__}, and log-probs are "
            "taken from the weight of an nn.Linear: leave it out of PEFT's target_modules (or name "
            "it in modules_to_save) and out of quantisation"
        )
    return head


def scale_and_cap(model: Any) -> tuple[float, float | None]:
    """Return c and the cap in softcap(c (W h + b)), fitted to the model's own logits.

    Raises:
        ValueError: the logits are not of that form, or c is not positive.
    """
    head, config = plain_head(model), model.config.get_text_config()
    with probing(model) as ids_1S:
        logits = model(input_ids=ids_1S, use_cache=False).logits.double()
        hidden = model.base_model(input_ids=ids_1S, use_cache=False).last_hidden_state
        z = torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    z, rounding = z.double(), torch.finfo(head.weight.dtype).eps
    numbers = {
        key: float(value)
        for key, value in config.to_dict().items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value
    }
    caps = {value for key, value in numbers.items() if "cap" in key and value > 0}
    best: tuple[float, float, float | None] = (math.inf, 1.0, None)
    for cap in (None, *sorted(caps)):
        bent = (logits / (cap or math.inf)).abs() < 0.9  # where tanh can be undone
        inner = cap * torch.atanh(logits[bent] / cap) if cap else logits[bent]
        scale = float((z[bent] * inner).sum() / z[bent].square().sum())
        near = [c for v in {1.0, *numbers.values()} for c in (v, 1 / v)]
        near = [c for c in near if abs(c / scale - 1) < 64 * rounding] if scale else []
        scale = min(near, key=lambda c: abs(c - scale), default=scale)
        mine = cap * torch.tanh(scale * z / cap) if cap else scale * z
        error = float((mine - logits).abs().max() / logits.abs().max())
        best = min(best, (error, scale, cap), key=lambda item: item[0])
    error, scale, cap = best
    if not (error < tolerance(head) and scale > 0):
        raise ValueError(
            f"the logits of {type(model).__name__} are not softcap(c (W h + b)) with positive c "
            f"(relative difference {error:.2g}): use the model without patch_model"
        )
    return scale, cap


def check_fused_head(model: Any, temperature: float) -> None:
    """Hold TRL's fused head of a model against log_softmax of the model's own logits.

    Raises:
        ValueError: they differ, or the head is no plain linear layer.
    """
    head, name = plain_head(model), type(model).__name__
    if not head.weight.numel() or head.weight.is_meta or hasattr(head.weight, "full_tensor"):
        warnings.warn(f"{name} is sharded: its fused head goes unchecked", stacklevel=3)
        return
    try:
        with probing(model) as ids_1S:
            logits = model(input_ids=ids_1S, use_cache=False).logits[:, :-1].float()
            found = model(input_ids=ids_1S, labels=ids_1S, fused_lm_head=True).log_probs
    except Exception as error:  # it needs more than text, say
        warnings.warn(f"{name} goes unchecked, its fused head too: {error}", stacklevel=3)
        return
    expected = (logits / temperature).log_softmax(-1).gather(2, ids_1S[:, 1:, None])[..., 0]
    error = float((found - expected).abs().max() * temperature / logits.abs().max())
    if not error < tolerance(head):
        raise ValueError(
            f"TRL's fused head is wrong for {name}: its log-probs differ from those of the model's "
            f"own logits (by {error:.2g} of the largest logit), which are not softcap(c (W h + b)) "
            "with c and the cap that TRL reads from the configuration. TRL without patch_trl would "
            "go on with them; train this model with a trainer that builds logits"
        )


def tolerance(head: Any) -> float:
    """How far off, relative to the largest logit, rounding may be."""
    return 0.02 if head.weight.dtype in (torch.bfloat16, torch.float16) else 1e-3


@contextmanager
def probing(model: Any) -> Generator[Tensor]:
    """Give a few tokens [1, S]; meanwhile the model evaluates, with a head that gives large logits.

    The head is scaled by a power of 2, which rounds nothing, and back.
    """
    weight: Tensor = model.get_output_embeddings().weight
    ids_1S = (torch.arange(PROBE, device=weight.device)[None] * 37 + 11) % len(weight)
    # Autocast would go on with copies of the scaled weights, which it keeps.
    autocast = torch.autocast(weight.device.type, enabled=False)
    modes = [(module, module.training) for module in model.modules()]
    factor = 1.0
    with torch.no_grad(), autocast:
        model.eval()
        try:
            size = float(model(input_ids=ids_1S, use_cache=False).logits.abs().max())
            factor = 2.0 ** max(0, math.ceil(math.log2(LARGE / max(size, 1e-6))))
            weight.mul_(factor)
            yield ids_1S
        finally:
            weight.div_(factor)
            for module, training in modes:
                module.training = training
