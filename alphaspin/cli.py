"""Entry points: `alphaspin-train`, and `alphaspin` with its commands.

Exit codes: 0 done; 2 bad input or unreadable files; 3 training stopped itself, or a judge or server
failed; 75 stopped by SIGTERM or Ctrl-C after saving, and the same command goes on.
"""

import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro
from pydantic import ValidationError

from alphaspin import __version__
from alphaspin.commands import arguments
from alphaspin.commands.options import EvaluateOptions, ExportOptions, GFlowNetRun
from alphaspin.config import Config, load_config, recipe_names
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
from alphaspin.evaluation.benchmarks import BENCHMARK
from alphaspin.foundation import console
from alphaspin.foundation.gpus import HERE, Target, find_gpu
from alphaspin.foundation.paths import home, packaged
from alphaspin.foundation.section import PositiveInt, Section
from alphaspin.judges import JUDGE
from alphaspin.schema import TABLES, explain, special

S = TypeVar("S", bound=Section)

USAGE = """\
usage: alphaspin COMMAND …

  train [RECIPE or FILE.yaml] [--KEY VALUE …]   self-play (the same as alphaspin-train)
  plan [RECIPE or FILE.yaml] [--KEY VALUE …]    what such a run will do; downloads nothing
  init FILE.yaml --model M --data F [--KEY …]   write a recipe for them, after a look at both
  recipes [list | show NAME | copy NAME FILE]   the packaged recipes
  evaluate RUN [--KEY VALUE …]                  compare base and iterates, or run a benchmark
  export RUN (--to FOLDER | --push NAME)        write an iterate for use elsewhere, or to the hub
  gflownet --adapter FOLDER --output FOLDER …   train a sampler of the exact mixture with the base
  report RUN                                    write RUN/report.html afresh
  report RUN RUN … --to PAGE.html               compare runs; seeds of one setting together
  doctor [--short]                              what is installed and which kernels will be used;
                                                short: a block for a bug report
  completion bash|zsh|fish [alphaspin-train]    a script that lets the shell complete words
  --version                                     of alphaspin

`alphaspin COMMAND --help` explains the options; of train, `--help-all` has every one."""


FIRST = [
    *("model", "data", "output", "method", "control", "selfplay.iterations", "selfplay.prompts"),
    *("text.max_response_tokens", "train.lr", "train.batch_size"),
]
"""The options of a first run."""

FIRST_HELP = """\
usage: alphaspin-train [RECIPE or FILE.yaml] [--KEY VALUE …]

Self-play training on demonstrations, by a recipe (`alphaspin recipes` lists them) and what is
changed of it. `--plan` says what a run will do, `--help-all` has all options."""


class _TrainCommand(Config):
    """Self-play training: `alphaspin-train [RECIPE or FILE.yaml] [--KEY VALUE …]`.

    Without a recipe: `tiny`, the embedded default, or `default` where --model or --data is given.
    Settings of a loss, a judge, an opponent or a method are those of the kind that is chosen.
    """

    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print what the run will do (prompts, tokens, steps, memory, disk, time) and stop. Downloads
    nothing."""
    gpu: str | None = None
    """With `--plan`: for this GPU (a100, h100, h200, b200) instead of the machine here."""
    gpus: PositiveInt = 1
    """With `--plan --gpu`: how many of them."""


def parse(words: Sequence[str]) -> tuple[Config, Target | None]:
    """The configuration of a command line and, if only the plan is wanted, for what.

    Raises:
        InputError: a bad key or value, in the recipe or on the command line.
    """
    rest = list(words)
    if rest and not rest[0].startswith("-"):
        source = rest.pop(0)
    else:
        own = any(a.split("=")[0] in {"--model", "--data"} for a in rest)
        source = "default" if own else "tiny"
    recipe = load_config(source)
    own_kinds = {table.key: arguments.given(rest, table.key) for table in TABLES}
    start = recipe.choosing({key: name for key, name in own_kinds.items() if name})
    kind = special(_TrainCommand, start)
    if "--help-all" in rest:
        default = _unset(kind, start, plan=False, gpu=None, gpus=1)
        _help(kind, default, "alphaspin-train [RECIPE or FILE.yaml]")
    if arguments.is_help(rest):
        _first_help(kind, start)
    changes = arguments.read(kind, rest, start)
    target = _target(changes)
    values = start.model_dump()
    if changes.get("lora", {}).get("start"):  # whose form gives way to that of the adapter
        values["lora"] = {"dropout": values["lora"]["dropout"]}
    config = _checked(Config, arguments.merged(values, changes))
    # Hints are facts about the recipe's own model and data, and so is its split.
    if (config.model, config.data) != (recipe.model, recipe.data) and "hints" not in changes:
        config = config.model_copy(update={"hints": None})
    if config.data != recipe.data and "split" not in changes:
        config = config.model_copy(update={"split": Config.model_fields["split"].default})
    return config, target


def _target(changes: dict[str, Any]) -> Target | None:
    """What the plan is for, of options that are no settings; None where none is wanted."""
    plan, gpu, gpus = (changes.pop(key, None) for key in ("plan", "gpu", "gpus"))
    if not plan and (gpu or gpus):
        raise InputError(f"--{'gpu' if gpu else 'gpus'} has no effect without --plan")
    if gpus and not gpu:
        raise InputError("--gpus has no effect without --gpu")
    if gpus and not (str(gpus).isdecimal() and int(gpus) > 0):
        raise InputError(f"--gpus = {gpus}: is no number of GPUs")
    if not plan:
        return None
    return Target(find_gpu(gpu), gpu.lower(), int(gpus or 1)) if gpu else HERE


def _checked(kind: type[S], values: dict[str, Any]) -> S:
    """A section of these values.

    Raises:
        InputError: a bad value, or some that do not go together.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(explain(error, kind)) from None


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


