"""What a run is told: one frozen pydantic model, filled from a YAML recipe and the command line.

Its sections are defined beside what they configure. Losses, judges, opponents and methods have the
settings of their kind only, see `foundation.kinds`.
"""

import contextlib
import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from alphaspin.errors import InputError
from alphaspin.foundation.kinds import Kind, Need, Table
from alphaspin.foundation.paths import (
    PRIVATE,
    Place,
    Source,
    for_others,
    from_here,
    home,
    packaged,
)
from alphaspin.foundation.section import (
    RECORDED,
    PositiveFloat,
    PositiveInt,
    Section,
    no_effect,
    refuse_unused,
    short,
)
from alphaspin.foundation.yaml_file import YamlFile
from alphaspin.judges import JUDGE
from alphaspin.judges.base import JudgeConfig
from alphaspin.judges.verifiable import Verifiable
from alphaspin.losses import LOSS
from alphaspin.losses.reference import NO_AVERAGE, ReferenceConfig
from alphaspin.methods import METHOD
from alphaspin.methods.base import Method, Sections
from alphaspin.methods.spin import Spin
from alphaspin.opponents import OPPONENT
from alphaspin.sampling.settings import OWN_KEYS
from alphaspin.schema import TABLES, explain


class LogConfig(Section):
    """Where metrics go besides `metrics.jsonl`."""

    trackers: tuple[Literal["mlflow", "tensorboard", "trackio", "wandb"], ...] = ()
    """Trackers to report to, as Accelerate names them; each must be installed. A run that is
    stopped goes on in them as the same run."""

    @field_validator("trackers")
    @classmethod
    def _once(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        if len({*trackers}) < len(trackers):
            raise ValueError(f"names {max(trackers, key=trackers.count)} twice")
        return trackers


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
    kv_width: PositiveInt | None = None
    """Numbers of the keys of a token and layer; by default the hidden size."""
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


PATHS = (
    ("", "model"),
    ("", "data"),
    ("", "heldout"),
    ("text", "template"),
    ("judge", "model"),
    ("lora", "start"),
)
"""Settings (with their sections) that may be paths, of things whose hashes count too."""


class Config(Sections):
    """A self-play run."""

    name: Annotated[str, Field(pattern=r"^[\w.-]*\w[\w.-]*$", max_length=200)] = "run"
    """Name of the run; part of its default folder."""
    model: Source = "tiny"
    """Frozen base: a Hugging Face folder, a hub id, or `tiny`, the embedded model."""
    data: Source = "tiny"
    """Demonstrations: a JSONL, JSON, CSV or Parquet file, a folder, a hub id, or `tiny`."""
    split: str = "train"
    """Split of a folder, by the names of its files, or of a hub data set."""
    heldout: Source | None = None
    """Demonstrations held out for evaluation, read as `data` is; without it some of `data` is set
    aside."""
    heldout_split: str | None = None
    """Split of `heldout`, by default that of `data`."""
    output: Place | None = None
    """Run folder; by default `runs/NAME-DIGEST`, where the digest is that of the configuration, so
    that the same command goes on with the same run."""
    judge: Annotated[SerializeAsAny[JudgeConfig], BeforeValidator(JUDGE.read)] = Verifiable()
    preference: Annotated[SerializeAsAny[Method], Field(validate_default=True)] = Spin()
    log: LogConfig = LogConfig()
    hints: PlanHints | None = None

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        if ":" not in name:
            METHOD.find(name)
        return name

    @field_validator("preference", mode="before")
    @classmethod
    def _of_method(cls, values: Any, info: ValidationInfo) -> Method:
        """The method's own settings; those of another are refused."""
        name = info.data.get("method", METHOD.default)
        if isinstance(values, Method):
            if values.plugin or (name in METHOD.kinds and isinstance(values, METHOD.find(name))):
                return values
            values = {} if type(values)() == values else values.model_dump()
        return METHOD.read(values, info, name)

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> "Config":
        size, parts = self.train.batch_size, self.train.accumulation
        if size % parts:
            raise ValueError(
                f"train.batch_size = {size} is not a multiple of train.accumulation = {parts}, the "
                f"number of its micro-batches: --train.accumulation {math.gcd(size, parts)} goes"
            )
        if self.train.quantization != "none" and self.train.sharding != "none":
            raise ValueError(
                f"train.quantization = {self.train.quantization} and train.sharding = "
                f"{self.train.sharding} do not go together: leave one of them out"
            )
        for table, kind in ((METHOD, self.preference), (OPPONENT, self.selfplay)):
            self._refuse_unused(table, kind)
        if info.context is not RECORDED:
            self._refuse_unused_reference()
        for who, needs in self._needs():
            for need in needs:
                self._check(who, need)
        return self

    def _refuse_unused(self, table: Table[Any], chosen: Kind) -> None:
        """Refuse what was set for other kinds of a table, in sections elsewhere."""
        every = {key: None for kind in table.kinds.values() for key in kind.uses}
        users = {
            key: tuple(name for name, kind in table.kinds.items() if key in kind.uses)
            for key in every
            if key not in chosen.uses
        }
        chosen_by = {t.key: t for t in TABLES if t.key in users}
        for key, other in chosen_by.items():  # each kind says its own name by default
            if self.chosen(other) != other.default:
                name = self.chosen(table)
                raise ValueError(no_effect(key, self.chosen(other), table.key, name, users[key]))
        refuse_unused(self, table.key, self.chosen(table), users)

    def chosen(self, table: Table[Any]) -> str:
        """The name of the kind that is chosen from a table."""
        value: Any = self
        for word in table.key.split("."):
            value = getattr(value, word)
        return value

    def plugins(self) -> dict[str, str]:
        """Hashes of the files of kinds that are somebody's own, by the setting that chooses."""
        kinds = {table.key: getattr(self, table.section) for table in TABLES}
        return {key: kind.plugin for key, kind in kinds.items() if kind.plugin}

    def _needs(self) -> list[tuple[str, tuple[Need, ...]]]:
        """Who needs what of other sections."""
        found = [
            (f"{t.key} = {self.chosen(t)}", getattr(self, t.section).needs(self)) for t in TABLES
        ]
        if self.reference.kind == "ema":
            found.append(
                ("reference.kind = ema", (Need("selfplay.warm_start", (True,), NO_AVERAGE),))
            )
        if self.reference.mode == "joint":
            why = "rows of padding have no trees to share"
            layouts = Need("train.layout", ("packed", "auto"), why)
            found.append(("reference.mode = joint", (layouts,)))
        if self.lora.target_parameters:
            why = "no other has adapters of parameters"
            keys = {"train.sharding": "none", "sampling.engine": "local"}
            found.append(
                ("lora.target_parameters", tuple(Need(k, (v,), why) for k, v in keys.items()))
            )
        if self.lora.start:
            why = (
                "the base plays with an adapter; `transformers serve` has none, and an engine of "
                "the run's own is not yet given it (a server with sampling.url is)"
            )
            served = ("local",) if self.sampling.owned else ("local", "vllm", "sglang")
            engines = Need("sampling.engine", served, why)
            why = "its sampler would start from the base without the adapter; use mixture-smc"
            others = tuple(name for name, kind in OPPONENT.kinds.items() if "gflownet" in kind.uses)
            if self.selfplay.opponent in others:
                engines = Need("selfplay.opponent", ("mixture-smc",), why)
            found.append(("lora.start", (engines,)))
        if self.lora.use_rslora:
            why = (
                "sglang scales every adapter by alpha / r; without use_rslora, lora.alpha = "
                f"{self.lora.scaling * self.lora.r:g} is the same"
            )
            engines = Need("sampling.engine", ("local", "vllm"), why)
            found.append(("lora.use_rslora", (engines,)))
        if self.sampling.engine == "vllm" and self.sampling.owned:
            why = "the opponents would be those of the base in full precision"
            need = Need("train.quantization", ("none",), why)
            found.append(("sampling.engine = vllm without url", (need,)))
        if self.sampling.engine == "transformers":
            why = (
                "`transformers serve` has no adapters, so only the base can play; use local, vllm "
                "or sglang"
            )
            need = Need("selfplay.iterations", (1,), why)
            found.append(("sampling.engine = transformers", (need,)))
        return found

    def needs_local(self) -> str | None:
        """Whoever needs the local sampler."""
        every = [(who, need) for who, needs in self._needs() for need in needs]
        found = [w for w, n in every if n.key == "sampling.engine" and "vllm" not in n.values]
        quantised = self.train.quantization != "none"
        return next(iter(found), "train.quantization" if quantised else None)

    def _check(self, who: str, need: Need) -> None:
        value: Any = self
        for word in need.key.split("."):
            value = getattr(value, word)
        if value not in need.values and (need.key, value) != ("sampling.engine", "auto"):
            first = need.values[0]
            wanted = str(first).lower() if isinstance(first, bool) else first
            says = need.says or f"{need.key} = {wanted if wanted != () else 'nothing'}"
            shown = "" if need.says else f", not {short(value)}"
            raise ValueError(f"{who} needs {says}{shown}: {need.why}")

    def _refuse_unused_reference(self) -> None:
        opponent, reference = self.selfplay.opponent, self.reference
        if "ema" not in (opponent, reference.kind):
            users = {"ema_decay": ("ema",)}
            refuse_unused(reference, "reference.kind", reference.kind, users, "reference.")
        if not self.preference.judged and not self.loss.has_reference:
            keys = ["mode"] if opponent.startswith("mixture") else ["mode", "alpha", "kind"]
            others = tuple(name for name, kind in LOSS.kinds.items() if kind.has_reference)
            users = {key: others for key in keys if not (key == "kind" and opponent == "ema")}
            refuse_unused(reference, "loss.kind", self.loss.kind, users, "reference.")

    def choosing(self, names: Mapping[str, str], folder: str | None = None) -> "Config":
        """Other kinds in the place of these, unchecked, without what has no effect with them.

        Args:
            names: by the setting that chooses, as `loss.kind`: to change a recipe's.
            folder: of `module:Name`.

        Raises:
            InputError: there is no such kind.
        """
        update: dict[str, Any] = {}
        for table in TABLES:
            name = names.get(table.key, self.chosen(table))
            if name == self.chosen(table):
                continue
            try:
                update[table.section] = table.other(getattr(self, table.section), name, folder)
            except InputError as error:
                raise InputError(f"{table.key} = {name}: {error}") from None
            if table is METHOD:
                update["method"] = name
                for key in {*self.preference.uses} - {*update[table.section].uses}:
                    section, _, word = key.partition(".")
                    default = type(self).model_fields[section].default
                    if word:
                        default = self.selfplay.model_copy(
                            update={word: type(self.selfplay).model_fields[word].default}
                        )
                    update.setdefault(section, default)
        changed = self.model_copy(update=update)
        if not changed.loss.has_reference and "mixture" not in changed.selfplay.opponent:
            default = {key: ReferenceConfig.model_fields[key].default for key in ("alpha", "mode")}
            changed = changed.model_copy(
                update={"reference": self.reference.model_copy(update=default)}
            )
        return changed

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
            "sampling": {"batch_size", "url", "key_variable", "workers", *OWN_KEYS},
            "text": self.text.free(),
            "evaluate": {"show"} if self.evaluate.overlap == "drop" else {"show", "overlap"},
            "judge": {*self.judge.free, "folder"},
            **{section: {"folder"} for section in ("loss", "preference", "selfplay")},
        }
        if not self.preference.judged:
            free["judge"] = True
        if self.heldout_split is None:
            free["heldout_split"] = True
        if "gflownet" not in self.selfplay.uses:
            free["gflownet"] = True
        return self.model_dump(mode="json", exclude=free)

    def recipe(self) -> dict[str, Any]:
        """The settings as others may have them: for the report, and for what is exported."""
        here: dict[str, Any] = {"output": True, "log": True, "hints": True}
        for section in ("judge", "loss", "preference", "selfplay", "sampling"):
            here[section] = {*PRIVATE}
        return for_others(self).model_dump(mode="json", exclude=here)

    @classmethod
    def renewed(cls, identity: dict[str, Any]) -> dict[str, Any]:
        """The identity of a recorded run, perhaps of an earlier version, as this version has it.

        Raises:
            ValidationError: no settings.
        """
        return cls.model_validate(identity, context=RECORDED).identity()

    def digest(self) -> str:
        """First 8 hex digits of the hash of the identity, whose paths are spelled one way."""
        settings = self.identity()
        for section, key in PATHS:
            named = settings.get(section, {}) if section else settings
            if named.get(key):
                named[key] = from_here(named[key])
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def uses_answers(self) -> bool:
        """Whether each row must have an answer: one is trained on, or a judge compares with it."""
        return not self.preference.judged or self.judge.needs_answers or self.control == "sft"

    def sized(self, limits: Mapping[str, int]) -> "Config":
        """The settings with these limits where `text` says `auto`, in the folder of those."""
        text = self.text.sized(limits)
        if text == self.text:
            return self
        return self.model_copy(update={"text": text, "output": str(self.run_folder())})

    def run_folder(self) -> Path:
        """The run's folder: `output`, or one named after the configuration.

        Earlier versions had other settings, and so other names for one run: such a folder is found
        by its manifest.
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


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    return sorted(path.stem for path in packaged("").glob("*.yaml"))


def load_config(source: str | Path) -> Config:
    """The configuration in a packaged recipe or a YAML file.

    Raises:
        InputError: no such recipe or file, broken YAML, an unknown key or a bad value; the message
            names the file, the key, the value, and the nearest right name.
    """
    source = str(source)
    path = Path(home(source))
    if source in recipe_names():
        path = packaged(f"{source}.yaml")
    elif not (path.suffix in {".yaml", ".yml"} or path.exists()):
        near = difflib.get_close_matches(source, recipe_names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"no recipe {source!r}{hint} (recipes: {', '.join(recipe_names())})")
    file = YamlFile(path)
    try:
        return Config.model_validate({"name": path.stem, **file.content})
    except ValidationError as error:
        raise InputError(explain(error, Config, file.at)) from None
