"""How large a model is, and what it needs, without loading it."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from alphaspin.config import Config, PlanHints
from alphaspin.model.load import loading
from alphaspin.model.routing import target_modules, target_parameters
from alphaspin.model.speedups import NF4_BITS


def model_facts(folder: Path, config: Config) -> dict[str, Any]:
    """Sizes of a local model, built without memory on the meta device."""
    with loading(config.model), torch.device("meta"):
        model_config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_config(model_config)
    text: Any = model_config.get_text_config()
    targets = cast(list[nn.Linear], target_modules(model, config.lora.targets))  # or Conv1D
    beside = target_parameters(model, config.lora.target_parameters)  # [experts, ., .], or [., .]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "hidden": text.hidden_size,
        "layers": text.num_hidden_layers,
        "vocabulary": text.vocab_size,
        "tied": bool(model_config.tie_word_embeddings),
        "adapter_parameters_per_rank": sum(sum(m.weight.shape) for m in targets)
        + sum(math.prod(p.shape[:-2]) * sum(p.shape[-2:]) for p in beside),
    }


def base_bytes(facts: PlanHints, quantization: str, width: int) -> float:
    """Bytes of the frozen base; `width` is that of a number that is not quantised."""
    if quantization == "none":
        return facts.parameters * width
    whole = (1 if facts.tied else 2) * facts.vocabulary * facts.hidden
    return whole * width + (facts.parameters - whole) * NF4_BITS / 8
