"""Entry points: `alphaspin-train`, and `alphaspin` with its commands.

Exit codes: 0 done; 2 bad input, nothing changed; 3 training stopped itself; 75 stopped by SIGTERM
or Ctrl-C after saving, and the same command goes on.
"""

import itertools
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from pydantic import ValidationError

from alphaspin.commands.options import EvaluateOptions, ExportOptions, GFlowNetRun
from alphaspin.config import TABLES, Config, all_keys, explain, load_config, recipe_names, special
from alphaspin.errors import (
    EXIT_CODES,
    EXIT_OK,
    EXIT_RESUMABLE,
    EXIT_UNREAD,
    Elsewhere,
    InputError,
    exit_code,
    told,
)
from alphaspin.foundation import console
from alphaspin.foundation.paths import home, packaged
from alphaspin.foundation.section import Section, nearest
from alphaspin.judges import JUDGE

S = TypeVar("S", bound=Section)

USAGE = """\
usage: alphaspin COMMAND …

  train [RECIPE or FILE.yaml] [--KEY VALUE …]   self-play (the same as alphaspin-train)
  plan [RECIPE or FILE.yaml] [--KEY VALUE …]    what such a run will do; downloads nothing
  recipes [list | show NAME | copy NAME FILE]   the packaged recipes
  evaluate RUN [--KEY VALUE …]                  compare base and iterates, or run harness tasks
  export RUN --to FOLDER (--merge | --vllm)     write an iterate for use elsewhere
  gflownet --adapter FOLDER --output FOLDER …   train a sampler of the exact mixture with the base
  report RUN                                    write RUN/report.html afresh
  report RUN RUN … --to PAGE.html               compare runs; seeds of one setting together
  doctor                                        what is installed and which kernels will be used

`alphaspin COMMAND --help` explains every option of train, evaluate and export."""


class _TrainCommand(Config):
    """Self-play training: `alphaspin-train [RECIPE or FILE.yaml] [--KEY VALUE …]`.

    Without a recipe: `tiny`, the embedded default, or `default` where --model or --data is given.
    Settings of a loss, a judge, an opponent or a method are those of the kind that is chosen.
    """

    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print what the run will do (prompts, tokens, steps, memory, disk) and stop. Downloads
    nothing."""


def parse(arguments: Sequence[str]) -> tuple[Config, bool]:
    """The configuration of a command line, and whether only the plan is wanted.

    Raises:
        InputError: a bad key or value, in the recipe or on the command line.
    """
    rest = list(arguments)
    if rest and not rest[0].startswith("-"):
        source = rest.pop(0)
    else:
        own = any(a.split("=")[0] in {"--model", "--data"} for a in rest)
        source = "default" if own else "tiny"
    given = _given(rest)
    recipe = load_config(source)
    chosen = {table.key: given[table.key] for table in TABLES if table.key in given}
    start = recipe.choosing(chosen)
    kind = special(_TrainCommand, start)
    _check_keys(kind, rest, start)
    default = _unset(kind, start, plan=False)
    command = _parsed(kind, default, "alphaspin-train [RECIPE or FILE.yaml]", rest)
    # tyro builds sections one by one; this checks them together, the defaults included.
    fields = command.model_dump(exclude={"plan"})
    if (command.model, command.data) != (recipe.model, recipe.data):
        fields["hints"] = None  # they are facts about the recipe's own model and data
    try:
        return Config.model_validate(fields), command.plan
    except ValidationError as error:
        raise InputError(explain(error)) from None


def _given(arguments: Sequence[str]) -> dict[str, str]:
    """Keys and values of a command line, as far as plain text tells."""
    words = [word for a in arguments for word in (a.split("=", 1) if a[:2] == "--" else [a])]
    pairs = itertools.pairwise(words)
    return {k.removeprefix("--").replace("-", "_"): v for k, v in pairs if k.startswith("--")}


def _unset(kind: type[S], start: Section, **more: Any) -> S:
    """An instance with a section's values; what has none is asked for on the command line."""

    def values(section: Section) -> dict[str, Any]:
        return {name: getattr(section, name, tyro.MISSING) for name in type(section).model_fields}

    found = values(start)
    for table in TABLES:
        if isinstance(section := found.get(table.section), Section):
            own: Any = kind.model_fields[table.section].annotation
            found[table.section] = own.model_construct(**values(section))
    return kind.model_construct(**found, **more)


