"""`alphaspin gflownet`: a sampler of the exact mixture, from configuration to `summary.json`."""

import contextlib
import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from alphaspin.commands.options import GFlowNetRun
from alphaspin.commands.sizing import choose_limits, recorded_limits
from alphaspin.data.chat import ChatFormat
from alphaspin.data.demonstrations import fingerprint, load_demonstrations, within
from alphaspin.errors import InputError
from alphaspin.foundation import console
from alphaspin.foundation.artefacts import file_hash, write_atomically
from alphaspin.foundation.paths import check_there, packaged
from alphaspin.foundation.runs import Metrics, Run, SignalGuard, clock
from alphaspin.model.backbone import WEIGHTS, Backbone
from alphaspin.model.distributed import Team
from alphaspin.model.load import load_base
from alphaspin.model.repeatable import repeatable
from alphaspin.model.stepper import corrected
from alphaspin.model.verify import Verdict, verify
from alphaspin.sampling import mixture
from alphaspin.sampling.answer import Draw
from alphaspin.sampling.gflownet import Task, train_sampler

ADAPTER, SAMPLER = "previous", "sampler"


def run(config: GFlowNetRun) -> dict[str, Any]:
    """Train the sampler and compare it with token-level decoding; what `summary.json` holds.

    Raises:
        InputError: the model, the adapter, the data or the folder cannot be used.
        Interrupted: a signal came; the same call goes on from there.
        TrainingStopped: see `gflownet`.
    """
    guard = SignalGuard()
    try:
        with repeatable():
            return _run(config, guard)
    finally:
        guard.restore()


def _run(config: GFlowNetRun, guard: SignalGuard) -> dict[str, Any]:
    adapter = Path(config.adapter)
    if not (adapter / WEIGHTS).is_file():
        raise InputError(f"adapter = {config.adapter}: no {WEIGHTS} in this folder")
    check_there("model", config.model)
    accelerator = Accelerator(mixed_precision="no")
    config = config.model_copy(
        update={"text": config.text.sized(recorded_limits(Path(config.output)))}
    )
    device = accelerator.device

    def load(longest: int | None) -> tuple[Backbone, Any]:
        return load_base(config.model, dtype=config.dtype, device=device, longest=longest)

    backbone, tokenizer = load(config.text.longest)
    now = clock(Path(config.output))
    chat = ChatFormat.of(config.text, tokenizer, backbone.stop_ids, now)
    path = str(packaged("tiny/train.jsonl")) if config.data == "tiny" else config.data
    demonstrations, notes = load_demonstrations(
        path, chat, config.text, config.split, answers=False
    )
    if config.text.auto:
        text, note = choose_limits(config.text, demonstrations, positions=backbone.max_positions)
        console.note(note)
        demonstrations = within(demonstrations, text, notes)
        config = config.model_copy(update={"text": text})
    for note, count in notes.items():
        console.note(f"{config.data}: {count} {note}")
    longest = config.text.longest
    assert longest is not None
    if backbone.pinned not in (None, longest):
        backbone, _ = load(longest)
    # Conversations that share their first turns have the same prompt.
    prompts = list({demo.prompt.tobytes(): demo.prompt for demo in demonstrations}.values())
    used = prompts[: config.gflownet.prompts]
    fresh = prompts[len(used) :][: config.check_prompts] or used[: config.check_prompts]
    needed = max(map(len, prompts)) + config.text.response_limit
    if backbone.max_positions is not None and needed > backbone.max_positions:
        raise InputError(
            f"text.max_response_tokens = {config.text.max_response_tokens}: with the longest "
            f"prompt that exceeds the model's {backbone.max_positions} positions"
        )
    identity = {
        "config": config.identity(),
        "base": backbone.identity,
        "adapter": file_hash(adapter / WEIGHTS),
        "dtype": str(backbone.head.weight.dtype),
        "end_tokens": sorted(chat.stop_token_ids),
        "data": fingerprint(demonstrations),
    }
    if now and chat.dates:
        identity["clock"] = now
    backbone.load_adapter(ADAPTER, adapter)
    kept = Verdict.read(Path(config.output))
    verdict = verify(backbone, ADAPTER, longest=longest, kept=kept)
    if note := verdict.note():
        console.note(note)
    for note in backbone.notes():
        console.note(note)
    guard.check()
    with contextlib.closing(Run(Path(config.output), identity)) as folder:
        verdict.keep(folder.path)
        task = Task(
            weights={ADAPTER: config.alpha, None: 1 - config.alpha},
            prompts=used,
            cap=config.text.response_limit,
            stop_ids=chat.stop_token_ids,
            config=config.gflownet,
            seed=config.seed,
            iteration=0,
            stage="gflownet",
            folder=folder.path,
        )
        metrics = Metrics(folder.path / "metrics.jsonl")
        trained = train_sampler(backbone, task, metrics, Team(backbone.device, guard))
        backbone.load_adapter(SAMPLER, trained)
        setting = mixture.Setting(
            task.weights, config.check_answers, task.cap, task.stop_ids, batch_size=256
        )
        draws = [Draw(config.seed, 0, "check", number) for number in range(len(fresh))]
        summary: dict[str, Any] = {"prompts": len(fresh), "answers": config.check_answers}
        for name, proposal in (("token", None), ("gflownet", corrected(task.weights, SAMPLER))):
            found = mixture.independent(
                backbone, setting, fresh, draws, proposal=proposal
            ).diagnose()
            summary[name] = {
                "ess": float(found.size.mean()),
                "log_w_variance": float(found.spread.mean()),
                "log_z": found.log_z.tolist(),
            }
            console.note(f"{name}: {found.note()}")
        write_atomically(folder.path / "summary.json", json.dumps(summary, indent=1))
        return summary
