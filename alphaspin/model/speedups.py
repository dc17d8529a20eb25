"""What kept libraries do for the frozen base: bitsandbytes' 4-bit weights, Liger's fused layers.

Shapes: a linear layer's weight is [O, I].
"""

import copy
import importlib.util
from functools import partial
from typing import Any, cast

import torch
from alphaspin_kernels import segmented_lora
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from alphaspin.errors import InputError

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight: blocks of 64 have a scale of 8 bits, blocks of 256 scales one of 32."""


def in_4_bits(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` for weights in 4 bits: QLoRA's NF4, its scales in 8 bits.

    The head stays as it is, and so do the embeddings. Source: Dettmers et al., arXiv 2305.14314.

    Args:
        dtype: of everything else, and of the weights when they are dequantised.
        device: where the weights are rounded and stay.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_format(model: PreTrainedModel) -> None:
    """Forbid bitsandbytes' layers to repack their weights in use, as they do on newer CPUs.

    On a CPU they also multiply by `dequantise`'s weights, which are right (see there).
    """
    for module in model.modules():
        if is_quantised(module):
            layer = cast(Any, module)
            layer.support_avx512bf16_for_cpu = False
            if layer.weight.device.type == "cpu":
                layer.forward = partial(_product, layer)


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    """W x + b of a 4-bit layer, whose weight is dequantised again for the backward pass."""
    x_NI = x.reshape(-1, x.shape[-1])
    again = partial(dequantise, layer)
    y_NO = segmented_lora(x_NI, again(), [None], [len(x_NI)], [0.0], bias=layer.bias, again=again)
    return y_NO.view(*x.shape[:-1], -1)


def is_quantised(layer: nn.Module) -> bool:
    """Whether `layer` is bitsandbytes' 4-bit layer."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def dequantise(layer: nn.Linear) -> Tensor:
    """The weight [O, I] of a 4-bit layer, in the base's dtype.

    Blocks of 64 follow each other across rows. bitsandbytes 0.50 dequantises on CPUs with AVX-512
    as if each row began a block of its own: a weight of 64 rows by 96 was then off by 27 % of its
    size where 9 % is right. It is therefore told of rows of one block each.
    """
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = layer.weight
    state = weight.quant_state
    count = state.shape.numel()
    if weight.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
        return dequantize_4bit(weight.data, state)
    if count % state.blocksize:
        raise InputError(
            f"train.quantization = nf4: a weight of {count} numbers is not whole blocks of "
            f"{state.blocksize}, which bitsandbytes gets wrong on some CPUs; take none"
        )
    flat = copy.copy(state)
    flat.shape = torch.Size((count // state.blocksize, state.blocksize))
    return dequantize_4bit(weight.data, flat).view(state.shape)


def liger_problem(device: torch.device) -> str | None:
    """None, or the reason why Liger's kernels are not used on `device`."""
    if device.type != "cuda":
        return "they need a CUDA device"
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed (pip install 'alphaspin[cuda]')"
    return None


def fuse(model: PreTrainedModel, device: torch.device) -> None:
    """Put Liger's RMSNorm, RoPE and SwiGLU or GeGLU into a model on `device`, if that can be.

    Liger does nothing to a family that it does not know. RoPE is replaced for all models of the
    family in this process. Its losses stay out: log-probs are taken from hidden states here.
    """
    if liger_problem(device) is None:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(
            model, cross_entropy=False, fused_linear_cross_entropy=False
        )
