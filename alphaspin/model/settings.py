"""Settings of adapters."""

import math
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from alphaspin.foundation.section import Names, PositiveFloat, Section, as_tuple

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


class LoraConfig(Section):
    """The adapter of each iterate, in PEFT's terms."""

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
        for name in ("target_parameters", "use_rslora", "init_lora_weights"):
            if getattr(self, name) == type(self).model_fields[name].default:
                found.pop(name, None)
        return found
