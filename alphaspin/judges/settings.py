"""Settings of judges."""

import os
from typing import Any, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from alphaspin.foundation.paths import Place, source
from alphaspin.foundation.section import PositiveInt, Section, refuse_unused


class JudgeConfig(Section):
    """Who says which of two responses is better; for every `method` but `spin`."""

    kind: Literal["verifiable", "reward_model", "pairrm", "server", "callable"] = "verifiable"
    """`verifiable`: exact match with the demonstrated answer, as `evaluate.answer` says.
    `reward_model`: a sequence classifier with one output. `pairrm`: PairRM. `server`: a generative
    judge behind an OpenAI-compatible API. `callable`: a Python function of a `Comparison`."""
    model: str | None = None
    """Folder or hub id of `reward_model` and `pairrm` (llm-blender/PairRM-hf where it is not set);
    the name that the server knows, for `server`."""
    url: str | None = None
    """Address of `server`, up to and with `/v1`."""
    key_variable: str | None = None
    """Environment variable that holds the API key of `server`."""
    workers: PositiveInt = 8
    """Requests to `server` under way at once."""
    function: str | None = None
    """`package.module:function` of `callable`, found from the working directory too."""
    folder: Place | None = None
    """Folder in which `function` is found: the working directory at the start of the run, which is
    remembered. For a run whose `function` has moved."""
    both_orders: bool = True
    """`callable` is asked in both orders; not needed where f(a, b) = 1 - f(b, a)."""
    batch_size: PositiveInt = 16
    """Texts (`reward_model`) or pairs (`pairrm`) per pass."""

    @model_validator(mode="before")
    @classmethod
    def _remembered(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("function") and not values.get("folder"):
            return {**values, "folder": os.getcwd()}
        return values

    @field_validator("model")
    @classmethod
    def _local(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None or info.data.get("kind") == "server":  # a name of the server's
            return value
        return source(value)

    @model_validator(mode="after")
    def _complete(self) -> "JudgeConfig":
        refuse_unused(self, "judge.kind", self.kind, JUDGE_KEYS, "judge.")
        required = {
            "reward_model": ("model",),
            "server": ("url", "model"),
            "callable": ("function",),
        }
        for name in required.get(self.kind, ()):
            if getattr(self, name) is None:
                raise ValueError(f"judge.kind = {self.kind} needs judge.{name}")
        return self


JUDGE_KEYS: dict[str, tuple[str, ...]] = {
    "model": ("reward_model", "pairrm", "server"),
    **dict.fromkeys(("url", "key_variable", "workers"), ("server",)),
    **dict.fromkeys(("function", "folder", "both_orders"), ("callable",)),
    "batch_size": ("reward_model", "pairrm"),
}
"""Settings of a judge that only some kinds look at."""
