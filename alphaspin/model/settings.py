"""Settings of adapters."""

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from alphaspin.foundation.section import Names, PositiveFloat, Section, as_tuple


class LoraConfig(Section):
    """The adapter of each iterate, in PEFT's terms."""

    r: Annotated[int, Field(gt=0, le=2**14)] = 16
    """Rank."""
    alpha: PositiveFloat = 32.0
    """LoRA alpha: the update is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input, in training."""
    targets: Names = ("all-linear",)
    """Module names that get an adapter, or `all-linear` (all but the head)."""
    target_parameters: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Parameters that get an adapter beside them, by the ends of their names, as PEFT has it: the
    fused matrices of experts, `experts.gate_up_proj experts.down_proj`."""

    @model_validator(mode="after")
    def _together(self) -> "LoraConfig":
        if self.target_parameters and self.dropout:
            raise ValueError("lora.target_parameters needs lora.dropout = 0: PEFT has none there")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `target_parameters` where there are none: runs older than it keep their names."""
        found = dump(self)
        if not self.target_parameters:
            found.pop("target_parameters", None)
        return found
