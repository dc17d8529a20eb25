"""What a run is told: one frozen pydantic model, filled from a YAML recipe and the command line.

Its sections are defined beside what they configure.
"""

import contextlib
import difflib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, model_validator

from alphaspin.data.settings import TextConfig
from alphaspin.errors import InputError
from alphaspin.evaluation.settings import EvaluateConfig
from alphaspin.foundation.paths import Place, Source, from_here, packaged
from alphaspin.foundation.section import (
    RECORDED,
    PositiveFloat,
    PositiveInt,
    Section,
    refuse_unused,
    short,
)
from alphaspin.judges.settings import JudgeConfig
from alphaspin.losses.settings import LOSS_KEYS, LossConfig, ReferenceConfig
from alphaspin.methods.settings import PreferenceConfig
from alphaspin.model.settings import LoraConfig
from alphaspin.opponents.settings import SelfPlayConfig
from alphaspin.sampling.settings import NO_STACK, GFlowNetConfig, SamplingConfig
from alphaspin.training.settings import TrainConfig


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
        refuse_unused(self, "method", self.method, METHOD_KEYS)
        opponent = self.selfplay.opponent
        refuse_unused(self, "selfplay.opponent", opponent, OPPONENT_KEYS)
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
            refuse_unused(reference, "reference.kind", reference.kind, users, "reference.")
        if self.method == "spin" and self.loss.kind == "slic":
            keys = ["mode"] if opponent.startswith("mixture") else ["mode", "alpha", "kind"]
            others: tuple[str, ...] = ("dpo", "ipo", "hinge")
            users = {key: others for key in keys if not (key == "kind" and opponent == "ema")}
            refuse_unused(reference, "loss.kind", "slic", users, "reference.")

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
                named[key] = from_here(named[key])
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
            line = f"{key} = {short(item['input'])}: {item['msg'].removeprefix('Value error, ')}"
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
    from alphaspin.commands.options import GFlowNetRun

    keys = all_keys() + all_keys(GFlowNetRun)
    return isinstance(part, str) and any(part in key.split(".") for key in keys)
