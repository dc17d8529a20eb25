"""The frozen base as it is read from a folder or the hub."""

import json
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from alphaspin.errors import InputError
from alphaspin.foundation.artefacts import folder_hash
from alphaspin.foundation.paths import packaged
from alphaspin.foundation.section import check_installed
from alphaspin.model import caches
from alphaspin.model.backbone import Backbone
from alphaspin.model.speedups import fuse, in_4_bits, keep_format

LOADING = (
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers raises about files that are not what it expects."""


def load_base(
    path: str,
    *,
    dtype: Literal["auto", "bf16", "fp32"],
    device: torch.device,
    quantization: Literal["none", "nf4"] = "none",
    liger: Literal["auto", "off"] = "auto",
    longest: int | None = None,
    identity: str | None = None,
) -> tuple[Backbone, Any]:
    """The frozen base and its tokenizer, from a folder, a hub id, or the embedded `tiny`.

    Only safetensors are read and no code from the model's folder is run. With `nf4` the linear
    layers but the head are rounded to 4 bits as they are read. `longest` as in `Backbone`;
    `identity`: what `base_hash` gave, where it is known.

    Raises:
        InputError: what is missing or cannot be served, by name.
    """
    if quantization != "none":
        check_installed("bitsandbytes", f"train.quantization = {quantization}", "quantization")
    transformers.utils.logging.disable_progress_bar()
    where = local_path(path)
    folder = Path(where)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(f"model = {path}: {_adapter_of(folder)}")
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"model = {path}: no config.json in this folder")
    if [*folder.glob("*.bin")] and not [*folder.glob("*.safetensors")]:
        raise InputError(
            f"model = {path}: its weights are pickles (*.bin), which may run code and are not "
            "read: save them as safetensors (save_pretrained of transformers does)"
        )
    with loading(path):
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        text_config: Any = config.get_text_config()
        for part in (config, text_config):
            if getattr(part, "quantization_config", None):
                raise ValueError(
                    "its weights are quantised already; give the model that they were made from, "
                    "and train.quantization = nf4 where it is too large"
                )
        load = cast(Any, AutoModelForCausalLM.from_pretrained)
        kind = torch.bfloat16 if choose_bf16(dtype, device) else torch.float32
        model, loaded = load(
            where,
            output_loading_info=True,
            dtype=kind,
            **({} if quantization == "none" else in_4_bits(kind, device)),
            attn_implementation=_attention(config),
            use_safetensors=True,
            trust_remote_code=False,
        )
        if loaded["missing_keys"]:  # transformers goes on with random numbers in their place
            raise ValueError(f"it has no weights for {min(loaded['missing_keys'])}")
    keep_format(model)
    if liger == "auto":
        fuse(model, device)
    identity = identity or base_hash(path) or f"{path}@{getattr(config, '_commit_hash', None)}"
    if device.type != "cpu":  # where it is: `to("cpu:1")`, Accelerate's second process, is a copy
        model = cast(PreTrainedModel, cast(nn.Module, model).to(device))
    try:
        backbone = Backbone(model, where, identity, longest=longest)
        caches.choose(backbone)
    except InputError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "") or repr(error)
        raise InputError(f"model = {path}: its family cannot be served here ({reason})") from None
    return backbone, tokenizer


def base_hash(path: str) -> str | None:
    """The hash of a base's weights and configuration; None for a hub id."""
    folder = Path(local_path(path))
    return folder_hash(folder, ("*.safetensors", "config.json")) if folder.exists() else None


def local_path(path: str) -> str:
    """The folder of `tiny`; what else a model is called stays."""
    return str(packaged("tiny/model")) if path == "tiny" else path


def base_of(adapter: Path) -> str:
    """The model that an adapter says it is of, or nothing."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        text = (adapter / "adapter_config.json").read_text(encoding="utf-8")
        return str(json.loads(text)["base_model_name_or_path"] or "")
    return ""


def _adapter_of(folder: Path) -> str:
    """What is said of an adapter in the place of a model."""
    base = base_of(folder)
    return (
        f"is an adapter of {base or 'some model'} and no model; to start from it: --model "
        f"{base or 'THAT-MODEL'} --lora.start {folder}"
    )


def _attention(config: Any) -> str:
    """SDPA where the family has it and it is right.

    It has no soft caps (Gemma 2) and no sinks, and transformers 5.24 gives it Falcon's ALiBi on
    another scale than its own plain attention (logits up to 3.5 then differ by 0.2).
    """
    kind = cast(Any, AutoModelForCausalLM)._model_mapping[type(config)]
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    plain = capped or getattr(config, "alibi", False)
    return "sdpa" if kind._supports_sdpa and not plain else "eager"


@contextmanager
def loading(path: str) -> Generator[None]:
    """Turn what transformers raises about a model or tokenizer into one line."""
    try:
        yield
    except InputError:
        raise
    except LOADING as error:
        reason = str(error).strip().splitlines()
        said = reason[0] if reason and not isinstance(error, KeyError) else repr(error)
        if "contains custom code" in said:
            said = "it needs code from its own folder, which is never run here"
        raise InputError(f"model = {path}: cannot be loaded: {said}") from None


def choose_bf16(dtype: Literal["auto", "bf16", "fp32"], device: torch.device) -> bool:
    """Whether the base is held in bf16; `auto`: on a GPU that has it, not where it is emulated.

    Not on CPUs: attention backward in bf16 was measured 7 times slower than fp32 there, and many
    have no bf16 units at all.
    """
    if dtype == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype == "bf16"
