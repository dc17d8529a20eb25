"""Tasks of lm-evaluation-harness on the base and its adapters, in memory.

The harness's own Hugging Face model does the work (batches, windows, stop strings, whether a
continuation is greedy) on the base that is loaded already, whose rows all go to one adapter:
figures are those that `lm_eval --model hf` gives for base and adapter, comparable with published
ones. It wants the full logits, so the fused log-probs have no part in this.
"""

import copy
import hashlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from alphaspin.commands.options import EvaluateOptions
from alphaspin.commands.played import Played, Policy
from alphaspin.data.chat import ChatFormat
from alphaspin.errors import InputError
from alphaspin.foundation import console
from alphaspin.foundation.artefacts import commit, folder_hash, stands
from alphaspin.foundation.runs import SignalGuard
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import Segment
from alphaspin.report import page as report

LOADED = "evaluated"
DEFINITIONS = tuple(f"**/*.{kind}" for kind in ("yaml", "py", "jsonl", "json", "csv", "parquet"))
"""Files of `include_path` that results depend on."""


@contextmanager
def all_rows_under(backbone: Backbone, adapter: str | None) -> Generator[None]:
    """Send every row of any pass of the base to one adapter, or to none, whoever makes the pass."""

    def route(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        backbone.route.segments = (Segment(adapter, 0, len(ids)),)

    hook = backbone._causal_lm.register_forward_pre_hook(route, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def run(
    played: Played,
    policies: list[Policy],
    backbone: Backbone,
    chat: ChatFormat,
    options: EvaluateOptions,
    guard: SignalGuard,
) -> None:
    """Each policy on all tasks, kept in RUN/evaluation/tasks-KEY/NAME, and a table.

    Raises:
        InputError: the harness is not installed, a task is unknown, or no folder `include_path`.
        Interrupted: a signal came; finished policies are kept.
    """
    try:
        harness: Any = import_module("lm_eval")
    except ImportError as error:
        raise InputError(f"--tasks needs the extra `eval`: pip install lm-eval ({error})") from None
    further = Path(options.include_path) if options.include_path else None
    if further and not further.is_dir():
        raise InputError(f"include_path = {further}: no such folder")
    manager = import_module("lm_eval.tasks").TaskManager(include_path=further)
    version: str = harness.__version__
    for task in options.tasks:
        if not manager.match_tasks([task]):
            raise InputError(f"tasks = {task}: lm-evaluation-harness {version} knows no such task")
    tokenizer = copy.copy(chat.tokenizer)
    if chat.template is not None or chat.options:
        tokenizer.chat_template = chat.source
    settings = [
        (version, sorted(options.tasks), options.chat, tokenizer.chat_template),
        folder_hash(further, DEFINITIONS) if further else None,
        (backbone.identity, str(backbone.head.weight.dtype)),
    ]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    # The tasks say how long answers are; a limit that the model brings along would win over theirs.
    generation: Any = backbone._causal_lm.generation_config
    generation.max_new_tokens = None
    generation.eos_token_id = sorted(chat.stop_token_ids)
    model = import_module("lm_eval.models.huggingface").HFLM(
        backbone._causal_lm, backend="causal", tokenizer=tokenizer, batch_size=options.batch_size
    )
    results: dict[str, Any] = {}
    for policy in policies:
        folder = played.path / "evaluation" / f"tasks-{key}" / policy.name
        adapter = policy.adapter()
        made_of = {"policy": policy.digest or "base"}
        if not stands(folder, made_of):
            if adapter:
                backbone.load_adapter(LOADED, adapter)
            console.note(f"{policy.name}: {', '.join(options.tasks)}")
            try:
                with all_rows_under(backbone, LOADED if adapter else None):
                    found = harness.simple_evaluate(
                        model,
                        tasks=list(options.tasks),
                        task_manager=manager,
                        apply_chat_template=options.chat,
                    )
            except ConnectionError as error:  # the data of a task are on the hub
                raise InputError(f"tasks = {' '.join(options.tasks)}: {error}") from error
            kept = {k: found[k] for k in ("results", "versions", "n-samples", "configs", "samples")}
            with commit(folder, made_of) as temporary:
                text = json.dumps({"harness": version, "chat": options.chat} | kept, default=str)
                (temporary / "results.json").write_text(text, encoding="utf-8")
            guard.check()
        results[policy.name] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    title = f"{played.config.name}: lm-evaluation-harness {version}"
    console.table(title, ["task", "metric", *results], report.task_rows(results))
