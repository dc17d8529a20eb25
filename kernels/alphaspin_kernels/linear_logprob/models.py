"""transformers' causal models with their training loss by `linear_logprob`, without logits.

Shape suffixes: B rows, S positions, N = B S, H hidden size.
"""

import functools
import importlib
import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from alphaspin_kernels.linear_logprob import linear_logprob
from alphaspin_kernels.linear_logprob.probe import plain_head, probing, scale_and_cap, tolerance


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
    if "forward" in vars(model):
        raise ValueError(
            f"{name}.forward is patched already, by Liger or a trainer: call patch_model first, or "
            "load the model again"
        )
    scale, softcap = scale_and_cap(model)
    _check_loss(model, scale, softcap)
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
        loss = _loss(self, hidden_BSH, labels_BS, items, scale, softcap)
        return output(
            loss=loss,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    members = {"forward": forward, "_alphaspin_patched": True}
    members |= {key: getattr(own, key) for key in ("__module__", "__qualname__", "__doc__")}
    model.__class__ = type(name, (own,), members)
    undo.callback(setattr, model, "__class__", own)
    return undo


def _loss(
    model: Any,
    hidden_BSH: Tensor,
    labels_BS: Tensor,
    items: Tensor | int | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Cross-entropy of the next token, as transformers' ForCausalLMLoss takes it."""
    head, hidden_NH = plain_head(model), hidden_BSH.flatten(0, 1)
    labels_N = torch.nn.functional.pad(labels_BS, (0, 1), value=-100)[:, 1:].flatten()
    device = hidden_NH.device.type
    dtype = hidden_NH.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    weight, bias = head.weight, head.bias
    if hasattr(weight, "full_tensor"):  # FSDP2
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    logps_N = linear_logprob(
        hidden_NH.to(weight.device, dtype),
        weight.to(dtype),
        labels_N.to(weight.device),
        bias=None if bias is None else bias.to(dtype),
        # cap(c z) = c cap'(z), with the cap divided by c
        softcap=None if softcap is None else softcap / scale,
        temperature=1 / scale,
    )
    return -logps_N.sum() / ((labels_N != -100).sum() if items is None else items)


def _check_loss(model: Any, scale: float, softcap: float | None) -> None:
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return  # the experts' part is in it, and the model's own forward runs
    with probing(model) as ids_1S:
        expected = float(model(input_ids=ids_1S, labels=ids_1S, use_cache=False).loss)
        hidden_1SH = model.base_model(input_ids=ids_1S, use_cache=False).last_hidden_state
        found = float(_loss(model, hidden_1SH, ids_1S, None, scale, softcap))
    if not abs(found - expected) < tolerance(model.get_output_embeddings()) * max(1, expected):
        raise ValueError(
            f"{type(model).__name__} has a loss of its own, {expected:.5g} where the cross-entropy "
            f"of the next token is {found:.5g}: use the model without patch_model"
        )
