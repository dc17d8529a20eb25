"""What kept libraries do for the frozen base: bitsandbytes' 4-bit weights.

Shapes: a linear layer's weight is [O, I].
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

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
    """Forbid bitsandbytes' layers to repack their weights in use, as they do on newer CPUs."""
    for module in model.modules():
        if is_quantised(module):
            cast(Any, module).support_avx512bf16_for_cpu = False


def is_quantised(layer: nn.Module) -> bool:
    """Whether `layer` is bitsandbytes' 4-bit layer."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def dequantise(layer: nn.Linear) -> Tensor:
    """The weight [O, I] of a 4-bit layer, in the base's dtype."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = layer.weight
    return dequantize_4bit(weight.data, weight.quant_state)