def _first_help(kind: type[Section], start: Config) -> NoReturn:
    """Print what a first run needs, and what can be set of the kinds that are chosen."""
    fields = arguments.fields(kind)
    parts = {"A first run": [*FIRST]}
    for table in TABLES:
        keys = [key for key in fields if key.startswith(f"{table.section}.") and key not in FIRST]
        of_use = {"preference", "judge" if start.preference.judged else "loss"}
        if table.section in of_use and keys:
            parts[f"{table.key} = {start.chosen(table)}"] = keys
    console.text(FIRST_HELP)
    for title, keys in parts.items():
        console.text(f"\n{title}")
        for key in keys:
            section, _, name = key.rpartition(".")
            value = getattr(getattr(start, section) if section else start, name, None)
            meaning = " ".join((fields[key].description or "").split())
            values = value if isinstance(value, tuple) else [value]
            console.text(f"  --{key} ({' '.join(map(str, values))})")
            for line in textwrap.wrap(meaning, 90):
                console.text(f"      {line}")
    raise SystemExit(0)


def _help(kind: type[Section], default: Any, program: str) -> NoReturn:
    """Print a command's options; `default` is an instance, or None where some have no default."""
    tyro.cli(
        kind,
        prog=program,
        default=default,
        args=["--help"],
        use_underscores=True,
        config=(tyro.conf.AvoidSubcommands,),
    )
    raise SystemExit(0)


def _train(words: Sequence[str]) -> None:
    config, target = parse(words)
    if target:
        _plan(config, target)
        return
    from alphaspin import api
    from alphaspin.commands import job

    result = api.play(config)
    if job.is_main():
        console.note(f"report: {result.path / 'report.html'}")
    job.disconnect()


def _plan(config: Config, target: Target) -> None:
    from alphaspin.commands import plan

    plan.show(config, target)


def _init(words: Sequence[str]) -> None:
    _alone("init")
    if not arguments.is_help(words) and (not words or words[0].startswith("-")):
        _usage("alphaspin init FILE.yaml --model M --data F [--KEY VALUE …]", words)
    config, _ = parse(words[not arguments.is_help(words) :])
    from alphaspin.commands import initial

    initial.write(config, Path(home(words[0])), FIRST)


def _completion(words: Sequence[str]) -> None:
    from alphaspin.commands import completion

    if arguments.is_help(words):
        _usage(completion.USAGE, words)
    completion.show(words, dict.fromkeys(_COMMANDS) | _OPTIONS)


def _alone(command: str) -> None:
    """Refuse several processes, which would want the same folder and do the same work."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"alphaspin {command} runs in one process, on one device: start it without torchrun or "
            "accelerate launch"
        )


def _gflownet(words: Sequence[str]) -> None:
    _alone("gflownet")
    if arguments.is_help(words):
        _help(GFlowNetRun, None, "alphaspin gflownet")
    config = _checked(GFlowNetRun, arguments.read(GFlowNetRun, words))
    from alphaspin.commands import gflownet_job

    gflownet_job.run(config)


def _usage(usage: str, words: Sequence[str]) -> NoReturn:
    """How a command that has no settings is used: because it was asked, or as an error."""
    if arguments.is_help(words):
        console.text(f"usage: {usage}")
        raise SystemExit(0)
    raise InputError(f"usage: {usage}")


def _recipes(words: Sequence[str]) -> None:
    match list(words):
        case [] | ["list"]:
            for name in recipe_names():
                first = packaged(f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
                console.text(f"{name:<24}{first.lstrip('# ')}")
        case ["show", name] | ["copy", name, _] if name not in recipe_names():
            load_config(name)  # says what is most like it
            raise InputError(f"{name}: is a file, no packaged recipe")
        case ["show", name]:
            print(packaged(f"{name}.yaml").read_text(encoding="utf-8"), end="")
        case ["copy", name, target]:
            if Path(home(target)).exists():
                raise InputError(f"{target} exists already")
            shutil.copyfile(packaged(f"{name}.yaml"), home(target))
        case _:
            _usage("alphaspin recipes [list | show NAME | copy NAME FILE]", words)


def _run_and_options(
    command: str, kind: type[Section], words: Sequence[str]
) -> tuple[Path, list[str]]:
    """RUN and the rest of a command's arguments; `--help` alone prints the options."""
    _alone(command)
    if arguments.is_help(words):
        _help(kind, None, f"alphaspin {command} RUN")
    if not words or words[0].startswith("-"):
        raise InputError(f"usage: alphaspin {command} RUN [--KEY VALUE …]")
    return Path(home(words[0])), list(words[1:])