def _parsed(kind: type[S], default: Any, program: str, arguments: Sequence[str]) -> S:
    """A command's options; `default` is an instance, or None where some have no default.

    Raises:
        InputError: a bad value.
    """
    try:
        return tyro.cli(
            kind,
            prog=program,
            default=default,
            args=list(arguments),
            use_underscores=True,
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValidationError as error:
        raise InputError(explain(error, kind)) from None


def _check_keys(
    kind: type[Section], arguments: Sequence[str], start: Section | None = None
) -> None:
    """Unknown options, each with the nearest right one; settings of another kind than chosen."""
    known = [*(keys := all_keys(kind)), "help"]
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        key, _, value = argument.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        plain = ".".join(part.removeprefix("no_") for part in key.split("."))
        if not {key, plain} & {*known}:
            near = nearest(key, keys)
            hint = f"; did you mean --{near}?" if near else "; see --help"
            raise InputError(f"unknown option {argument!r}{hint}")
        section, _, name = plain.rpartition(".")
        for table in TABLES:
            own: Any = getattr(start, table.section, None)
            if own and section == table.section and name not in type(own).model_fields:
                chosen = start.chosen(table) if isinstance(start, Config) else own.kind
                raise InputError(
                    table.without_effect(name, value or _given(arguments).get(key), chosen)
                )


def _train(arguments: Sequence[str]) -> None:
    config, plan_only = parse(arguments)
    if plan_only:
        _plan(config)
        return
    from alphaspin import api
    from alphaspin.commands import job

    result = api.play(config)
    if job.is_main():
        console.note(f"report: {result.path / 'report.html'}")
    job.disconnect()


def _plan(config: Config) -> None:
    from alphaspin.commands import plan

    plan.show(config)


def _alone(command: str) -> None:
    """Refuse several processes, which would want the same folder and do the same work."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"alphaspin {command} runs in one process, on one device: start it without torchrun or "
            "accelerate launch"
        )


def _gflownet(arguments: Sequence[str]) -> None:
    _alone("gflownet")
    _check_keys(GFlowNetRun, arguments)
    config = _parsed(GFlowNetRun, None, "alphaspin gflownet", arguments)
    from alphaspin.commands import gflownet_job

    gflownet_job.run(config)


def _recipes(arguments: Sequence[str]) -> None:
    match list(arguments):
        case [] | ["list"]:
            for name in recipe_names():
                first = packaged(f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
                console.text(f"{name:<24}{first.lstrip('# ')}")
        case ["show", name]:
            load_config(name)
            print(packaged(f"{name}.yaml").read_text(encoding="utf-8"), end="")
        case ["copy", name, target]:
            load_config(name)
            if Path(home(target)).exists():
                raise InputError(f"{target} exists already")
            shutil.copyfile(packaged(f"{name}.yaml"), home(target))
        case _:
            raise InputError("usage: alphaspin recipes [list | show NAME | copy NAME FILE]")


def _run_and_options(
    command: str, kind: type[Section], arguments: Sequence[str]
) -> tuple[Path, list[str]]:
    """RUN and the rest of a command's arguments; `--help` alone prints the options."""
    _alone(command)
    if "--help" in arguments or "-h" in arguments:
        _parsed(kind, None, f"alphaspin {command} RUN", ["--help"])
    if not arguments or arguments[0].startswith("-"):
        raise InputError(f"usage: alphaspin {command} RUN [--KEY VALUE …]")
    return Path(home(arguments[0])), list(arguments[1:])


def _evaluate(arguments: Sequence[str]) -> None:
    path, rest = _run_and_options("evaluate", EvaluateOptions, arguments)
    from alphaspin.commands import compare
    from alphaspin.commands.played import Played

    played = Played.open(path)
    judge = played.config.judge
    given = _given(rest)
    if "judge.kind" in given and given["judge.kind"] != judge.kind:
        judge = JUDGE.other(judge, given["judge.kind"])
        judge = type(judge).model_construct()  # nothing of the run's judge
    elif "judge.function" in given:  # one of the working directory, as in training
        judge = judge.model_copy(update={"folder": os.getcwd()})
    start = EvaluateOptions.model_construct(judge=judge)
    kind = special(EvaluateOptions, start)
    _check_keys(kind, rest, start)
    parsed = _parsed(kind, _unset(kind, start), "alphaspin evaluate RUN", rest)
    options = EvaluateOptions.model_validate(parsed.model_dump())
    compare.run(played.moved(options), options)


def _export(arguments: Sequence[str]) -> None:
    path, rest = _run_and_options("export", ExportOptions, arguments)
    options = _parsed(ExportOptions, None, "alphaspin export RUN", rest)
    from alphaspin import api

    api.export(path, **options.model_dump())


def _report(arguments: Sequence[str]) -> None:
    from alphaspin.report import overview
    from alphaspin.report import page as report

    match arguments:
        case [run] if not run.startswith("-"):
            page = report.write(Path(home(run)))
        case [*runs, "--to", page] if runs:
            page = overview.write([Path(home(run)) for run in runs], Path(home(page)))
        case _:
            raise InputError("usage: alphaspin report RUN, or RUN RUN … --to PAGE.html")
    console.note(f"report: {page}")


def _doctor(arguments: Sequence[str]) -> None:
    from alphaspin.commands import doctor

    if arguments:
        raise InputError("usage: alphaspin doctor")
    doctor.show()


def _command(arguments: Sequence[str]) -> None:
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "train": _train,
        "plan": lambda rest: _train([*rest, "--plan"]),
        "gflownet": _gflownet,
        "recipes": _recipes,
        "evaluate": _evaluate,
        "export": _export,
        "report": _report,
        "doctor": _doctor,
    }
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(USAGE)
        return
    if arguments[0] not in commands:
        raise InputError(f"no command {arguments[0]!r}\n{USAGE}")
    commands[arguments[0]](arguments[1:])


def _guarded(body: Callable[[Sequence[str]], None]) -> int:
    """Run a command; errors that a person can put right become one message and an exit code."""
    # One deterministic cuBLAS workspace; must be set before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")
    # Deprecations between transformers and PEFT are for them to settle.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    for stream in (sys.stdout, sys.stderr):
        console.forgive(stream)
    try:
        body(sys.argv[1:])
        sys.stdout.flush()
        return EXIT_OK
    except KeyboardInterrupt:
        return _fail("stopped before the run began", EXIT_RESUMABLE)
    except BrokenPipeError:  # nobody reads any more, as behind `| head`
        console.silence(sys.stdout)
        return EXIT_UNREAD
    except Elsewhere as error:  # the process that failed says why
        return error.code
    except tuple(EXIT_CODES) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise
        return _fail(told(error), exit_code(error))


def _fail(message: str, code: int) -> int:
    console.error(message)
    return code


def train() -> None:
    """Entry point `alphaspin-train`."""
    sys.exit(_guarded(_train))


def main() -> None:
    """Entry point `alphaspin`."""
    sys.exit(_guarded(_command))


if __name__ == "__main__":
    main()
