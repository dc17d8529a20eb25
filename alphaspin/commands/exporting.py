"""`alphaspin export RUN`: an iterate for use elsewhere, with a card that tells its lineage."""

import contextlib
import copy
import html
import json
import math
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
import yaml
from huggingface_hub import ModelCardData
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from alphaspin.commands import hub
from alphaspin.commands.options import ExportOptions
from alphaspin.commands.played import Played, Policy
from alphaspin.config import Config
from alphaspin.data.chat import ChatFormat
from alphaspin.data.files import is_file
from alphaspin.errors import InputError
from alphaspin.evaluation import measures
from alphaspin.evaluation.record import Evaluation
from alphaspin.foundation import console
from alphaspin.foundation.artefacts import commit, stands
from alphaspin.foundation.paths import for_others, published
from alphaspin.model.backbone import WEIGHTS
from alphaspin.report.page import describe, read_about, read_tasks

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `--max-lora-rank` (vllm/config/lora.py, 0.11 to 0.27)."""


def run(played: Played, options: ExportOptions) -> None:
    """Write the folder, and upload it where `push` says.

    Raises:
        InputError: the folder exists; the iteration, the base, the adapter or the repository cannot
            be used.
    """
    if options.to and os.path.lexists(options.to):
        raise InputError(f"to = {options.to}: exists already")
    wanted = None if options.iteration is None else [options.iteration]
    iterates = [policy for policy in played.policies(wanted) if policy.name.isdecimal()]
    if not iterates:
        raise InputError(f"{played.path}: no iteration is finished yet")
    policy = iterates[-1]
    adapter = policy.adapter()
    assert adapter
    if options.vllm and (reason := _not_for_vllm(played.config)):
        raise InputError(f"{reason}; take --merge")
    repository = hub.create(options.push, options.private) if options.push else ""
    backbone, chat = played.load(torch.device("cpu"), whole=True)
    base = backbone.path
    del backbone  # it was wanted for its checks; merging holds one copy of the weights
    license = {"license": options.license} if options.license else hub.license_of(base)
    if not license:
        console.note("no license of the base is known: --license names it in the card")
    with contextlib.ExitStack() as stack:
        target = Path(options.to or stack.enter_context(tempfile.TemporaryDirectory()) + "/policy")
        with commit(target) as folder:
            if options.merge:
                form = _write_merged(base, adapter, chat, folder)
            else:
                form = _write_adapter(played, adapter, folder)
            if played.config.train.quantization != "none":
                form += "; it was trained beside that base rounded to 4 bits, so scores will differ"
            tokenizer = chat.tokenizer
            if chat.template is not None or chat.options:  # not always the tokenizer's own
                tokenizer.chat_template = chat.source  # what was trained with
            tokenizer.save_pretrained(folder)
            name = repository or target.absolute().name
            card = _card(played, policy, name, options.merge, form, license)
            (folder / "README.md").write_text(card, encoding="utf-8")
        of = f"iteration {policy.name} of {played.path}"
        if options.to:
            console.note(f"{of} is in {target}: {form}")
        if repository:
            message = f"Iteration {policy.name} of {played.config.name}"
            try:
                address = hub.upload(repository, target, message)
            except InputError as error:
                rest = f"; {target} is whole: hf upload {repository} {target}" if options.to else ""
                raise InputError(f"{error}{rest}") from error
            console.note(f"{of} is on the hub: {address}")


def _write_merged(base: str, adapter: Path, chat: ChatFormat, folder: Path) -> str:
    """W + (alpha/r) B A of each adapted layer, added in fp32, in the base's own precision.

    Returns:
        What was written. The precision matters where updates are small: bf16 has 8 bits, so the
        part of an update below 1/512 of a weight is lost. ‖rounded - exact‖ / ‖update‖ says how
        much.
    """
    load = cast(Any, AutoModelForCausalLM.from_pretrained)
    model = cast(
        PreTrainedModel,
        load(base, dtype="auto", use_safetensors=True, trust_remote_code=False),
    )
    adapted = PeftModel.from_pretrained(model, str(adapter))
    lost = moved = 0.0
    for layer in [m for m in adapted.modules() if isinstance(m, LoraLinear | ParamWrapper)]:
        update, weight = _update(layer), _weight(layer)
        exact = weight.data.float() + update
        weight.data = exact.to(weight.dtype)
        lost += float((weight.data.float() - exact).square().sum())
        moved += float(update.square().sum())
    model = cast(PreTrainedModel, adapted.unload())
    stops: Any = sorted(chat.stop_token_ids)  # generation stops where the run's did
    model.generation_config.eos_token_id = stops
    model.generation_config, left_out = writable(model.generation_config)
    if left_out:
        console.note(f"generation_config.json: left out {', '.join(left_out)}, which do not fit")
    model.save_pretrained(folder)
    form = f"the base's weights with the adapter added, in {str(model.dtype).split('.')[1]}"
    if not lost:
        return form
    return (
        f"{form}; rounding changes the update by {100 * math.sqrt(lost / moved):.2g} % of its norm"
    )


def _weight(layer: LoraLinear | ParamWrapper) -> Tensor:
    """What a PEFT layer's adapter is added to."""
    if isinstance(layer, ParamWrapper):
        return layer.get_param()
    return cast(nn.Linear, layer.get_base_layer()).weight


