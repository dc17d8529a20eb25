"""Settings of the data."""

from typing import Annotated, Literal

from pydantic import AfterValidator

from alphaspin.foundation.paths import place
from alphaspin.foundation.section import PositiveInt, Section


def _template(name: str) -> str:
    return name if name in ("auto", "plain") else place(name)


class TextConfig(Section):
    """How conversations become prompt and response tokens."""

    template: Annotated[str, AfterValidator(_template)] = "auto"
    """Chat template: `auto` (the tokenizer's own, the plain one where it has none), `plain`, or the
    path of a Jinja file."""
    turns: Literal["last", "all"] = "last"
    """Assistant turns of a conversation that are demonstrations: the last one, or each of them."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest prompt, in tokens."""
    max_response_tokens: PositiveInt = 1024
    """Longest response, in tokens, demonstrated or sampled. A longer one is cut there, has no end
    token, and is scored without it."""
    too_long: Literal["error", "drop"] = "error"
    """A prompt beyond `max_prompt_tokens` is an error, or its row is dropped (and counted)."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: what decides position embeddings that depend on it."""
        return self.max_prompt_tokens + self.max_response_tokens
