"""How large a model is and what it needs, without loading it; limits that suit model and data."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from alphaspin.config import Config, PlanHints
from alphaspin.data.demonstrations import Demonstration
from alphaspin.data.settings import LIMITS, TextConfig
from alphaspin.errors import InputError
from alphaspin.foundation.artefacts import MANIFEST, read_manifest
from alphaspin.foundation.gpus import Gpu
from alphaspin.foundation.paths import packaged
from alphaspin.model.load import choose_bf16, loading
from alphaspin.model.routing import target_modules, target_parameters
from alphaspin.model.speedups import NF4_BITS

STATES = {"adamw": 2, "adamw_8bit": 0.5, "rmsprop": 1}
"""Numbers in fp32 that an optimiser keeps of a parameter."""

RARE = 0.01
"""Share of prompts or answers that `auto` may leave beyond its limits."""

STEP = 32
"""Limits are rounded up to multiples, which leaves answers of policies some room."""

WITHOUT_ANSWERS = 1024
"""Tokens of an answer where the data have none."""

USABLE = 0.9
"""Share of a device's memory that is counted on."""


def model_facts(config: Config) -> dict[str, Any]:
    """Sizes of the model, built without memory on the meta device."""
    folder = packaged("tiny/model") if config.model == "tiny" else config.model
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
        "kv_width": _kv_width(text),
        "tied": bool(model_config.tie_word_embeddings),
        "adapter_parameters_per_rank": sum(sum(m.weight.shape) for m in targets)
        + sum(math.prod(p.shape[:-2]) * sum(p.shape[-2:]) for p in beside),
    }