def _evaluate(words: Sequence[str]) -> None:
    path, rest = _run_and_options("evaluate", EvaluateOptions, words)
    from alphaspin.commands import compare
    from alphaspin.commands.played import Played

    played = Played.open(path)
    judge = played.config.judge
    chosen = arguments.given(rest, "judge.kind")
    if chosen and chosen != judge.kind:
        judge = JUDGE.other(judge, chosen)
        judge = type(judge).model_construct()  # nothing of the run's judge
    elif arguments.given(rest, "judge.function"):  # one of the working directory, as in training
        judge = judge.model_copy(update={"folder": os.getcwd()})
    start = EvaluateOptions.model_construct(judge=judge)
    if name := arguments.given(rest, BENCHMARK.key):
        try:
            start = start.model_copy(update={"benchmark": BENCHMARK.find(name).model_construct()})
        except InputError as error:
            raise InputError(f"benchmark = {name}: {error}") from None
    changes = arguments.read(special(EvaluateOptions, start), rest, start)
    options = _checked(EvaluateOptions, arguments.merged({"judge": judge.model_dump()}, changes))
    compare.run(played.moved(options), options)


def _export(words: Sequence[str]) -> None:
    path, rest = _run_and_options("export", ExportOptions, words)
    options = _checked(ExportOptions, arguments.read(ExportOptions, rest))
    from alphaspin.commands import exporting
    from alphaspin.commands.played import Played

    exporting.run(Played.open(path).moved(options), options)


def _report(words: Sequence[str]) -> None:
    from alphaspin.report import overview
    from alphaspin.report import page as report

    match words:
        case [run] if not run.startswith("-"):
            page = report.write(Path(home(run)))
        case [*runs, "--to", page] if runs:
            page = overview.write([Path(home(run)) for run in runs], Path(home(page)))
        case _:
            _usage("alphaspin report RUN, or RUN RUN … --to PAGE.html", words)
    console.note(f"report: {page}")


def _doctor(words: Sequence[str]) -> None:
    from alphaspin.commands import doctor

    if [*words] not in ([], ["--short"]):
        _usage("alphaspin doctor [--short]", words)
    doctor.show_short() if words else doctor.show()


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "plan": lambda rest: _train([word for word in rest if word != "--plan"] + ["--plan"]),
    "init": _init,
    "gflownet": _gflownet,
    "recipes": _recipes,
    "evaluate": _evaluate,
    "export": _export,
    "report": _report,
    "doctor": _doctor,
    "completion": _completion,
}

_OPTIONS: dict[str, type[Section]] = {
    **dict.fromkeys(("train", "plan"), _TrainCommand),
    "init": Config,
    "gflownet": GFlowNetRun,
    "evaluate": EvaluateOptions,
    "export": ExportOptions,
}


def _command(words: Sequence[str]) -> None:
    if not words or words[0] in {"-h", "--help"}:
        print(USAGE)
        return
    if words[0] == "--version":
        print(f"alphaspin {__version__}")
        return
    if words[0] not in _COMMANDS:
        raise InputError(f"no command {words[0]!r}\n{USAGE}")
    _COMMANDS[words[0]](words[1:])


def _guarded(body: Callable[[Sequence[str]], None]) -> int:
    """Run a command; errors that a person can put right become one message and an exit code."""
    # One deterministic cuBLAS workspace; must be set before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")
    # Deprecations between transformers and PEFT are for them to settle.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    console.open_streams()
    for stream in (sys.stdout, sys.stderr):
        console.forgive(stream)
    try:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            if not (value := os.environ.get(name, "0")).removeprefix("-").isdecimal():
                raise InputError(f"{name} = {value!r} in the environment: needs a whole number")
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
