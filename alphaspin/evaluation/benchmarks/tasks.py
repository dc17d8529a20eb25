"""Tasks of lm-evaluation-harness on the base and its adapters, in memory.

The harness's own Hugging Face model does the work (batches, windows, stop strings, whether a
continuation is greedy) on the base that is loaded already, whose rows all go to one adapter:
figures are those that `lm_eval --model hf` gives for base and adapter, comparable with published
ones. It wants the full logits, so the fused log-probs have no part in this.
"""

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphaspin.errors import InputError
from alphaspin.evaluation.benchmarks.base import Benchmark, Contest, Entrant, Record, digest
from alphaspin.foundation import console
from alphaspin.foundation.artefacts import folder_hash
from alphaspin.foundation.section import Names

if TYPE_CHECKING:
    from torch import nn

    from alphaspin.model.backbone import Backbone

DEFINITIONS = tuple(f"**/*.{kind}" for kind in ("yaml", "py", "jsonl", "json", "csv", "parquet"))
"""Files of `include_path` that results depend on."""


@contextmanager
def all_rows_under(backbone: "Backbone", adapter: str | None) -> Generator[None]:
    """Send every row of any pass of the base to one adapter, or to none, whoever makes the pass."""

    from alphaspin.model.batching import Segment

    def route(module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        backbone.route.segments = (Segment(adapter, 0, len(ids)),)

    hook = backbone._causal_lm.register_forward_pre_hook(route, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Harness:
    """The harness with the contest's base. key: hash of what results depend on, tasks and shots
    apart."""

    contest: Contest
    module: Any
    manager: Any
    model: Any
    key: str
    title: str

    @classmethod
    def of(cls, contest: Contest, tasks: Sequence[str]) -> "Harness":
        """Nothing is run yet.

        Raises:
            InputError: the harness is not installed, a task is unknown, or no folder
                `include_path`.
        """
        options, chat, backbone = contest.options, contest.chat, contest.backbone
        try:
            module: Any = import_module("lm_eval")
        except ImportError as error:
            raise InputError(
                f"lm-evaluation-harness is needed, the extra `eval`: pip install lm-eval ({error})"
            ) from None
        further = Path(options.include_path) if options.include_path else None
        if further and not further.is_dir():
            raise InputError(f"include_path = {further}: no such folder")
        manager = import_module("lm_eval.tasks").TaskManager(include_path=further)
        version: str = module.__version__
        for task in tasks:
            if not manager.match_tasks([task]):
                raise InputError(
                    f"tasks = {task}: lm-evaluation-harness {version} knows no such task"
                )
        tokenizer = copy.copy(chat.tokenizer)
        if chat.template is not None or chat.options:
            tokenizer.chat_template = chat.source
        settings = [
            (version, options.chat, tokenizer.chat_template, options.prompts),
            folder_hash(further, DEFINITIONS) if further else None,
            (backbone.identity, str(backbone.head.weight.dtype)),
        ]
        # The tasks say how long answers are; a limit that the model brings along would win.
        generation: Any = backbone._causal_lm.generation_config
        generation.max_new_tokens = None
        generation.eos_token_id = sorted(chat.stop_token_ids)
        model = import_module("lm_eval.models.huggingface").HFLM(
            backbone._causal_lm,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=options.batch_size,
        )
        title = f"lm-evaluation-harness {version}" + ", chat template" * options.chat
        title += f", the first {options.prompts} prompts of each task" * bool(options.prompts)
        return cls(contest, module, manager, model, digest(settings), title)

    def run(
        self, entrant: Entrant, tasks: Sequence[str], shots: int | None = None
    ) -> dict[str, Any]:
        """Results, versions, configurations and samples of some tasks.

        Raises:
            InputError: their data cannot be had.
        """
        console.note(f"{entrant.name}: {', '.join(tasks)}")
        adapter, options = self.contest.use(entrant), self.contest.options
        try:
            with all_rows_under(self.contest.backbone, adapter):
                found = self.module.simple_evaluate(
                    self.model,
                    tasks=list(tasks),
                    num_fewshot=shots,
                    limit=options.prompts,
                    task_manager=self.manager,
                    apply_chat_template=options.chat,
                )
        except ConnectionError as error:  # the data of a task are on the hub
            raise InputError(f"tasks = {' '.join(tasks)}: {error}") from error
        kept = ("results", "versions", "n-samples", "configs", "samples")
        return {"title": self.title, **{k: found[k] for k in kept}}


class Tasks(Benchmark):
    """Any tasks of lm-evaluation-harness, with their own shots: what `--tasks` runs."""

    kind: str = "tasks"
    judged = False
    tasks: Names
    """Names of tasks or groups."""

    def run(self, contest: Contest) -> dict[str, Record]:
        """All tasks of a policy together."""
        harness = Harness.of(contest, self.tasks)
        key = digest([harness.key, sorted(self.tasks)])
        found: dict[str, Record] = {}
        for entrant in contest.entrants:
            make = partial(harness.run, entrant, self.tasks)
            place = f"tasks-{key[:8]}/{entrant.name}"
            found[entrant.name] = contest.kept(place, entrant, key, make)
        return found
