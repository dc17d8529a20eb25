"""The commands as functions, for scripts and notebooks.

    from alphaspin import Callback, load_config, play

    class Print(Callback):
        def on_step(self, stage, step, values):
            print(stage, step, values)

    run = play(load_config("tiny"), callbacks=[Print()])
    run.table[-1].nll, run.adapters[-1], pandas.DataFrame(run.metrics)

A call with the same configuration goes on with the run where it stopped, as the commands do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from alphaspin.commands import compare, exporting, job
from alphaspin.commands.options import EvaluateOptions, ExportOptions
from alphaspin.commands.played import Played
from alphaspin.config import Config
from alphaspin.errors import InputError
from alphaspin.evaluation.record import Evaluation
from alphaspin.foundation.paths import home
from alphaspin.foundation.runs import Metrics
from alphaspin.foundation.section import Section
from alphaspin.methods.selfplay import Callback
from alphaspin.report import page as report
from alphaspin.schema import explain

S = TypeVar("S", bound=Section)

__all__ = ["Callback", "Result", "evaluate", "export", "play"]


@dataclass(frozen=True)
class Result:
    """A finished run.

    path: its folder, with `report.html`. table: evaluations of the base, the iterates and the
    control, in this order. adapters: the iterates' folders, in PEFT's format. metrics: what was
    recorded, a dict for each step and phase. summary: what `summary.json` holds.
    """

    path: Path
    config: Config
    table: list[Evaluation]
    adapters: list[Path]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]


def play(config: Config | Mapping[str, Any], *, callbacks: Sequence[Callback] = ()) -> Result:
    """Self-play as `alphaspin-train` does it; goes on with the run where it stopped.

    Args:
        config: or its settings as nested dicts, as in a recipe.
        callbacks: are told what happens, in process 0.

    Raises:
        InputError: a setting, the model, the data or the folder cannot be used.
        Interrupted: a signal came; the same call goes on from there.
        TrainingStopped: the loss or the gradient is not finite.
    """
    settings = config if isinstance(config, Config) else _checked(Config, config)
    summary = job.run(settings, callbacks)
    path = settings.run_folder()
    if job.is_main():
        report.write(path)
    policies = Played.open(path).policies()
    files = [policy.folder / "evaluation" / "evaluation.json" for policy in policies]
    return Result(
        path,
        settings,
        [Evaluation.load(file) for file in files if file.is_file()],
        [policy.folder / "adapter" for policy in policies if policy.name.isdecimal()],
        Metrics(path / "metrics.jsonl").read(),
        summary,
    )


def evaluate(run: str | Path, **options: Any) -> list[Evaluation]:
    """Compare the policies of a run folder, as `alphaspin evaluate` does.

    Args:
        run: its folder.
        options: those of the command (`EvaluateOptions`); without `judge` the run's own.

    Returns:
        Evaluations of the base, the iterates and the control; none for a benchmark, whose results
        are kept in the folder.

    Raises:
        InputError: an option, a policy, the data, the judge or a task cannot be used.
    """
    played = Played.open(Path(home(str(run))))
    options = {"judge": played.config.judge, **options}
    chosen = _checked(EvaluateOptions, options)
    return compare.run(played.moved(chosen), chosen)


def export(run: str | Path, to: str | Path | None = None, **options: Any) -> Path | None:
    """Write a policy for use elsewhere, as `alphaspin export` does.

    Args:
        run: the run's folder.
        to: the folder to write, which must not exist; without it, `push` is needed.
        options: those of the command (`ExportOptions`): `push`, `private`, `license`, `merge` or
            `vllm`, `iteration`, `model`.

    Returns:
        The folder; None where it was only pushed.

    Raises:
        InputError: an option, the iteration, the base, the adapter or the hub cannot be used.
    """
    chosen = _checked(ExportOptions, {"to": str(to) if to else None, **options})
    exporting.run(Played.open(Path(home(str(run)))).moved(chosen), chosen)
    return Path(chosen.to) if chosen.to else None


def _checked(kind: type[S], settings: Mapping[str, Any]) -> S:
    try:
        return kind.model_validate(dict(settings))
    except ValidationError as error:
        raise InputError(explain(error, kind)) from None
