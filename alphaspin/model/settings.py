"""Settings of adapters."""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from alphaspin.foundation.paths import Place, place
from alphaspin.foundation.section import RECORDED, Names, PositiveFloat, Section, as_tuple

BASE_MOVES = "it takes a part out of the base, which all policies share and which stays frozen"
NO_START = {
    "pissa": BASE_MOVES,
    "olora": BASE_MOVES,
    "corda": BASE_MOVES,
    "lora_ga": BASE_MOVES,
    "loftq": "it rounds the base, which all policies share (train.quantization = nf4 does)",
    "eva": "it needs passes over the data before training, which are not made here",
    "orthogonal": "its update is zero to rounding only, so that a fresh iterate is not the base",
    "mica": "it starts A at parts of the base's own decomposition, which is not computed here",
    "false": "a fresh iterate would not be the base, which answers for it at t = 0",
}
"""Ways of PEFT to start an adapter, and why they are not ways here."""

MOVING = ("loftq", *(way for way, reason in NO_START.items() if reason == BASE_MOVES))
"""Those whose adapters belong beside another base than the plain one."""

PLAIN = "an iterate is a plain LoRA adapter, of which the rows of one pass have several"
NOT_HERE = {
    "lora.use_dora": f"no DoRA: {PLAIN}, without norms of W + B A for each of them; "
    "lora.use_rslora with a larger lora.r comes closest",
    "lora.modules_to_save": f"no trained copies of modules: {PLAIN}; name linear layers in "
    "lora.targets, and train embeddings or head before self-play",
    "lora.bias": f"no trained biases: {PLAIN}; leave it out",
    "lora.lora_bias": f"no biases on B: {PLAIN}; leave it out",
    "lora.rank_pattern": "one rank for all layers: lora.r",
    "lora.alpha_pattern": "one scale for all layers: lora.alpha",
    "lora.layers_to_transform": "name the modules of these layers in lora.targets",
    "lora.exclude_modules": "name the others in lora.targets",
    "lora.lora_alpha": "is lora.alpha here",
    "lora.lora_dropout": "is lora.dropout here",
    "lora.target_modules": "is lora.targets here",
}
"""Settings of PEFT that are none here, and what is told who gives them."""


FORM = {
    "r": "r",
    "alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "targets": "target_modules",
    "target_parameters": "target_parameters",
}
"""Settings that an adapter on disk has, and what PEFT calls them."""

ASIDE = {
    *FORM.values(),
    *("auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "lora_dropout", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "revision", "task_type"),
}
"""Of PEFT's settings those that make no other kind of adapter, or are looked at one by one."""


def form_of(start: str) -> dict[str, Any]:
    """The settings of the adapter in a folder.

    Raises:
        ValueError: there is none, or it is no plain LoRA adapter beside an unchanged base.
    """
    folder = Path(place(start))
    try:
        text = (folder / "adapter_config.json").read_text(encoding="utf-8")
        peft: dict[str, Any] = dict(json.loads(text))
        found = {ours: peft[theirs] for ours, theirs in FORM.items() if peft.get(theirs)}
    except (OSError, ValueError, TypeError):
        raise ValueError(
            f"lora.start = {start}: has no adapter_config.json that can be read; give the folder "
            "of an adapter in PEFT's format (of one on the hub: hf download NAME --local-dir DIR)"
        ) from None
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"lora.start = {start}: has no adapter_model.safetensors")
    problem = ""
    if peft.get("peft_type") != "LORA" or peft.get("task_type") not in (None, "CAUSAL_LM"):
        problem = f"is {peft.get('peft_type')} for {peft.get('task_type')}, not LORA for CAUSAL_LM"
    began = str(peft.get("init_lora_weights")).lower()
    if any(began.startswith(way) for way in MOVING):
        problem = f"its init_lora_weights is {began}, whose base is not the plain one"
    if peft.get("bias", "none") != "none":
        problem = f"its bias: {NOT_HERE['lora.bias']}"
    for key in sorted({key for key, value in peft.items() if value} - ASIDE):
        problem = f"its {key}: {NOT_HERE.get(f'lora.{key}', PLAIN)}"
    targets = found.get("targets")
    if isinstance(targets, str) and targets != "all-linear":
        problem = f"its target_modules is the pattern {targets!r}: write the names in its place"
    if problem:
        raise ValueError(
            f"lora.start = {start}: {problem}; or make one model of base and adapter (PEFT's "
            "merge_and_unload) and give that as --model"
        )
    for key in {"targets", "target_parameters"} & {*found}:
        found[key] = tuple(sorted(as_tuple(found[key])))
    return found


class LoraConfig(Section):
    """The adapter of each iterate, in PEFT's terms."""

    start: Place | None = None
    """Folder of a LoRA adapter of the base, in PEFT's format, that the run starts from: the base
    with it plays at t = 0, is the base of references, mixtures and comparisons, and iterates go on
    from it. r, alpha, use_rslora and targets are those of the adapter."""

    r: Annotated[int, Field(gt=0, le=2**14)] = 16
    """Rank."""
    alpha: PositiveFloat = 32.0
    """LoRA alpha: the update is scaled by alpha / r."""
    use_rslora: bool = False
    """Scale the update by alpha / √r instead (rsLoRA, arXiv 2312.03732)."""
    init_lora_weights: Literal["default", "gaussian"] = "default"
    """How A starts (B is zero): `default`, Kaiming-uniform, PEFT's `true`; or `gaussian`, with a
    standard deviation of 1 / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input, in training."""
    targets: Names = ("all-linear",)
    """Module names that get an adapter, or `all-linear` (all but the head)."""
    target_parameters: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Parameters that get an adapter beside them, by the ends of their names, as PEFT has it: the
    fused matrices of experts, `experts.gate_up_proj experts.down_proj`."""

    @model_validator(mode="before")
    @classmethod
    def _of_start(cls, values: Any, info: ValidationInfo) -> Any:
        """What is not set is as the adapter has it."""
        start = values.get("start") if isinstance(values, dict) else None
        if not isinstance(start, str) or start.lower() == "none" or info.context is RECORDED:
            return values
        return form_of(start) | values

    @model_validator(mode="after")
    def _as_start(self, info: ValidationInfo) -> "LoraConfig":
        if self.start is None or info.context is RECORDED:
            return self
        found = form_of(self.start)
        for key in FORM:
            mine, its = getattr(self, key), found.get(key, type(self).model_fields[key].default)
            if (sorted(mine) if isinstance(mine, tuple) else [mine]) != [*as_tuple(its)]:
                raise ValueError(
                    f"lora.{key} = {mine}: the adapter lora.start has {its}, and iterates go on "
                    "from it: leave it out"
                )
        if self.init_lora_weights != "default":
            raise ValueError("lora.init_lora_weights has no effect with lora.start: leave it out")
        return self

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _as_peft(cls, value: Any) -> Any:
        """PEFT's `true`; its other ways by the reason why not."""
        if value is True or str(value).lower() == "true":
            return "default"
        name = str(value).lower()
        for start, reason in NO_START.items():
            if name.startswith(start):
                raise ValueError(f"{reason}: take true or gaussian")
        return value

    @model_validator(mode="after")
    def _together(self) -> "LoraConfig":
        if self.target_parameters and self.dropout:
            raise ValueError("lora.target_parameters needs lora.dropout = 0: PEFT has none there")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without later settings at their defaults: runs older than these keep their names."""
        found = dump(self)
        for name in ("start", "target_parameters", "use_rslora", "init_lora_weights"):
            if getattr(self, name) == type(self).model_fields[name].default:
                found.pop(name, None)
        return found
