"""Settings of the held-out measures."""

from typing import Annotated, Literal

from pydantic import Field

from alphaspin.foundation.section import PositiveInt, Section


class EvaluateConfig(Section):
    """Held-out measures of the base and each iterate."""

    prompts: Annotated[int, Field(ge=0)] = 256
    """Held-out prompts; 0 for no evaluation. Taken from `--heldout`, or set aside from the data."""
    answer: str | None = None
    """Regular expression whose first group is the answer to compare (gsm8k: `#### (.+)`); without
    it the whole text counts."""
    overlap: Literal["error", "drop", "keep"] = "error"
    """Held-out prompts that are also trained on are an error, are not trained on (`drop`), or are
    measured all the same (`keep`)."""
    show: PositiveInt = 8
    """Held-out prompts whose sampled answers are shown in the report."""
