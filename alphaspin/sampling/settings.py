"""Settings of sampling."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from alphaspin.foundation.kinds import Need
from alphaspin.foundation.openai_api import Address, Variable
from alphaspin.foundation.paths import Place
from alphaspin.foundation.section import (
    Names,
    PositiveFloat,
    PositiveInt,
    Section,
    refuse_unused,
)
from alphaspin.model.settings import LoraConfig

SAMPLING_KEYS: dict[str, tuple[str, ...]] = {
    **{key: ("vllm", "sglang", "transformers") for key in ("url", "model", "key_variable")},
    "workers": ("vllm", "auto", "sglang", "transformers"),
    **{key: ("vllm", "auto") for key in ("vllm_python", "vllm_arguments", "tensor_parallel")},
}
"""Settings of sampling that only servers look at."""
OWN_KEYS = ("vllm_python", "vllm_arguments", "tensor_parallel")
"""Those of a vLLM that the run starts itself."""


WEIGHED = Need(
    "sampling.untouched",
    (True,),
    "answers are weighed by the probability with which they were drawn",
    "sampling.temperature = 1 without top_p and top_k",
)


class SamplingConfig(Section):
    """How opponents answer."""

    engine: Literal["local", "auto", "vllm", "sglang", "transformers"] = "local"
    """`local`: this process. `vllm` without `url`: vLLM, which the run starts and ends itself; with
    it, a server that is there. `sglang`, `transformers`: a server at `url`; the latter has the base
    only. `auto`: vLLM of one's own on a GPU, where it is installed and knows the model, local
    otherwise, and wherever local is needed. Evaluation is local, but of a sharded base, which does
    not sample."""
    url: Address | None = None
    """Address of the server, up to and with `/v1`."""
    vllm_python: Place | None = None
    """Interpreter of the environment in which vLLM is installed; by default this one's."""
    vllm_arguments: Names | None = None
    """Further arguments of the vLLM that the run starts, as `--gpu-memory-utilization=0.4`."""
    tensor_parallel: PositiveInt | None = None
    """GPUs, and so processes of the run, that share one vLLM; by default one, or all of a node
    where the base is sharded."""
    model: str | None = None
    """Name under which the server has the base."""
    key_variable: Variable | None = None
    """Environment variable that holds the server's API key."""
    workers: PositiveInt = 64
    """Requests to the server under way at once."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature; the theory of self-play assumes 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest set of tokens with this probability is kept."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Number of tokens kept; 0 keeps all."""
    batch_size: PositiveInt = 256
    """Prompts decoded together."""
    particles: Annotated[int, Field(ge=2, le=2**14)] = 16
    """Draws per answer of `selfplay.opponent: mixture-smc`."""
    shard_size: PositiveInt = 1024
    """Prompts per durable shard of sampling and scoring: what a killed run repeats at most."""

    @property
    def untouched(self) -> bool:
        """Whether answers are drawn from the policy itself, not from one that is sharper or cut."""
        return (self.temperature, self.top_p, self.top_k) == (1, 1, 0)

    @model_validator(mode="after")
    def _complete(self) -> "SamplingConfig":
        refuse_unused(self, "sampling.engine", self.engine, SAMPLING_KEYS, "sampling.")
        asked = "without sampling.url" if self.url is None else "with sampling.url"
        unused = ("model", "key_variable") if self.url is None else OWN_KEYS
        for name in unused if self.engine == "vllm" else ():
            if getattr(self, name) is not None:
                raise ValueError(f"sampling.{name} has no effect {asked}: leave it out")
        for name in ("url", "model"):
            if self.engine != "local" and not self.owned and getattr(self, name) is None:
                raise ValueError(f"sampling.engine = {self.engine} needs sampling.{name}")
        return self

    @property
    def owned(self) -> bool:
        """Whether the run starts its engine itself, should it have one."""
        return self.engine in ("auto", "vllm") and self.url is None


class GFlowNetConfig(Section):
    """An adapter trained to sample from the exact geometric mixture (sub-trajectory balance)."""

    prompts: PositiveInt = 1000
    """Prompts it is trained on."""
    epochs: PositiveInt = 10
    """Passes over the prompts; answers are sampled afresh in each."""
    batch_size: PositiveInt = 8
    """Prompts per optimiser step."""
    answers: Annotated[int, Field(ge=8, le=2**14, multiple_of=4)] = 16
    """Answers per prompt and step: a quarter sampled from the adapter, a half from it at a
    temperature between 0.5 and 2, a quarter from the replay."""
    accumulation: PositiveInt = 1
    """Micro-batches per optimiser step; `batch_size` is split over them."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate; it rises over the first tenth of the steps and falls linearly."""
    lam: Annotated[float, Field(gt=0, le=1)] = 1.0
    """λ of sub-trajectory balance: the pair of states i < j weighs λ^(j-i-1)."""
    reward_temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """The reward is R^(1/T); T falls linearly from this value to exactly 1 in the first half of
    the steps."""
    replay: PositiveInt = 16
    """Answers kept per prompt: those with the highest reward."""
    near: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Two kept answers differ by an edit distance of more than this share of the longer one."""
    clip: PositiveFloat | None = 1.0
    """Largest gradient norm; `None` for no clipping."""
    checkpoint_every: PositiveInt = 50
    """Optimiser steps between two durable checkpoints."""
    lora: LoraConfig = LoraConfig()
    """The adapter: what it adds to the base corrects token-level decoding of the mixture."""

    @field_validator("lora")
    @classmethod
    def _fresh(cls, lora: LoraConfig) -> LoraConfig:
        if lora.start:
            raise ValueError("gflownet.lora.start: the sampler starts from zero; leave it out")
        return lora
