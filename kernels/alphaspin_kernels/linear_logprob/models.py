"""transformers' causal models with their training loss by `linear_logprob`, without logits.

Shape suffixes: B rows, S positions, N = B S, H hidden size, V vocabulary.
"""

import functools
import importlib
import inspect
import math
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from alphaspin_kernels.linear_logprob import linear_logprob

PROBE = 6  # tokens of the text that a head is tried on
LARGE = 64.0  # to which logits are scaled for it: a cap hardly shows in small ones


def patch_model(model: Any) -> ExitStack:
    """Let a causal model of transformers take its loss without logits while it trains.

    ``model(input_ids, ..., labels=labels)`` in training mode gives the model's own loss, with
    ``logits=None``; caches, hidden states and attentions as ever. Without labels, in evaluation
    mode (so in ``generate`` and evaluation loops), and with ``logits_to_keep``, ``shift_labels``,
    ``return_dict=False`` or the experts' auxiliary loss, the model's own forward runs.

    Args:
        model: of transformers, with a linear head, or PEFT's around one; weights bf16, fp16, fp32
            or float64. Its class is exchanged, so that copies and replicas follow.

    Returns:
        A context manager: ``with patch_model(model): ...``, or ``undo = patch_model(model)`` and
        ``undo.close()``. Nothing happens to a model that is patched already.

    Raises:
        ValueError: the head is no plain linear layer (an adapter on it, 4 bits), the logits are not
            softcap(c (W h + b)), or the loss is not the cross-entropy of the next token.
    """
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    undo, own = ExitStack(), type(model)
    if getattr(own, "_alphaspin_patched", False):
        return undo
    name = own.__name__
    if getattr(model.config, "is_encoder_decoder", False) or model.base_model is model:
        raise ValueError(f"{name} is no decoder below a head: use the model without patch_model")
    loss = getattr(model, "loss_function", None)
    if getattr(loss, "__name__", "") != "ForCausalLMLoss":
        raise ValueError(f"{name} has a loss of its own ({loss}): use it without patch_model")
    if "forward" in vars(model):
        raise ValueError(
            f"{name}.forward is patched already, by Liger or a trainer: call patch_model first, or "
            "load the model again"
        )
    scale, softcap = scale_and_cap(model)
    signature = inspect.signature(own.forward)
    output: Any = importlib.import_module("transformers.modeling_outputs").CausalLMOutputWithPast

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        given = dict(signature.bind(self, *args, **options).arguments)
        given |= given.pop("kwargs", {})
        given.pop("self", None)
        labels_BS = given.get("labels")
        config = self.config.get_text_config()
        routers = given.get("output_router_logits", getattr(config, "output_router_logits", False))
        logits_to_keep = given.get("logits_to_keep", 0)
        if (
            labels_BS is None
            or not self.training
            or routers
            or given.get("return_dict") is False
            or not (isinstance(logits_to_keep, int) and logits_to_keep == 0)
            or any(given.get(key) is not None for key in ("shift_labels", "ignore_index"))
        ):
            return own.forward(self, *args, **options)
        for key in ("labels", "logits_to_keep", "return_dict", "output_router_logits"):
            given.pop(key, None)
        items = given.pop("num_items_in_batch", None)
        outputs = self.base_model(**given)
        hidden_BSH = outputs.last_hidden_state
        labels_BS = torch.nn.functional.pad(labels_BS, (0, 1), value=-100)[:, 1:]
        labels_N = labels_BS.flatten().to(hidden_BSH.device)
        logps_N = _head_logps(plain_head(self), hidden_BSH.flatten(0, 1), labels_N, scale, softcap)
        return output(
            loss=-logps_N.sum() / ((labels_N != -100).sum() if items is None else items),
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    members = {"forward": forward, "_alphaspin_patched": True}
    members |= {key: getattr(own, key) for key in ("__module__", "__qualname__", "__doc__")}
    model.__class__ = type(name, (own,), members)
    undo.callback(setattr, model, "__class__", own)
    return undo


def _head_logps(
    head: Any, hidden_NH: Tensor, labels_N: Tensor, scale: float, softcap: float | None
) -> Tensor:
    device = hidden_NH.device.type
    dtype = hidden_NH.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    weight, bias = head.weight, head.bias
    if hasattr(weight, "full_tensor"):  # FSDP2
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    return linear_logprob(
        hidden_NH.to(weight.device, dtype),
        weight.to(dtype),
        labels_N.to(weight.device),
        bias=None if bias is None else bias.to(dtype),
        # cap(c z) = c cap'(z), with the cap divided by c
        softcap=None if softcap is None else softcap / scale,
        temperature=1 / scale,
    )


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
    if not (error < _tolerance(head) and scale > 0):
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
    with probing(model) as ids_1S:
        logits = model(input_ids=ids_1S, use_cache=False).logits[:, :-1].float()
        found = model(input_ids=ids_1S, labels=ids_1S, fused_lm_head=True).log_probs
    expected = (logits / temperature).log_softmax(-1).gather(2, ids_1S[:, 1:, None])[..., 0]
    error = float((found - expected).abs().max() * temperature / logits.abs().max())
    if not error < _tolerance(head):
        raise ValueError(
            f"TRL's fused head is wrong for {name}: its log-probs differ from those of the model's "
            f"own logits (by {error:.2g} of the largest logit), which are not softcap(c (W h + b)) "
            "with c and the cap that TRL reads from the configuration. TRL without patch_trl would "
            "go on with them; train this model with a trainer that builds logits"
        )


def _tolerance(head: Any) -> float:
    return 0.02 if head.weight.dtype in (torch.bfloat16, torch.float16) else 1e-3


@contextmanager
def probing(model: Any) -> Generator[Tensor]:
    """Give a few tokens [1, S]; meanwhile the model evaluates, with a head that gives large logits.

    The head is scaled by a power of 2, which rounds nothing, and back.
    """
    weight: Tensor = model.get_output_embeddings().weight
    ids_1S = (torch.arange(PROBE, device=weight.device)[None] * 37 + 11) % len(weight)
    modes = [(module, module.training) for module in model.modules()]
    factor = 1.0
    with torch.no_grad():
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