def _update(layer: LoraLinear | ParamWrapper) -> Tensor:
    """(alpha/r) B A in fp32, in the shape of the weight; PEFT's would have the weight's precision.

    Of a parameter of E experts A is [E r, in] and B [out, r E], the experts' ranks interleaved.
    """
    (name,) = layer.lora_A
    down, up = (cast(nn.Linear, side[name]).weight.float() for side in (layer.lora_A, layer.lora_B))
    scaling = cast(float, layer.scaling[name])
    if isinstance(layer, LoraLinear):
        update = up @ down * scaling
        return update.T if layer.fan_in_fan_out else update
    down_ERI, up_ORE = (
        down.unflatten(0, (layer.num_experts, -1)),
        up.unflatten(1, (-1, layer.num_experts)),
    )
    update_EOI = torch.einsum("ore,eri->eoi", up_ORE, down_ERI) * scaling
    weight = layer.get_param()
    if weight.ndim == 2:
        return update_EOI[0]
    # Where experts are held [E, in, out] (gpt-oss), PEFT's layer knows.
    return update_EOI if layer._did_swap_in_out_features else update_EOI.mT


def writable(settings: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """The settings without those that transformers reads but refuses to write.

    Sampling values beside `do_sample: false`, as many published bases have them, have no effect on
    `generate`: what it does stays the same without them.

    Returns:
        The settings, and what was left out, as `key = value`.
    """

    def fits(tried: GenerationConfig) -> bool:
        try:
            tried.validate(strict=True)
        except (ValueError, TypeError):
            return False
        return True

    if fits(settings):
        return settings, []
    kept, left_out = GenerationConfig(), list[str]()
    # Whether a value fits may depend on these.
    first = ("do_sample", "num_beams", "use_cache")
    for key in sorted(settings.to_diff_dict(), key=lambda key: (key not in first, key)):
        tried, value = copy.deepcopy(kept), getattr(settings, key)
        setattr(tried, key, value)
        if fits(tried):
            kept = tried
        else:
            left_out.append(f"{key} = {value!r}")
    return kept, left_out


def _write_adapter(played: Played, adapter: Path, folder: Path) -> str:
    """PEFT's files as vLLM reads them (vllm/lora/peft_helper.py, lora_model.py).

    It wants tensors named base_model.model.….lora_A.weight, `r`, `lora_alpha` and a list of
    `target_modules`; no bias, no `modules_to_save`, no DoRA, no adapter on embeddings or head.
    """
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    if config["bias"] != "none" or config["modules_to_save"] or config["use_dora"]:
        raise InputError(f"{adapter}: is no plain LoRA adapter (bias, modules_to_save or DoRA)")
    config["base_model_name_or_path"] = published(played.config.model)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    shutil.copyfile(adapter / WEIGHTS, folder / WEIGHTS)
    return "a LoRA adapter in PEFT's format, for PEFT and vLLM"


def _not_for_vllm(config: Config) -> str:
    """Why vLLM cannot serve the adapter, or nothing."""
    lora = config.lora
    if lora.r > max(VLLM_RANKS):
        return f"lora.r = {lora.r}: vLLM serves ranks up to {max(VLLM_RANKS)}"
    return "lora.target_parameters: vLLM reads no such adapters" if lora.target_parameters else ""


def _card(
    played: Played,
    policy: Policy,
    name: str,
    merged: bool,
    form: str,
    license: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The model card: metadata for the hub, what was done, how to load it, how it did.

    Args:
        played: the run.
        policy: the iterate.
        name: what the folder or the repository is called.
        merged: whether it is the base's weights with the adapter added.
        form: what was written, in words.
        license: the hub's fields about it; that of the base where it is empty.
    """
    config, manifest = for_others(played.config), played.manifest
    base = _id(played.config.model)
    data = ModelCardData(
        base_model=base,
        base_model_relation=base and ("finetune" if merged else "adapter"),
        datasets=_id(played.config.data.partition(":")[0]),
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["alphaspin", "self-play", config.method.replace("_", "-"), *["lora"] * (not merged)],
        **license,
    )
    identity = manifest["identity"]
    lineage = [
        ("base", config.model, identity["base"]),
        *((("first adapter", config.lora.start, identity["start"]),) if config.lora.start else ()),
        ("demonstrations", config.data, identity["data"]),
        ("held-out prompts", config.heldout or "set aside from them", identity["heldout"]),
        *((f"adapter {stage}", "", digest) for stage, digest in manifest["adapters"].items()),
    ]
    settings = yaml.safe_dump(config.recipe(), sort_keys=False, allow_unicode=True)
    fence = "`" * (2 + max(map(len, re.findall("`+", settings)), default=1))
    versions = ", ".join(f"{name} {value}" for name, value in manifest["environment"].items())
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {config.name}, iteration {policy.name}",
        html.escape(describe(config), quote=False),
        f"These files are {form}.",
        _usage(config, name, merged),
        "## Lineage",
        _table(["what", "from", "SHA-256"], [[a, b, f"`{c}`"] for a, b, c in lineage]),
        f"Made with {versions}.",
        f"License: {license['license']}." if license else "The license is that of the base.",
        "## Settings",
        "The recipe, for `alphaspin-train`:",
        f"{fence}yaml\n{settings}{fence}",
        *_evaluations(played),
    ]
    return "\n\n".join(parts) + "\n"


def _id(source: str) -> str | None:
    """A model's or data set's id on the hub; nothing where it is from elsewhere.

    Runs of earlier versions have relative paths, of which those that cannot be ids are told.
    """
    name = published(source)
    if source == "tiny" or (Path(source).is_absolute() and "/" not in name):
        return None
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not is_file(name) else None


def _usage(config: Config, name: str, merged: bool) -> str:
    """How to load it, where the base is at hand."""
    if merged:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({name!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
        ]
        return "```python\n" + "\n".join(lines) + "\n```"
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({config.model!r})",
        f"model = PeftModel.from_pretrained(base, {name!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
    ]
    usage = "```python\n" + "\n".join(lines) + "\n```"
    if _not_for_vllm(config):
        return usage
    rank = min(rank for rank in VLLM_RANKS if rank >= config.lora.r)
    base, quoted = shlex.quote(config.model), shlex.quote(name)
    command = (
        f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules "
        f"{shlex.quote(name.split('/')[-1])}={quoted} --tokenizer {quoted}"
    )
    return f"{usage}\n\n```sh\n{command}\n```"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [[_cell(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    """A text of others, as a text in Markdown that may hold HTML."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _evaluations(played: Played) -> list[str]:
    """The run's own table, then those of `alphaspin evaluate`."""
    own = {policy.name: policy.folder / "evaluation" for policy in played.policies()}
    sets = [("Held-out measures", own)]
    for folder in sorted((played.path / "evaluation").glob("heldout-*")):
        if not (about := read_about(folder)):
            continue
        source, judge = _cell(published(about["heldout"])), _cell(about["judge"])
        title = f"{about['prompts']} prompts ({source}), judge {judge}"
        sets.append((title, {name: folder / name for name in own}))
    parts: list[str] = []
    for title, folders in sets:
        rows = [
            Evaluation.load(folder / "evaluation.json")
            for folder in folders.values()
            if stands(folder, otherwise="left out")
        ]
        if rows:
            judged = any(row.judge for row in rows)
            tables = [_table(measures.header(judged), [measures.row(row) for row in rows])]
            if judged:
                tables.append(_table(measures.COMPARED, [measures.comparison(row) for row in rows]))
            if tables[-1] not in parts:  # the run's own judge gives the run's own table
                parts += [f"## {title}", *tables]
    for tasks in read_tasks(played.path):
        header = ["task", "metric", *tasks.names]
        parts += [f"## {_cell(tasks.title)}", _table(header, tasks.rows)]
        parts += [f"- {_cell(note)}" for note in tasks.notes]
    return [*parts, "± is one standard error, brackets are 95 % intervals."] if parts else []
