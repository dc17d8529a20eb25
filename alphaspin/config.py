"""What a run is told: one frozen pydantic model, filled from a YAML recipe and the command line.

A value that the papers change from one iteration to the next (learning rate, β, prompts) is a list
with one entry per iteration whose last entry repeats; a single number means the same everywhere.
"""

import contextlib
import difflib
import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from alphaspin.errors import InputError

T = TypeVar("T")


def check_installed(package: str, setting: str, extra: str) -> None:
    """Whether an optional package is there.

    Raises:
        InputError: it is not; names the setting that needs it and how to get it.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{setting}: {package} is not installed: pip install 'alphaspin[{extra}]'")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def home(path: str) -> str:
    """The path with `~` expanded, which no shell does in YAML or after `=`.

    Raises:
        InputError: no such user.
    """
    found = os.path.expanduser(path)
    if found.startswith("~") and not os.path.lexists(found):
        raise InputError(f"there is no home folder {path.split('/')[0]}; ./{path} is a path")
    return found


def place(path: str) -> str:
    """A path that means the same from anywhere: absolute, `~` expanded, without `.` and `..`.

    Symlinks keep their names (a hub's cache gives files their suffixes by them), but one that `..`
    leads out of is followed, as the system does. An empty text stays empty.

    Raises:
        InputError: as `home`.
    """
    if not path:
        return path
    found = home(path)
    folder, name = os.path.split(os.path.join(os.getcwd(), found.rstrip("/") or "/"))
    if ".." not in Path(folder, name).parts:
        return os.path.abspath(found)
    return os.path.realpath(found) if name == ".." else os.path.join(os.path.realpath(folder), name)


def source(name: str) -> str:
    """A `place` where `name` is a path; `tiny` and a hub id, which looks like a path, stay.

    It is a path where something is there, or where it begins as no id does.

    Raises:
        InputError: as `place`.
    """
    local = name.startswith(("~", ".", "/")) or os.path.lexists(name)
    return place(name) if local and name != "tiny" else name


def check_there(key: str, name: str, hint: str = "") -> None:
    """Whether a `source` is there, as far as that can be told without the hub.

    Raises:
        InputError: a path at which nothing is; ends with `hint`.
    """
    if Path(name).is_absolute() and not Path(name).exists():
        raise InputError(f"{key} = {name}: no such file or folder{hint}")


def _template(name: str) -> str:
    return name if name in ("auto", "plain") else place(name)


def _from_here(name: str) -> str:
    """One spelling for all of a path: relative to the working directory where it is inside.

    So a project's folder can be moved, and runs have the names that they had when paths were kept
    as typed.
    """
    if not Path(name).is_absolute():
        return name
    real, here = Path(name).resolve(), Path.cwd()
    if not real.is_relative_to(here):
        return str(real)
    inside = str(real.relative_to(here))
    return f"./{inside}" if inside in ("tiny", "auto", "plain") else inside


Expanded = Annotated[str, AfterValidator(home)]
Place = Annotated[str, AfterValidator(place)]
Source = Annotated[str, AfterValidator(source)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PerIterationFloat = Annotated[
    tuple[PositiveFloat, ...], BeforeValidator(_as_tuple), Field(min_length=1)
]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
PerIterationInt = Annotated[
    tuple[PositiveInt, ...], BeforeValidator(_as_tuple), Field(min_length=1)
]


Opponent = Literal[
    "previous",
    "history",
    "fictitious",
    "ema",
    "mixture-token",
    "mixture-smc",
    "mixture-gflownet",
]


def at(values: tuple[T, ...], iteration: int) -> T:
    """The value of a per-iteration list at iteration t = 0, 1, …; the last entry repeats."""
    return values[min(iteration, len(values) - 1)]


class Section(BaseModel):
    """Base of all sections: no unknown keys, no mutation, docstrings become `--help`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Unwrap the lines of the docstrings for `--help`."""
        super().__pydantic_init_subclass__(**kwargs)
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split()) or None


RECORDED = object()
"""Context of a validation that reads what a finished run was given: settings without effect, which
earlier versions accepted, stay as they are."""


def _refuse_unused(
    settings: Section,
    choice: str,
    chosen: str,
    keys: Mapping[str, tuple[str, ...]],
    prefix: str = "",
) -> None:
    """Refuse what was set and would have no effect under the chosen method or kind.

    Raises:
        ValueError: one of `keys` that is not for `chosen` differs from its default.
    """
    for key, users in keys.items():
        if chosen in users:
            continue
        value: Any = settings
        default: Any = None
        for name in key.split("."):
            default = type(value).model_fields[name].default
            value = getattr(value, name)
        if value == default:
            continue
        if isinstance(value, Section):  # name the first setting that differs
            name = next(
                n for n in type(value).model_fields if getattr(value, n) != getattr(default, n)
            )
            key, value = f"{key}.{name}", getattr(value, name)
        raise ValueError(
            f"{prefix}{key} = {_short(value)} has no effect with {choice} = {chosen}, only with "
            f"{' or '.join(users)}: leave it out, or start from a recipe of the method"
        )


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


class SelfPlayConfig(Section):
    """The outer loop: who plays against whom, and on which prompts."""

    iterations: PositiveInt = 3
    """Number of iterations (t = 0, 1, …); the papers' T plus one."""
    opponent: Opponent = "history"
    """Who answers: the `previous` iterate, the last `history` of them, all so far (`fictitious`),
    the moving average of their adapters (`ema`, with `reference.ema_decay`), or the mixture that is
    the reference: token by token (`mixture-token`, close to it), by sequential Monte Carlo
    (`mixture-smc`, with `sampling.particles`), or by an adapter that is trained for it in each
    iteration (`mixture-gflownet`, with the section `gflownet`)."""
    history: Annotated[int, Field(ge=1)] | Literal["inf"] = 1
    """Opponents of iteration t: the last `history` iterates in equal shares (the base counts for
    t < 0), or `inf` for fictitious play, all iterates so far."""
    prompts: PerIterationInt = (50_000,)
    """Prompts that get a sampled answer, per iteration; never more than the data holds."""
    mixing: bool = False
    """Train on the previous iteration's pairs as well (the public SPIN code's "mixing")."""
    warm_start: bool = True
    """A new iterate starts from the previous adapter; otherwise from a fresh one."""

    @model_validator(mode="after")
    def _used(self) -> "SelfPlayConfig":
        users = {"history": ("history",)}
        _refuse_unused(self, "selfplay.opponent", self.opponent, users, "selfplay.")
        return self


class ReferenceConfig(Section):
    """The reference policy π_ref of iteration t."""

    kind: Literal["geometric", "arithmetic", "ema"] = "geometric"
    """`geometric`: π_prev^α π_base^(1-α) (α-SPIN). `arithmetic`: α π_prev + (1-α) π_base.
    `ema`: geometric, with the moving average of the adapters in the place of π_prev."""
    alpha: Fraction = 1.0
    """Weight α of the previous iterate: 1 is SPIN, 0 is DPO against the base. With `sppo` and
    `rspo`, which need a normalised reference, log Z(x) is estimated from the K responses."""
    mode: Literal["auto", "cached", "online", "joint"] = "auto"
    """When π_ref is computed. `cached`: before training, once per pair, and kept on disk. `online`:
    at each step, previous and base in one pass. `joint`: at each step, in the policy's own pass,
    which gathers sharded weights once for all three. `auto`: the cheapest for the pass at hand."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """ema_t = decay · ema_{t-1} + (1-decay) · adapter_{t-1}, for `kind: ema`."""


class LossConfig(Section):
    """The pairwise loss on (winner, loser)."""

    kind: Literal["dpo", "ipo", "hinge", "slic"] = "dpo"
    """`dpo` (logistic), `ipo` (squared), `hinge` (reference-relative), `slic` (no reference)."""
    beta: PerIterationFloat = (0.1,)
    """Inverse temperature β of `dpo` and `hinge`, per iteration."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """ε of `dpo`: the share of pairs taken to be labelled the wrong way round."""
    ipo_tau: PositiveFloat = 0.1
    """τ of `ipo`: the target of the margin is 1/(2τ) nats."""
    ipo_length: Literal["sum", "mean"] = "sum"
    """`ipo` on log-probs summed over tokens (the paper) or averaged (several trainers)."""
    slic_delta: PositiveFloat = 1.0
    """Margin δ of `slic`, in nats."""
    slic_lambda: NonNegativeFloat = 0.0
    """Weight λ of the winner's log-prob in `slic`."""
    nll_weight: NonNegativeFloat = 0.0
    """Weight of the winner's negative log-likelihood per token, added to any loss."""

    @model_validator(mode="after")
    def _used(self, info: ValidationInfo) -> "LossConfig":
        if info.context is not RECORDED:
            _refuse_unused(self, "loss.kind", self.kind, LOSS_KEYS, "loss.")
        return self


LOSS_KEYS: dict[str, tuple[str, ...]] = {
    "beta": ("dpo", "hinge"),
    "label_smoothing": ("dpo",),
    **dict.fromkeys(("ipo_tau", "ipo_length"), ("ipo",)),
    **dict.fromkeys(("slic_delta", "slic_lambda"), ("slic",)),
}
"""Settings of a loss that only some kinds look at."""


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
        _refuse_unused(self, "judge.kind", self.kind, JUDGE_KEYS, "judge.")
        required = {
            "reward_model": ("model",),
            "server": ("url", "model"),
            "callable": ("function",),
        }
        for name in required.get(self.kind, ()):
            if getattr(self, name) is None:
                raise ValueError(f"judge.kind = {self.kind} needs judge.{name}")
        return self


class PreferenceConfig(Section):
    """SPPO, RSPO and Nash-MD: a judge compares responses of the current iterate."""

    responses: Annotated[int, Field(ge=2)] = 5
    """Responses K per prompt; the best and the worst of them are trained on."""
    labels: Literal["soft", "single", "hard", "bradley_terry"] = "soft"
    """Win probability each is trained on: P̂ against all K (`soft`, the paper), against the other
    one (`single`), 1 and 0 (`hard`), or P̂ of the Bradley-Terry fit (`bradley_terry`)."""
    eta: PositiveFloat = 1000.0
    """η = 1/β: a response with win probability P̂ should gain η(P̂ - ½) nats."""
    regulariser: Literal["reverse_kl", "forward_kl", "forward_reverse", "chi2", "entropy"] = (
        "reverse_kl"
    )
    """R of `rspo`, towards the base."""
    lam: NonNegativeFloat = 0.5
    """λ of `rspo`; published: 0.5 for `reverse_kl`, 0.1 for `forward_kl` and `forward_reverse`."""
    clamp: PositiveFloat | None = None
    """Largest exponent of the importance ratios of `rspo`, in nats; `None` is the published one (7
    for `forward_kl`, 10 for `forward_reverse` and `chi2`)."""
    reverse_weight: NonNegativeFloat = 5.0
    """Weight of the reverse KL in `forward_reverse`."""
    tau: PositiveFloat = 0.1
    """τ of `nash_md`: weight of the KL to the base, against win probabilities."""
    mixture: Fraction = 0.25
    """m of `nash_md`: share of the base's logits in the opponent's."""

    @model_validator(mode="after")
    def _used(self, info: ValidationInfo) -> "PreferenceConfig":
        users = {
            "clamp": ("forward_kl", "forward_reverse", "chi2"),
            "reverse_weight": ("forward_reverse",),
        }
        if info.context is not RECORDED:
            chosen = self.regulariser
            _refuse_unused(self, "preference.regulariser", chosen, users, "preference.")
        return self


JUDGE_KEYS: dict[str, tuple[str, ...]] = {
    "model": ("reward_model", "pairrm", "server"),
    **dict.fromkeys(("url", "key_variable", "workers"), ("server",)),
    **dict.fromkeys(("function", "folder", "both_orders"), ("callable",)),
    "batch_size": ("reward_model", "pairrm"),
}
"""Settings of a judge that only some kinds look at."""


class LoraConfig(Section):
    """The adapter of each iterate, in PEFT's terms."""

    r: PositiveInt = 16
    """Rank."""
    alpha: PositiveFloat = 32.0
    """LoRA alpha: the update is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input, in training."""
    targets: Names = ("all-linear",)
    """Module names that get an adapter, or `all-linear` (all but the head)."""
    target_parameters: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
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


class TrainConfig(Section):
    """Optimisation within one iteration."""

    batch_size: PositiveInt = 32
    """Pairs per optimiser step."""
    accumulation: PositiveInt = 1
    """Micro-batches per optimiser step; `batch_size` is split over them. Several processes share
    them, their number rounded up to a multiple of the processes'."""
    epochs: PositiveInt = 1
    """Passes over the pairs of an iteration."""
    max_steps: PositiveInt | None = None
    """Upper limit of optimiser steps per iteration."""
    lr: PerIterationFloat = (5e-5,)
    """Peak learning rate, per iteration."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after warm-up."""
    warmup: Fraction = 0.1
    """Share of an iteration's steps in which the rate rises from 0."""
    optimizer: Literal["adamw", "adamw_8bit", "rmsprop"] = "adamw"
    """Optimiser, as in torch.optim; `adamw_8bit` is bitsandbytes' AdamW, whose moments take 8 bits
    instead of 32 in matrices of 4,096 numbers and more."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of AdamW (L2 for RMSProp)."""
    clip: PositiveFloat | None = 1.0
    """Largest gradient norm; `None` for no clipping."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the frozen base and the activations: `auto` is bf16 on a GPU that has it, else fp32.
    Adapters and optimiser are always fp32."""
    quantization: Literal["none", "nf4"] = "none"
    """Weights of the frozen base, all but embeddings and head: in `dtype`, or in 4 bits (`nf4`,
    QLoRA's, by bitsandbytes), about a quarter of the memory of bf16. A layer is dequantised once
    for all policies of a pass, and again in the backward pass; in sampling, for each token. A
    server that samples has a base of its own."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """`packed`: all trees (a prompt and its answers) of a micro-batch in one row, no padding.
    `padded`: one prompt and one answer per row, by the family's own code, which any family has.
    `auto`: packed where the model's family can be."""
    liger: Literal["auto", "off"] = "auto"
    """`auto`: Liger's kernels compute norms, rotary positions and MLPs of a base on a GPU, if they
    are installed and know its family and it is not sharded."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    sharding: Literal["none", "fsdp"] = "none"
    """What each of several processes holds of the frozen base: all of it, or with `fsdp` a share of
    every layer, gathered when a pass reaches it. Adapters and the head are whole in each."""
    checkpoint_every: PositiveInt = 50
    """Optimiser steps between two durable checkpoints."""


NO_STACK = (
    "a mixture's sampler starts from adapters stacked along their rank, which those of parameters "
    "are not; leave it out"
)


class GFlowNetConfig(Section):
    """An adapter trained to sample from the exact geometric mixture (sub-trajectory balance)."""

    prompts: PositiveInt = 1000
    """Prompts it is trained on."""
    epochs: PositiveInt = 10
    """Passes over the prompts; answers are sampled afresh in each."""
    batch_size: PositiveInt = 8
    """Prompts per optimiser step."""
    answers: Annotated[int, Field(ge=8, multiple_of=4)] = 16
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
    """The adapter. Its rank is at least the sum of the ranks of the adapters in the mixture."""

    @model_validator(mode="after")
    def _stacked(self) -> "GFlowNetConfig":
        if self.lora.target_parameters:
            raise ValueError(f"gflownet.lora.target_parameters: {NO_STACK}")
        return self


SAMPLING_KEYS: dict[str, tuple[str, ...]] = {
    key: ("vllm", "sglang", "transformers") for key in ("url", "model", "key_variable", "workers")
}
"""Settings of sampling that only servers look at."""


class SamplingConfig(Section):
    """How opponents answer."""

    engine: Literal["local", "vllm", "sglang", "transformers"] = "local"
    """`local`: this process. Else the kind of the OpenAI-compatible server at `url`: vLLM or
    SGLang, which load the run's adapters from its folder, or `transformers serve`, which has the
    base only. Evaluation is always local."""
    url: str | None = None
    """Address of the server, up to and with `/v1`."""
    model: str | None = None
    """Name under which the server has the base."""
    key_variable: str | None = None
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
    particles: Annotated[int, Field(ge=2)] = 16
    """Draws per answer of `selfplay.opponent: mixture-smc`."""
    shard_size: PositiveInt = 1024
    """Prompts per durable shard of sampling and scoring: what a killed run repeats at most."""

    @property
    def untouched(self) -> bool:
        """Whether answers are drawn from the policy itself, not from one that is sharper or cut."""
        return (self.temperature, self.top_p, self.top_k) == (1, 1, 0)

    @model_validator(mode="after")
    def _complete(self) -> "SamplingConfig":
        _refuse_unused(self, "sampling.engine", self.engine, SAMPLING_KEYS, "sampling.")
        for name in ("url", "model"):
            if self.engine != "local" and getattr(self, name) is None:
                raise ValueError(f"sampling.engine = {self.engine} needs sampling.{name}")
        return self


class EvaluateConfig(Section):
    """Held-out measures of the base and each iterate."""

    prompts: Annotated[int, Field(ge=0)] = 256
    """Held-out prompts; 0 for no evaluation. Taken from `--heldout`, or set aside from the data."""
    answer: str | None = None
    """Regular expression whose first group is the answer to compare (gsm8k: `#### (.+)`); without
    it the whole text counts."""
    show: PositiveInt = 8
    """Held-out prompts whose sampled answers are shown in the report."""


class LogConfig(Section):
    """Where metrics go besides `metrics.jsonl`."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers to report to, as Accelerate names them; each must be installed."""


class PlanHints(Section):
    """Facts about a hub model and data set that `--plan` needs and may not download."""

    parameters: PositiveFloat
    """Parameters of the model."""
    hidden: PositiveInt
    """Hidden size."""
    layers: PositiveInt
    """Transformer layers."""
    vocabulary: PositiveInt
    """Vocabulary size."""
    tied: bool = False
    """Whether the head and the embeddings are one matrix."""
    adapter_parameters_per_rank: PositiveInt
    """LoRA parameters at rank 1 with the recipe's targets."""
    demonstrations: PositiveInt
    """Rows of the data set."""
    prompt_tokens: PositiveFloat
    """Mean prompt length, in tokens."""
    response_tokens: PositiveFloat
    """Mean response length, in tokens."""


class GFlowNetRun(Section):
    """Train one sampler of the exact mixture π_adapter^α π_base^(1-α): `alphaspin gflownet`."""

    adapter: Place
    """Folder of the adapter, in PEFT's format."""
    output: Place
    """Folder of the result; the same command goes on with what is there."""
    alpha: Fraction = 0.5
    """Weight α of the adapter."""
    model: Source = "tiny"
    """Frozen base: a Hugging Face folder, a hub id, or `tiny`, the embedded model."""
    data: Source = "tiny"
    """Demonstrations whose prompts are used: as for `alphaspin-train`."""
    split: str = "train"
    """Split of a hub data set."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of all randomness."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the frozen base: as `train.dtype`."""
    check_prompts: PositiveInt = 64
    """Prompts that were not trained on, for the final comparison with token-level decoding."""
    check_answers: Annotated[int, Field(ge=2)] = 32
    """Answers to each of them."""
    text: TextConfig = TextConfig()
    gflownet: GFlowNetConfig = GFlowNetConfig()

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same, as `Config.identity`."""
        free: dict[str, Any] = {
            "output": True,
            "adapter": True,  # its hash counts, not its place
            "gflownet": {"accumulation", "checkpoint_every"},
        }
        return self.model_dump(mode="json", exclude=free)


POINTWISE = ("sppo", "rspo")
METHOD_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("loss", "selfplay.opponent", "selfplay.history"), ("spin",)),
    "selfplay.mixing": ("spin",),
    "reference": ("spin", *POINTWISE),
    "judge": (*POINTWISE, "nash_md"),
    **{f"preference.{key}": ("nash_md",) for key in ("tau", "mixture")},
    **{f"preference.{key}": POINTWISE for key in ("responses", "labels", "eta")},
    **{f"preference.{key}": ("rspo",) for key in ("regulariser", "lam", "clamp", "reverse_weight")},
}
"""Settings (or whole sections) that only some methods look at."""


OPPONENT_KEYS = {"gflownet": ("mixture-gflownet",), "sampling.particles": ("mixture-smc",)}
"""Settings that only some opponents look at."""

ADDED = (
    ("train", "quantization"),
    ("selfplay", "opponent"),
    ("sampling", "particles"),
    ("sampling", "engine"),
    ("sampling", "model"),
)
"""Settings younger than the first runs, whose folders are named without them: left out of a run's
identity where they have their default."""

PATHS = (
    ("", "model"),
    ("", "data"),
    ("", "heldout"),
    ("text", "template"),
    ("judge", "model"),
)
"""Settings (with their sections) that may be paths, of things whose hashes count too."""


class Config(Section):
    """A self-play run."""

    name: Annotated[str, Field(pattern=r"^[\w.-]*\w[\w.-]*$")] = "run"
    """Name of the run; part of its default folder."""
    model: Source = "tiny"
    """Frozen base: a Hugging Face folder, a hub id, or `tiny`, the embedded model."""
    data: Source = "tiny"
    """Demonstrations: a JSONL, JSON or Parquet file, a folder, a hub id, or `tiny`."""
    split: str = "train"
    """Split of a hub data set."""
    heldout: Source | None = None
    """Demonstrations held out for evaluation, read as `data` is; without it some of `data` is set
    aside."""
    output: Place | None = None
    """Run folder; by default `runs/NAME-DIGEST`, where the digest is that of the configuration, so
    that the same command goes on with the same run."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of all randomness, which is a function of (seed, iteration, purpose, example)."""
    method: Literal["spin", "sppo", "rspo", "nash_md"] = "spin"
    """`spin`: demonstrations against sampled answers (`loss`, `reference`). `sppo`, `rspo`: sampled
    answers against each other, as a `judge` compares them (`preference`). `nash_md`: sampled
    answers against those of a mixture with the base, judged too; one gradient pass an iteration."""
    control: Literal["none", "sft"] = "none"
    """`sft` also trains the control: plain further SFT with the same adapter, steps and tokens."""
    text: TextConfig = TextConfig()
    selfplay: SelfPlayConfig = SelfPlayConfig()
    reference: ReferenceConfig = ReferenceConfig()
    loss: LossConfig = LossConfig()
    judge: JudgeConfig = JudgeConfig()
    preference: PreferenceConfig = PreferenceConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    gflownet: GFlowNetConfig = GFlowNetConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()
    hints: PlanHints | None = None

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> "Config":
        if self.train.batch_size % self.train.accumulation:
            raise ValueError(
                f"train.batch_size = {self.train.batch_size} is not a multiple of "
                f"train.accumulation = {self.train.accumulation}"
            )
        ema = {"reference.kind": self.reference.kind, "selfplay.opponent": self.selfplay.opponent}
        for key, value in ema.items():
            if value == "ema" and not self.selfplay.warm_start:
                raise ValueError(
                    f"{key} = ema needs selfplay.warm_start = true: the average of adapters that "
                    "started from different random matrices means nothing"
                )
        if self.selfplay.opponent.startswith("mixture") and self.reference.kind == "arithmetic":
            raise ValueError(
                f"selfplay.opponent = {self.selfplay.opponent} is a geometric mixture, "
                "reference.kind = arithmetic is not: choose geometric or ema"
            )
        if self.selfplay.opponent == "mixture-gflownet" and self.train.sharding != "none":
            raise ValueError(
                "selfplay.opponent = mixture-gflownet needs train.sharding = none: each process "
                "trains the sampler by itself, with passes that the others would have to join"
            )
        if self.lora.target_parameters:
            for key, alone in {
                "train.sharding": ("none", self.train.sharding),
                "sampling.engine": ("local", self.sampling.engine),
            }.items():
                if alone[0] != alone[1]:
                    raise ValueError(f"lora.target_parameters needs {key} = {alone[0]}")
            if self.selfplay.opponent == "mixture-gflownet":
                raise ValueError(f"lora.target_parameters: {NO_STACK}")
        if self.train.quantization != "none" and self.train.sharding != "none":
            raise ValueError(
                f"train.quantization = {self.train.quantization} and train.sharding = "
                f"{self.train.sharding} do not go together: leave one of them out"
            )
        if self.reference.mode == "joint" and self.train.layout == "padded":
            raise ValueError("reference.mode = joint needs train.layout = packed")
        _refuse_unused(self, "method", self.method, METHOD_KEYS)
        opponent = self.selfplay.opponent
        _refuse_unused(self, "selfplay.opponent", opponent, OPPONENT_KEYS)
        if info.context is not RECORDED:
            self._refuse_unused_reference()
        drawn = self.sampling
        if drawn.engine == "transformers" and self.selfplay.iterations > 1:
            raise ValueError(
                "sampling.engine = transformers needs selfplay.iterations = 1: `transformers "
                "serve` has no adapters, so only the base can play; use local, vllm or sglang"
            )
        weighed = None
        if self.method in POINTWISE and 0 < self.reference.alpha < 1:
            if self.reference.kind != "arithmetic":
                weighed = f"reference.alpha = {self.reference.alpha:g} with method = {self.method}"
        elif opponent in ("mixture-smc", "mixture-gflownet"):
            weighed = f"selfplay.opponent = {opponent}"
        if weighed and not drawn.untouched:
            raise ValueError(
                f"{weighed} needs sampling.temperature = 1 without top_p and top_k: answers are "
                "weighed by the probability with which they were drawn"
            )
        mixed = {
            "method": self.method == "nash_md",
            "selfplay.opponent": opponent in ("mixture-token", "mixture-smc"),
        }
        if drawn.engine != "local" and any(mixed.values()):
            key = next(key for key, needs in mixed.items() if needs)
            value = self.method if key == "method" else opponent
            raise ValueError(
                f"{key} = {value} samples from a mixture, which needs sampling.engine = local, not "
                f"{drawn.engine}"
            )
        if self.method == "nash_md" and (self.train.epochs > 1 or not self.selfplay.warm_start):
            raise ValueError(
                "method = nash_md needs train.epochs = 1 and selfplay.warm_start = true: its "
                "gradient holds for responses of the policy that is trained"
            )
        return self

    def with_loss(self, kind: str, *, keep_alpha: bool) -> "Config":
        """The same without what has no effect with this kind of loss: to change a recipe's."""
        loss = {
            key: LossConfig.model_fields[key].default
            for key, users in LOSS_KEYS.items()
            if kind not in users
        }
        update: dict[str, Any] = {"loss": self.loss.model_copy(update=loss)}
        if kind == "slic" and not keep_alpha:
            default = {key: ReferenceConfig.model_fields[key].default for key in ("alpha", "mode")}
            update["reference"] = self.reference.model_copy(update=default)
        return self.model_copy(update=update)

    def _refuse_unused_reference(self) -> None:
        opponent, reference = self.selfplay.opponent, self.reference
        if "ema" not in (opponent, reference.kind):
            users = {"ema_decay": ("ema",)}
            _refuse_unused(reference, "reference.kind", reference.kind, users, "reference.")
        if self.method == "spin" and self.loss.kind == "slic":
            keys = ["mode"] if opponent.startswith("mixture") else ["mode", "alpha", "kind"]
            others: tuple[str, ...] = ("dpo", "ipo", "hinge")
            users = {key: others for key in keys if not (key == "kind" and opponent == "ema")}
            _refuse_unused(reference, "loss.kind", "slic", users, "reference.")

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same: all but where results go and how the work is cut up.

        The latter (micro-batches, layout, recomputation) changes numbers by rounding only, so a run
        that ran out of memory may go on with other values; it is bit-identical with the same ones.
        """
        free: dict[str, Any] = {
            "name": True,
            "output": True,
            "log": True,
            "hints": True,
            "control": True,
            "reference": {"mode"},
            "train": {
                "accumulation",
                "activation_checkpointing",
                "checkpoint_every",
                "layout",
                "liger",
                "sharding",
            },
            "sampling": {"batch_size", "url", "key_variable", "workers"},
            "evaluate": {"show"},
            "judge": {"url", "key_variable", "workers", "batch_size", "folder"},
        }
        if self.method == "spin":  # without these sections, so are runs made before they existed
            free |= dict.fromkeys(("method", "judge", "preference"), True)
        if self.selfplay.opponent != "mixture-gflownet":
            free["gflownet"] = True
        settings = self.model_dump(mode="json", exclude=free)
        for section, key in ADDED:
            if settings[section][key] == type(getattr(self, section)).model_fields[key].default:
                del settings[section][key]
        return settings

    def digest(self) -> str:
        """First 8 hex digits of the hash of the identity, whose paths are spelled one way."""
        settings = self.identity()
        for section, key in PATHS:
            named = settings.get(section, {}) if section else settings
            if named.get(key):
                named[key] = _from_here(named[key])
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def run_folder(self) -> Path:
        """The run's folder: `output`, or one named after the configuration.

        Versions that kept paths as typed had several names for one run: such a folder is found by
        its manifest.
        """
        if self.output:
            return Path(self.output)
        digest = self.digest()
        folder = Path("runs") / f"{self.name}-{digest}"
        if not folder.exists():
            for file in sorted(Path("runs").glob(f"{self.name}-????????/manifest.json")):
                with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                    settings = json.loads(file.read_text(encoding="utf-8"))["config"]
                    if Config.model_validate(settings, context=RECORDED).digest() == digest:
                        return file.parent
        return folder


class EvaluateOptions(Section):
    """Compare base, iterates and control of a run: `alphaspin evaluate RUN [--KEY VALUE …]`.

    Without --tasks: on held-out prompts, with the run's judge or another.
    """

    model: Source | None = None
    """Where the run's base is now, if it has moved."""
    data: Source | None = None
    """Where the run's data are now, if they have moved and prompts were set aside from them."""

    iterations: Names = ("all",)
    """Iterations t to compare with the base, or `all`; the control after as many steps comes
    along."""
    prompts: PositiveInt | None = None
    """Use only the first of the held-out prompts."""
    heldout: Source | None = None
    """Other held-out demonstrations than the run's, read as `data` is."""
    judge: JudgeConfig = JudgeConfig()
    """Who compares answers with the base's. With --judge.kind another than the run's judge; other
    keys alone change the run's (a server's address, for instance)."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness (extra `eval`) to run in the place of the comparison."""
    include_path: Expanded | None = None
    """Folder with further task definitions (YAML)."""
    chat: bool = False
    """Put the prompts of the tasks through the chat template."""
    batch_size: PositiveInt = 8
    """Sequences per pass on the tasks, whose logits are held in full."""

    @model_validator(mode="after")
    def _numbers(self) -> "EvaluateOptions":
        self.chosen()
        return self

    def chosen(self) -> list[int] | None:
        """The iterations as numbers; None for all."""
        if self.iterations == ("all",):
            return None
        if not all(part.isdecimal() for part in self.iterations):
            shown = " ".join(self.iterations)
            raise ValueError(f"iterations = {shown}: expected numbers, or `all` alone")
        return [int(part) for part in self.iterations]


class ExportOptions(Section):
    """Write a policy for use elsewhere: `alphaspin export RUN --to FOLDER (--merge | --vllm)`."""

    to: Expanded
    """Folder to write, which must not exist."""
    iteration: Annotated[int, Field(ge=0)] | None = None
    """Iteration t; by default the last one that is finished."""
    merge: bool = False
    """The base's weights with the adapter added: loads with transformers alone."""
    vllm: bool = False
    """The adapter in PEFT's format, as vLLM's LoRA loader wants it."""
    model: Source | None = None
    """Where the run's base is now, if it has moved."""

    @model_validator(mode="after")
    def _one_form(self) -> "ExportOptions":
        if self.merge == self.vllm:
            raise ValueError("choose one of --merge and --vllm")
        return self


def contraction_note(config: Config) -> str | None:
    """Whether β lies outside the bound of the tabular theory (`docs/theory.md`, section 1).

    The iteration `e_{t+1} = (α - 1/β) e_t + (1-α) e_base` contracts for β > 1/(1+α), and with the
    mixture as the opponent `e_{t+1} = (1 - 1/β)(α e_t + (1-α) e_base)` does for β > α/(1+α). The
    bounds hold for the logistic loss at its population optimum, reference geometric, opponent
    π_{t-1} or the exact mixture; finite training of a network stays far from that optimum: a
    warning, not an error.
    """
    alpha = config.reference.alpha
    consistent = config.selfplay.opponent.startswith("mixture")
    bound, formula = (alpha, "α") if consistent else (1, "1")
    bound, formula = bound / (1 + alpha), f"{formula}/(1+α)"
    low = min(config.loss.beta)
    if config.method != "spin" or config.loss.kind != "dpo" or low > bound:
        return None
    return (
        f"β = {low:g} is outside the contraction bound β > {formula} = {bound:.3g}: trained to "
        "its optimum, each iteration would overshoot; few steps at a small rate keep it in check"
    )


def packaged(name: str) -> Path:
    """A folder or file among the packaged recipes, e.g. `tiny.yaml` or `tiny/model`."""
    return Path(str(resources.files("alphaspin") / "recipes" / name))


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    return sorted(path.stem for path in packaged("").glob("*.yaml"))


def load_config(source: str) -> Config:
    """The configuration in a packaged recipe or a YAML file.

    Raises:
        InputError: no such recipe or file, broken YAML, an unknown key or a bad value; the message
            names the file, the key, the value, and the nearest right name.
    """
    path = Path(os.path.expanduser(source))
    if source in recipe_names():
        path = packaged(f"{source}.yaml")
    elif not (path.suffix in {".yaml", ".yml"} or path.exists()):
        near = difflib.get_close_matches(source, recipe_names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"no recipe {source!r}{hint} (recipes: {', '.join(recipe_names())})")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, found {type(content).__name__}")
    content.setdefault("name", path.stem)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """A pydantic error in one line per key: the key, the value, what is wrong, the nearest name."""
    lines: list[str] = []
    for item in error.errors(include_url=False):
        # A union reports each of its branches, tagged after the key: show the key once.
        key = ".".join(str(part) for part in item["loc"] if _is_key(part))
        if item["type"] == "extra_forbidden":
            key = ".".join(map(str, item["loc"]))
            near = nearest_key(key)
            hint = f"; did you mean {near!r}?" if near else ""
            line = f"unknown key {key!r}{hint}"
        elif key:
            line = f"{key} = {_short(item['input'])}: {item['msg'].removeprefix('Value error, ')}"
        else:
            line = item["msg"].removeprefix("Value error, ")
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def all_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):  # also `Section | None`
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += all_keys(kind, f"{prefix}{name}.")
    return keys


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def nearest_key(key: str, keys: Sequence[str] | None = None) -> str | None:
    """The one of `keys` (all settings) whose dotted name, or last part of it, is most like it."""
    keys = keys or all_keys()
    by_last = {name.rsplit(".", 1)[-1]: name for name in keys}
    found = difflib.get_close_matches(key, keys, 1, cutoff=0.6)
    if not found:
        last = difflib.get_close_matches(key.rsplit(".", 1)[-1], by_last, 1, cutoff=0.6)
        found = [by_last[name] for name in last]
    return found[0] if found else None


def _is_key(part: int | str) -> bool:
    keys = all_keys() + all_keys(GFlowNetRun)
    return isinstance(part, str) and any(part in key.split(".") for key in keys)


def _short(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