def _kv_width(text: Any) -> int | None:
    """Numbers of the keys of a token and layer, where the family says so."""
    heads = getattr(text, "num_key_value_heads", None)
    all_heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or not isinstance(all_heads, int):
        return None
    return heads * (getattr(text, "head_dim", None) or text.hidden_size // all_heads)


def embedded(facts: PlanHints) -> float:
    """Numbers of the embeddings and the head."""
    return (1 if facts.tied else 2) * facts.vocabulary * facts.hidden


def base_bytes(facts: PlanHints, quantization: str, width: int) -> float:
    """Bytes of the frozen base; `width` is that of a number that is not quantised."""
    if quantization == "none":
        return facts.parameters * width
    whole = embedded(facts)
    return whole * width + (facts.parameters - whole) * NF4_BITS / 8


def training_bytes(
    config: Config, facts: PlanHints, width: int, *, cuda: bool = False, processes: int = 1
) -> tuple[float, float]:
    """Bytes of base, adapter, gradient and optimiser, and of the activations of a token.

    Korthikanti et al., arXiv 2205.05198: about 34 bytes per token, layer and hidden unit in 16 bits
    without the attention matrix; with recomputation one layer's, and 2 bytes a layer. Dropout on a
    processor keeps what is left of each linear's input, half of its adapter's numbers a rank; a GPU
    makes its masks again. A sharded base is spread over the processes, except its head.
    """
    states = STATES[config.train.optimizer]
    adapter = facts.adapter_parameters_per_rank * config.lora.r * 4 * (2 + states)
    per_layer = 34 * width / 2 * facts.hidden
    if config.lora.dropout and not cuda:
        per_layer += width * facts.adapter_parameters_per_rank / 2 / facts.layers
    each = per_layer * facts.layers
    if config.train.activation_checkpointing:
        each = per_layer + width * facts.hidden * facts.layers
    base = base_bytes(facts, config.train.quantization, width)
    if config.train.sharding != "none":
        head = facts.vocabulary * facts.hidden * width
        base = head + (base - head) / processes
    return base + adapter, each


def trained_together(config: Config) -> int:
    """Answers of a tree that is trained on, in the iteration that has most."""
    return max(config.preference.sequences(t) for t in range(config.selfplay.iterations))


def recorded_limits(folder: Path) -> dict[str, int]:
    """What the run in a folder has chosen, or was given, for the limits of `text`."""
    if not (folder / MANIFEST).is_file():
        return {}
    text = read_manifest(folder / MANIFEST)["identity"].get("config", {}).get("text", {})
    return {key: text[key] for key in LIMITS if isinstance(text.get(key), int)}


def number_bytes(config: Config, device: torch.device, gpu: Gpu | None = None) -> int:
    """Bytes of a number of the base on a device, or on a GPU that is not here."""
    if gpu and config.train.dtype == "auto":
        return 2  # all that are known have bf16
    return 2 if choose_bf16(config.train.dtype, device) else 4


def room(config: Config, device: torch.device, gpu: Gpu | None = None) -> int | None:
    """Tokens of one tree, a prompt and its answers, that training has memory for on a device.

    None where that cannot be told: a sharded base, a family that cannot be sized.
    """
    if config.train.sharding != "none":
        return None
    try:
        facts = PlanHints.model_construct(**model_facts(config))
    except (InputError, AttributeError, TypeError):
        return None  # who loads the model says what is wrong with it
    cuda = bool(gpu) or device.type == "cuda"
    fixed, each = training_bytes(config, facts, number_bytes(config, device, gpu), cuda=cuda)
    left = USABLE * memory(device, gpu) - fixed
    return int(left / each) if left > 0 else None


def memory(device: torch.device, gpu: Gpu | None = None) -> float:
    """Bytes of a device, or of the machine, or of a GPU that is not here."""
    if gpu:
        return gpu.memory
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_limits(
    text: TextConfig,
    found: Sequence[Demonstration],
    *,
    positions: int | None,
    tokens: int | None = None,
    each: int = 1,
) -> tuple[TextConfig, str]:
    """The limits that `auto` stands for, and a sentence about them.

    Each holds all of the data; or 99 % of them, where the longest is over twice as long. They are
    rounded up as far as there is room, and lowered where a prompt and an answer exceed the model's
    positions, or one tree the memory: answers first, down to a half of the positions, then prompts.

    Args:
        text: its other limits stand.
        found: all demonstrations, unlimited.
        positions: of the model; None where it has no limit.
        tokens: see `room`; None where that is not known.
        each: answers of a tree that is trained on.
    """
    answers = [one.whole for one in found if one.answer is not None]
    rest = min(RARE, text.overlong_share) if text.overlong == "error" else RARE
    prompt, response = needed, wanted = text.prompt_limit, text.response_limit
    if "max_prompt_tokens" in text.auto:
        lengths = [len(one.prompt) for one in found]
        needed = _holding(lengths, RARE if text.too_long == "drop" else 0)
        prompt = _rounded(needed)
    if "max_response_tokens" in text.auto:
        wanted = _holding(answers, rest) if answers else WITHOUT_ANSWERS
        response = _rounded(wanted)
    why = "by the data"
    for most, count, reason in (
        (positions, 1, f"within the model's {positions} positions"),
        (tokens, each, f"within the memory here, {tokens} tokens of a prompt and its answers"),
    ):
        if most is not None and prompt + count * response > most > 2 * each:
            why = reason
            prompt = min(prompt, needed)  # without what rounding adds
            if "max_response_tokens" in text.auto:
                left = (most - prompt) // count
                response = min(response, max(left, min(wanted, most // 2 // count)))
            if "max_prompt_tokens" in text.auto:
                prompt = max(1, min(prompt, most - count * response))
    long = sum(len(one.prompt) > prompt for one in found) / len(found)
    cut = sum(size > response for size in answers) / max(1, len(answers))
    chosen = text.model_copy(update={"max_prompt_tokens": prompt, "max_response_tokens": response})
    return chosen, (
        f"text.max_prompt_tokens = {prompt}, text.max_response_tokens = {response}, chosen {why}: "
        f"{100 * long:.3g} % of the prompts and {100 * cut:.3g} % of the answers are longer"
    )


def _holding(lengths: Sequence[int], rest: float) -> int:
    """The longest, or what all but a share `rest` are within."""
    longest = max(lengths)
    usual = int(np.quantile(lengths, 1 - rest, method="higher"))
    return longest if longest <= 2 * usual else usual


def _rounded(tokens: int) -> int:
    return STEP * math.ceil(tokens / STEP)
