"""The settings there are, those of all kinds among them, and what is said of wrong ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from alphaspin.evaluation.benchmarks import BENCHMARK
from alphaspin.foundation.kinds import Table
from alphaspin.foundation.section import Section, nearest, refusals
from alphaspin.judges import JUDGE
from alphaspin.losses import LOSS
from alphaspin.methods import METHOD
from alphaspin.model.settings import NOT_HERE
from alphaspin.opponents import OPPONENT

S = TypeVar("S", bound=Section)

OURS = {
    "model_name_or_path": "model",
    "dataset_name": "data (NAME:CONFIG for one of several)",
    "dataset_config": "data (NAME:CONFIG)",
    "dataset_train_split": "split",
    "dataset_test_split": "heldout_split",
    "learning_rate": "train.lr",
    "per_device_train_batch_size": "train.batch_size (of a whole step, all devices together)",
    "gradient_accumulation_steps": "train.accumulation (micro-batches of a step)",
    "max_grad_norm": "train.clip",
    "bf16": "train.dtype",
    "fp16": "train.dtype",
    "load_in_4bit": "train.quantization",
    "save_steps": "train.checkpoint_every",
    "use_liger_kernel": "train.liger",
    "loss_type": "loss.kind",
    "max_length": "text.max_response_tokens (and text.max_prompt_tokens)",
    "max_completion_length": "text.max_response_tokens",
    "num_generations": "preference.responses",
    "reward_model_path": "judge.model",
    "chat_template_path": "text.template",
    "use_vllm": "sampling.engine",
    "vllm_server_base_url": "sampling.url",
    "report_to": "log.trackers",
}
"""Options of TRL and transformers, and what they are here, where no likeness tells."""

TABLES: tuple[Table[Any], ...] = (METHOD, OPPONENT, LOSS, JUDGE)
"""Sections of a run whose settings depend on their kind."""

KINDS = (*TABLES, BENCHMARK)
"""The same, with those of the commands."""


def special(model: type[S], section: Section) -> type[S]:
    """A model whose sections have the settings of those of an instance: for its `--help`."""
    types: dict[str, Any] = {}
    for table in KINDS:
        if (value := getattr(section, table.section, None)) is None:
            continue
        kind = type(value)
        if table.field in kind.model_fields:
            said = Field(kind.model_fields[table.field].default, description=table.described())
            chosen: Any = {table.field: (str, said)}
            kind = create_model(kind.__name__, __base__=kind, __doc__=kind.__doc__, **chosen)
        types[table.section] = (kind, kind.model_construct(**dict(value)))
    return create_model(model.__name__, __base__=model, __doc__=model.__doc__, **types)


def explain(
    error: ValidationError, root: type[Section], at: Callable[[str], str] | None = None
) -> str:
    """A pydantic error in one line per key: where it stands, the key, the value, what is wanted.

    Args:
        error: its own words are not told.
        root: what was validated.
        at: the place of a key, `FILE:LINE`.
    """
    words = {word for key in all_keys(root) for word in key.split(".")}
    sections = [(table.section,) for table in KINDS]

    def name(item: Mapping[str, Any]) -> str:
        # A union reports each of its branches, tagged after the key: show the key once.
        where = item["loc"]
        own = where[1:2] if where[:1] in sections else ()  # perhaps of somebody's own kind
        return ".".join(str(part) for part in where if part in words or part in own)

    lines: list[tuple[str, str]] = []
    rest: list[Any] = []
    for item in error.errors(include_url=False):
        key = name(item)
        if item["type"] == "extra_forbidden":
            key = ".".join(map(str, item["loc"]))
            if key in NOT_HERE:
                lines.append((key, f"{key}: {NOT_HERE[key]}"))
                continue
            near = likely(key, all_keys(root))
            hint = f"; did you mean {near!r}?" * bool(near)
            if near == key:
                hint = f"; a dot stands for a section: {key.replace('.', ': {', 1)}: …}}"
            lines.append((key, f"unknown key {key!r}{hint}"))
        elif item["type"] == "missing" and isinstance(given := item["input"], Mapping):
            section = key.rpartition(".")[0]
            who = [f"{t.key} = {given.get(t.field)}" for t in KINDS if t.section == section]
            said = f"{who[0]} needs {key}" if who else f"{key}: is needed"
            lines.append((key, said if at else f"{said}, as --{key} VALUE"))
        else:
            rest.append(item)
    lines += refusals(rest, name)
    told = (f"{at(key or line.split(' = ')[0])}: {line}" if at else line for key, line in lines)
    return "\n".join(dict.fromkeys(told))


def likely(key: str, keys: Sequence[str]) -> str | None:
    """What may be meant by an unknown key, perhaps with a remark."""
    known = OURS.get(key.rpartition(".")[2], "")
    return known if known.partition(" ")[0] in keys else nearest(key, keys)


def all_fields(section: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """The fields behind `all_keys`; of a name that several kinds have, the first's."""
    kinds = {t.section: t.kinds.values() for t in KINDS if not prefix}
    fields: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        fields[prefix + name] = field
        for kind in (*kinds.get(name, ()), field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):  # also `Section | None`
                for key, found in all_fields(kind, f"{prefix}{name}.").items():
                    fields.setdefault(key, found)
    return fields


def all_keys(section: type[BaseModel]) -> list[str]:
    """Dotted names of all settings, those of all kinds where a section has several."""
    return [*all_fields(section)]
