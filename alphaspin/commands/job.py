"""One run from its configuration to `summary.json`: load, check, play, summarise."""

import contextlib
import json
import math
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin
from pydantic import ValidationError

from alphaspin import __version__
from alphaspin.commands import trackers
from alphaspin.commands.inputs import check_data, load_limited
from alphaspin.commands.sizing import choose_limits, recorded_limits, room, trained_together
from alphaspin.config import Config
from alphaspin.data.chat import ChatFormat
from alphaspin.data.demonstrations import (
    Demonstration,
    fingerprint,
)
from alphaspin.errors import InputError
from alphaspin.evaluation import measures
from alphaspin.evaluation.paired import by_prompt, chosen, kinds, paired
from alphaspin.evaluation.record import Evaluation
from alphaspin.foundation import console
from alphaspin.foundation.artefacts import commit, file_hash, stands, write_record
from alphaspin.foundation.openai_api import key_of
from alphaspin.foundation.paths import check_there
from alphaspin.foundation.runs import (
    LOST,
    Metrics,
    Run,
    SignalGuard,
    clock,
    differences,
    relocated,
)
from alphaspin.foundation.section import check_installed
from alphaspin.judges.cache import CachedJudge
from alphaspin.judges.shared import TeamJudge
from alphaspin.methods.selfplay import Callback, play, teller
from alphaspin.methods.session import Session
from alphaspin.model import varlen
from alphaspin.model.backbone import WEIGHTS, Backbone
from alphaspin.model.distributed import Team
from alphaspin.model.load import base_hash, base_of, choose_bf16, load_base
from alphaspin.model.repeatable import repeatable
from alphaspin.model.routing import POLICY, START
from alphaspin.model.scoring import ReferenceCache
from alphaspin.model.verify import Verdict, verify
from alphaspin.sampling.engine import Needs, OwnSampler, check_sharded, choose

OTHER_DAY = (
    ". The chat template prints the date, and versions before this one did not keep that of the run"
)
"""Added to an error about other tokens than a run's, where that may be the reason."""


