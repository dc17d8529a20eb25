"""Settings of the held-out measures."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from alphaspin.data.answers import checked_part
from alphaspin.foundation.section import PositiveInt, Section


def _pattern(text: str) -> str:
    checked_part(text)
    return text


class EvaluateConfig(Section):
    """Held-out measures of the base and each iterate."""

    prompts: Annotated[int, Field(ge=0)] = 256
    """Held-out prompts; 0 for no evaluation. Taken from `--heldout`, or set aside from the data."""
    answer: Annotated[str, AfterValidator(_pattern)] | None = None
    """Regular expression whose first group is the answer to compare (gsm8k: `#### (.+)`); without
    it the whole text counts."""
    overlap: Literal["error", "drop", "keep"] = "error"
    """Held-out prompts that are also trained on are an error, are not trained on (`drop`), or are
    measured all the same (`keep`)."""
    show: PositiveInt = 24
    """Held-out prompts whose sampled answers are shown in the report, first those on which base and
    last iterate differ."""
