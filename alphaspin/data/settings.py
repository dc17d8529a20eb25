"""Settings of the data."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from alphaspin.foundation.paths import place
from alphaspin.foundation.section import WHOLE, Fraction, PositiveInt, Section

LIMITS = ("max_prompt_tokens", "max_response_tokens")
"""Settings that a run may choose."""


def _template(name: str) -> str:
    return name if name in ("auto", "plain") else place(name)


class TextConfig(Section):
    """How conversations become prompt and response tokens."""

    template: Annotated[str, AfterValidator(_template)] = "auto"
    """Chat template: `auto` (the tokenizer's own, the plain one where it has none), `plain`, or the
    path of a Jinja file."""
    template_options: dict[str, bool | int | float | str] = Field(default={})
    """Variables of the chat template, as `enable_thinking: false`."""
    turns: Literal["last", "all"] = "last"
    """Assistant turns of a conversation that are demonstrations: the last one, or each of them."""
    max_prompt_tokens: PositiveInt | Literal["auto"] = "auto"
    """Longest prompt, in tokens. `auto`: what holds the data's, all or 99 % of them, within the
    model's positions and the memory that there is; chosen once and kept in the run folder."""
    max_response_tokens: PositiveInt | Literal["auto"] = "auto"
    """Longest response, in tokens, demonstrated or sampled. A longer one is cut there, has no end
    token, and is scored without it. `auto` as for prompts."""
    overlong: Literal["error", "cut", "drop"] = "error"
    """A demonstration beyond `max_response_tokens` is cut there (`cut`), its row is dropped and
    counted (`drop`), or it is cut unless more than `overlong_share` are, which is an error."""
    overlong_share: Fraction = 0.05
    """Share of demonstrations that `overlong: error` lets be cut."""
    too_long: Literal["error", "drop"] = "error"
    """A prompt beyond `max_prompt_tokens` is an error, or its row is dropped (and counted)."""
    empty_prompt: Literal["error", "drop", "keep"] = "error"
    """A user's turn without text is an error, its row is dropped (and counted), or it stays: for
    texts that a base model continues from nothing."""

    @field_validator("template_options")
    @classmethod
    def _meant(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Refuse texts that look like booleans: to Jinja each is true."""
        for name, value in options.items():
            if str(value).lower() in ("on", "off", "yes", "no") or value in ("true", "false"):
                raise ValueError(f"{name} is text, which is true to a template: true or false")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is no finite number, which no template knows")
        return options

    def free(self) -> set[str]:
        """Settings that tell no two runs apart.

        What is cut shows in the hash of the data, and defaults that earlier versions had no name
        for leave a run the digest that it had.
        """
        free = {"overlong_share"}
        free |= {key for key in ("overlong", "empty_prompt") if getattr(self, key) != "drop"}
        return free | (set() if self.template_options else {"template_options"})

    @property
    def auto(self) -> tuple[str, ...]:
        """Limits that are still to be chosen."""
        return tuple(key for key in LIMITS if getattr(self, key) == "auto")

    def sized(self, limits: Mapping[str, int]) -> "TextConfig":
        """The settings with these limits in the place of `auto`."""
        return self.model_copy(update={key: limits[key] for key in self.auto if key in limits})

    @property
    def prompt_limit(self) -> int:
        """`max_prompt_tokens` as a number: none that matters while it is to be chosen."""
        return WHOLE if self.max_prompt_tokens == "auto" else self.max_prompt_tokens

    @property
    def response_limit(self) -> int:
        """`max_response_tokens` likewise."""
        return WHOLE if self.max_response_tokens == "auto" else self.max_response_tokens

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequence: what decides position embeddings that depend on it."""
        return None if self.auto else self.prompt_limit + self.response_limit