def run(config: Config, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """The whole job of `alphaspin-train`: returns what `summary.json` holds.

    Raises:
        InputError: the model, the data or the folder cannot be used; nothing was changed.
        Interrupted: a signal came; the same call goes on from there.
        TrainingStopped: see `trainer`.
        Elsewhere: one of these was raised in another process of the job.
    """
    trackers.check(config)
    if config.train.optimizer == "adamw_8bit":
        check_installed("bitsandbytes", "train.optimizer = adamw_8bit", "quantization")
    check_there("model", config.model)
    key_of(config.sampling.key_variable, "sampling.key_variable")  # now, and not in a day
    guard, quiet = SignalGuard(), console.console.quiet
    try:
        with repeatable():
            return _run(config, guard, callbacks)
    finally:
        guard.restore()
        console.console.quiet = quiet


def is_main() -> bool:
    """Whether this process is the one that writes what is written once."""
    return PartialState().is_main_process


def disconnect() -> None:
    """Close the connections between processes, as the last thing."""
    PartialState().destroy_process_group()


def _run(config: Config, guard: SignalGuard, callbacks: Sequence[Callback]) -> dict[str, Any]:
    # Precision, accumulation and sharding are this configuration's, not those of `accelerate
    # config`. Under torchrun alone Accelerate does not look for others where there is no GPU.
    accelerator = Accelerator(
        cpu="LOCAL_RANK" in os.environ and not torch.accelerator.is_available(),
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=list(config.log.trackers) or None,
        project_dir=str(config.run_folder()),
    )
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise InputError(
            f"accelerate is configured for {accelerator.distributed_type.value}: launch plain "
            "processes, and set train.sharding = fsdp where the base must be sharded"
        )
    team = Team.of(accelerator, guard)
    console.console.quiet = not team.main
    sharded = config.train.sharding == "fsdp" and team.world_size > 1
    if sharded:
        with team.together():
            check_sharded(config.sampling, team.device, config.lora.r, config.needs_local())
    weights = team.from_main(lambda: base_hash(config.model))  # hundreds of GB, perhaps: once
    now = team.from_main(lambda: clock(config.run_folder()))
    given = config
    config = config.sized(team.from_main(lambda: recorded_limits(given.run_folder())))
    tokens = team.from_main(lambda: room(given, team.device)) if config.text.auto else None

    def load(longest: int | None) -> tuple[Backbone, Any]:
        return load_base(
            config.model,
            identity=weights,
            dtype="bf16" if choose_bf16(config.train.dtype, team.device) else "fp32",
            # A base that is to be sharded may be too large for one device.
            device=torch.device("cpu") if sharded else team.device,
            quantization=config.train.quantization,
            liger=config.train.liger,
            longest=longest,
        )

    with team.together():
        backbone, tokenizer = load(config.text.longest)
        chat = ChatFormat.of(config.text, tokenizer, backbone.stop_ids, now)
        limit = partial(
            choose_limits,
            positions=backbone.max_positions,
            tokens=tokens,
            each=trained_together(config),
        )
        config, demonstrations, heldout = load_limited(config, chat, limit)
        longest = config.text.longest
        assert longest is not None
        if backbone.pinned not in (None, longest):
            backbone, _ = load(longest)
        backbone.use_layout(config.train.layout)
        check_data(config, demonstrations, heldout)
        needed = check_lengths(config, backbone, demonstrations + heldout)
    if sharded:
        team.shard(backbone)
    found = team.from_main(lambda: (kept := Verdict.read(config.run_folder())) and asdict(kept))
    kept = Verdict(**found) if found else None
    with team.together():
        if config.train.activation_checkpointing:
            backbone.enable_activation_checkpointing()
        # What would fail in a later phase had better fail before a folder is bound to these
        # settings.
        if config.lora.start:
            backbone.start_from(Path(config.lora.start), config.lora)
        backbone.add_adapter(POLICY, config.lora, seed=config.seed, iteration=0)
        measures.checked_answers(heldout, config.evaluate.answer)
        verdict = verify(backbone, POLICY, longest=longest, kept=kept)
        if note := verdict.note():
            console.note(note)
        backbone.use_layout(config.train.layout)
        if config.reference.mode == "joint" and (problem := backbone.joint_problem()):
            raise InputError(problem)
        judged = config.preference.judged
        judge = config.judge.load(config.evaluate.answer) if judged and team.main else None
        if judge and config.judge.needs_answers:
            measures.checked_answers(demonstrations, config.evaluate.answer)
    identity = {
        "config": config.identity(),
        "base": backbone.identity,
        "dtype": str(backbone.head.weight.dtype),
        "end_tokens": sorted(chat.stop_token_ids),
        "data": fingerprint(demonstrations),
        "heldout": fingerprint(heldout),
    }
    if config.lora.start:
        identity["start"] = file_hash(Path(config.lora.start) / WEIGHTS)
    check_settings(team, identity | {"config": config.model_dump(mode="json")})
    if judge:
        identity["judge"] = judge.identity
    if plugins := config.plugins():
        identity["plugins"] = plugins
    hint = ""
    if chat.dates and now:
        identity["clock"] = now
    elif chat.dates:
        hint = OTHER_DAY
    needs = Needs(config.model, config.lora.r, needed, config.run_folder(), config.needs_local())
    engine = choose(config.sampling, chat, backbone, team, needs)
    with (
        contextlib.closing(open_run(team, config.run_folder(), identity, hint)) as folder,
        contextlib.closing(engine) if isinstance(engine, OwnSampler) else contextlib.nullcontext(),
        trackers.finishing(accelerator),
    ):
        with team.together():
            mirror = trackers.start(accelerator, config, folder) if team.main else None
        tell = teller(callbacks)
        metrics = Metrics(
            folder.path / "metrics.jsonl", mirror, folder=folder, writes=team.main, tell=tell
        )
        with team.together():
            if team.main:
                # All settings, with what the identity leaves out: the folder alone tells how to
                # go on.
                settings = given.model_dump(mode="json")
                folder.record(environment=environment(team), config=settings)
                verdict.keep(folder.path)
                if config.lora.start:
                    keep_start(folder, Path(config.lora.start))
        if config.lora.start:
            backbone.adapter_folders[START] = folder.path / "start" / "adapter"
        introduce(config, folder, backbone, chat, demonstrations, heldout, team)
        cached = CachedJudge(judge, folder.path / "verdicts") if judge else None
        session = Session(
            config,
            folder,
            backbone,
            chat,
            demonstrations,
            heldout,
            team,
            metrics,
            ReferenceCache(),
            TeamJudge.of(team, cached) if judged else None,
            engine,
        )
        rows = play(session, callbacks)

        def write() -> dict[str, Any]:
            summary = summarise(config, folder, metrics, rows, heldout, chat)
            write_record(folder.path / "summary.json", summary)
            return summary

        summary = team.from_main(write)
        if rows:
            title = f"{config.name}: held-out measures by iteration ({len(heldout)} prompts)"
            console.table(title, measures.header(judged), [measures.row(row) for row in rows])
        for kind, count in summary["trained_tokens"].items():
            console.note(f"{kind}: {count:,} response tokens that carried a gradient")
        return summary


def check_settings(team: Team, settings: dict[str, Any]) -> None:
    """Whether all processes were given the same.

    Raises:
        InputError: one that process 0 was not given.
    """
    first = team.gather(settings)[0]
    with team.together():
        for line in differences(relocated(json.loads(json.dumps(settings)), first), first):
            raise InputError(f"process {team.rank} was started with other settings: {line}")


def renewed(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity of a run, perhaps of an earlier version, with its settings as they are now."""
    try:
        return {**identity, "config": Config.renewed(identity["config"])}
    except (LookupError, ValidationError):
        return identity


def open_run(team: Team, path: Path, identity: dict[str, Any], hint: str = "") -> Run:
    """The run folder, opened by process 0 and joined by the others.

    Raises:
        InputError: as `Run`, with `hint` at its end; or a process does not see process 0's folder.
    """
    folder: Run | None = None
    with team.together():
        if team.main:
            try:
                folder = Run(path, identity, renewed)
            except InputError as error:
                raise InputError(f"{error}{hint}") from error.__cause__
            if team.world_size > 1:
                folder.share()
    owner = team.gather(folder and folder.owner)[0]
    with team.together():
        folder = folder or Run.join(path, owner)
    return folder


def keep_start(folder: Run, start: Path) -> None:
    """Copy the adapter that a run starts from into its folder.

    Raises:
        InputError: it has changed since it was read.
    """
    adapter = folder.path / "start" / "adapter"
    if not stands(adapter):
        with commit(adapter) as temporary:
            for name in (WEIGHTS, "adapter_config.json"):
                shutil.copyfile(start / name, temporary / name)
    if file_hash(adapter / WEIGHTS) != folder.manifest["identity"]["start"]:
        raise InputError(f"lora.start = {start}: changed while it was read; start again")


def check_lengths(config: Config, backbone: Backbone, demos: list[Demonstration]) -> int:
    """Tokens of the longest prompt with a full answer, for which the model must have positions.

    Raises:
        InputError: it has not, or not all tokens.
    """
    longest = max(len(demo.prompt) for demo in demos)
    needed = longest + config.text.response_limit
    if backbone.max_positions is not None and needed > backbone.max_positions:
        raise InputError(
            f"text.max_response_tokens = {config.text.max_response_tokens}: with the longest "
            f"prompt ({longest} tokens) that exceeds the model's {backbone.max_positions} positions"
        )
    highest = max(int(max(demo.prompt.max(), demo.response.max(initial=0))) for demo in demos)
    rows = backbone.head.weight.shape[0]
    if highest >= rows:
        raise InputError(
            f"model = {config.model}: its tokenizer makes token {highest}, but the model has only "
            f"{rows}; they do not belong together"
        )
    return needed


def introduce(
    config: Config,
    folder: Run,
    backbone: Backbone,
    chat: ChatFormat,
    demonstrations: list[Demonstration],
    heldout: list[Demonstration],
    team: Team,
) -> None:
    """What is about to happen, and the first demonstration in two colours."""
    console.note(
        f"run folder {folder.path} · {team.world_size} x {team.device.type} · "
        f"{len(demonstrations)} demonstrations, {len(heldout)} held out"
    )
    if config.lora.start:
        console.note(
            f"starts from {config.lora.start}, which says it is an adapter of "
            f"{base_of(Path(config.lora.start)) or 'a model without a name'}: below, the base is "
            f"{config.model} with it"
        )
    for note in backbone.notes():
        console.note(note)
    if warning := config.preference.warning(config):
        console.note(warning)
    first = demonstrations[0]
    tokenizer = chat.tokenizer
    console.sample(tokenizer.decode(first.prompt), tokenizer.decode(first.response))


def environment(team: Team) -> dict[str, str]:
    """Versions and device, for the manifest and the report."""
    device = team.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "alphaspin": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
        "device": f"{device.type} {name}".strip(),
        "threads": str(torch.get_num_threads()),
        "processes": str(team.world_size),
        **({"attention": " / ".join(ways)} if (ways := varlen.on(device)) else {}),
    }


def summarise(
    config: Config,
    folder: Run,
    metrics: Metrics,
    rows: list[Evaluation],
    heldout: list[Demonstration],
    chat: ChatFormat,
) -> dict[str, Any]:
    """What `summary.json` holds and the report shows."""
    gone = metrics.lost(folder.manifest)
    records = metrics.read(but=gone)
    seconds: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for record in records:
        kind, _, phase = record["stage"].partition("/")
        value = record.get("seconds" if kind == "time" else "tokens")
        if not isinstance(value, int | float) or not math.isfinite(value):
            continue  # a record without, or a file that was edited
        if kind == "time":
            seconds[phase] = round(seconds.get(phase, 0) + value, 3)
        else:
            tokens[kind] = tokens.get(kind, 0) + int(value)
    values = by_prompt(rows, [demo.answer for demo in heldout], config.evaluate.answer)
    known = paired(values)
    became = kinds(rows, values) if rows else []
    return {
        "name": config.name,
        "config": config.model_dump(mode="json"),
        "environment": folder.manifest["environment"],
        "adapters": folder.manifest["adapters"],
        "rows": [row.numbers() for row in rows],
        "paired": known and known.model_dump(),
        "seconds": seconds,
        "trained_tokens": tokens,
        "pairs": [
            {"iteration": r["step"]}
            | {
                k: v
                for k, v in r.items()
                if k not in ("stage", "step") and isinstance(v, int | float)
            }
            for r in records
            if r["stage"] == "pairs" and "alarm" not in r
        ],
        "alarms": [LOST.format(", ".join(gone))] * bool(gone)
        + [f"{r['stage']}: {r['alarm']}" for r in records if "alarm" in r],
        "notes": [note for note in [config.preference.warning(config)] if note],
        "samples": [
            {
                "origin": heldout[i].origin,
                "prompt": chat.tokenizer.decode(heldout[i].prompt),
                "demonstration": heldout[i].answer,
                "answers": {row.name: row.answers[i] for row in rows},
                "became": became[i],
            }
            for i in chosen(became, config.evaluate.show)
        ],
        "became": {kind: became.count(kind) for kind in ("better", "worse", "other", "same")},
    }
