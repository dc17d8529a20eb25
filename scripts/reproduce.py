"""The runs of the α-SPIN paper (Alami et al., arXiv 2404.04291): plan, play, measure, tabulate.

    python scripts/reproduce.py --plan [--gpu h100]           # runs, their cost, what they fill
    python scripts/reproduce.py --output FOLDER --mt-bench \\
        "--benchmark.questions question.jsonl --judge.kind server --judge.url URL --judge.model M"
    python scripts/reproduce.py --output FOLDER --stand-in    # all of it in minutes, on a CPU

Every step is a command of alphaspin that goes on where it was stopped, so the same line after a
kill goes on too. Results: FOLDER/results.md with the table, a report.html per run with its figure,
compare.html with the runs side by side.

Known of the paper: the recipe `gemma-2b-ultrachat` without the lines marked as our choice, α = .95,
h = 1, 2 and ∞ beside SPIN, MT-Bench by category (figures 2 to 5) and the Open LLM Leaderboard (the
table); in an appendix, opponents from a GFlowNet of the mixture, which degraded from iteration 1.
Not known here, and our choice: learning rate, β, batch, LoRA's alpha, the chat format of the plain
base, MT-Bench's judge, seeds; of the appendix its prompts, rewards and epochs: ours are Hu et al.'s
recipe (arXiv 2310.04363), 1000 prompts, 10 epochs, the reward π_prev^α π_base^(1-α), as in
docs/theory.md, section 4.
"""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from alphaspin.cli import parse
from alphaspin.commands import timing
from alphaspin.commands.plan import gather
from alphaspin.errors import InputError
from alphaspin.evaluation.benchmarks.open_llm import COUNTED
from alphaspin.foundation import console
from alphaspin.foundation.gpus import GPUS, Target, find_gpu
from alphaspin.foundation.section import at
from alphaspin.judges.base import Comparison
from alphaspin.report.page import in_order

RUNS = {
    "spin": ["--reference.alpha", "1"],
    "alpha-h1": ["--selfplay.history", "1"],
    "alpha-h2": ["--selfplay.history", "2"],
    "alpha-inf": ["--selfplay.history", "inf"],
    "alpha-gflownet": ["--selfplay.opponent", "mixture-gflownet"],
}
"""What tells the runs apart; all else is the recipe's, with its α = .95."""

TITLES = {
    "spin": "SPIN",
    "alpha-h1": "α-SPIN, h = 1",
    "alpha-h2": "α-SPIN, h = 2",
    "alpha-inf": "α-SPIN, fictitious play",
    "alpha-gflownet": "α-SPIN, opponents from the mixture by a GFlowNet",
}

FILLS = {
    "spin": "rows, a figure",
    "alpha-h1": "rows, a figure",
    "alpha-h2": "rows, a figure",
    "alpha-inf": "rows, a figure",
    "alpha-gflownet": "appendix",
}

STAND_IN = shlex.split(
    "--model tiny --data tiny --heldout tiny --selfplay.prompts 32 64 --train.epochs 1 "
    "--train.batch_size 16 --train.accumulation 1 --train.lr 1e-3 --train.dtype fp32 "
    "--train.no_activation_checkpointing --text.max_prompt_tokens 96 --text.max_response_tokens 24 "
    "--evaluate.prompts 32 --lora.r 4"
)
STAND_IN_SAMPLER = shlex.split(
    "--gflownet.prompts 16 --gflownet.epochs 1 --gflownet.answers 8 --gflownet.lora.r 4"
)
STAND_IN_JUDGE = shlex.split(
    "--judge.kind callable --judge.function reproduce:more_words --judge.grades reproduce:words "
    f"--judge.folder {shlex.quote(str(Path(__file__).parent))} --benchmark.max_tokens 24"
)


def words(pair: Comparison) -> float:
    """The stand-in's grade: 1 and the different words of the answer, at most 10."""
    return min(10.0, 1.0 + len(set(pair.first.split())))


def more_words(pair: Comparison) -> float:
    """The stand-in's verdict: who has more different words."""
    one, other = (len(set(text.split())) for text in (pair.first, pair.second))
    return 0.5 if one == other else float(one > other)


def settings(name: str, options: argparse.Namespace) -> list[str]:
    """The arguments of `alphaspin train` for a run; of an option that comes twice, the last."""
    chosen = ["--name", name]
    if options.stand_in:
        chosen += STAND_IN + (STAND_IN_SAMPLER if "gflownet" in name else [])
    chosen += RUNS[name]
    if options.output:
        chosen += ["--output", str(options.output / name)]
    values: dict[str, list[str]] = {}
    for word in [*chosen, *shlex.split(options.train)]:
        if word.startswith("--"):
            values.pop(last := word, None)
            values[last] = []
        else:
            values[last].append(word)
    return ["gemma-2b-ultrachat", *(word for key, own in values.items() for word in (key, *own))]


def plan(options: argparse.Namespace) -> None:
    """Print the runs, about what each costs, and what it fills."""
    gpu = find_gpu(options.gpu)
    rows: list[list[str]] = []
    total = 0.0
    for name in options.runs:
        config, facts = gather(parse(settings(name, options))[0], Target(gpu, options.gpu))
        iterations = range(config.selfplay.iterations)
        base = 2 * facts.parameters
        parts = [timing.times(config, facts, t, gpu, base=base) for t in iterations]
        phases = [*zip(*map(astuple, parts), strict=True), [part.all for part in parts]]
        total += sum(part.all for part in parts)
        hours = [f"{sum(one) / 3600:.2g}" for one in phases]
        prompts = " ".join(f"{at(config.selfplay.prompts, t):,}" for t in iterations)
        rows.append([name, prompts, *hours, FILLS[name]])
    title = f"GPU hours on one {options.gpu}, estimates; the local sampler answers"
    phases = [field.name for field in fields(timing.Times)]
    console.table(title, ["run", "prompts by t", *phases, "all", "fills"], rows)
    console.text(f"all runs: {total / 3600:.3g} GPU hours; {timing.TERMS}")
    console.text("lengths of prompts and answers are the recipe's hints, which are rough guesses")
    console.text(f"after each run: {' '.join(COUNTED)} (open-llm), MT-Bench by category")
    for name in options.runs:
        console.text(shlex.join(["alphaspin", "train", *settings(name, options)]))


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {rows}, test: {rows}}}}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
GENERATED = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {rows}, test: {rows}}}}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
filter_list: [{{name: strict-match, filter: [{{function: take_first}}]}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def stand_in_tasks(folder: Path) -> Path:
    """The leaderboard's six tasks by name, on sums: their data cannot stand in for themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"{k}?", "choices": ["4", "7", "9"], "gold": k % 3} for k in range(30)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, metric in COUNTED.items():
        text = GENERATED if metric.startswith("exact_match") else TASK
        (folder / f"{name}.yaml").write_text(text.format(name=name, rows=data))
    return folder


def call(launch: str, *arguments: str) -> None:
    """A command of alphaspin; what it stops with is what this script stops with."""
    command = [*shlex.split(launch), "-m", "alphaspin.cli", *arguments]
    print("+", shlex.join(command), flush=True)
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code if code > 0 else 128 - code)


def play(options: argparse.Namespace) -> None:
    """All runs with their benchmarks, then the table."""
    options.output.mkdir(parents=True, exist_ok=True)
    folders = [options.output / name for name in options.runs]
    tasks: list[str] = []
    if options.stand_in:
        folder = stand_in_tasks(options.output.absolute() / "tasks")
        tasks = [f"--include_path={folder}", "--prompts=6"]
    for name, folder in zip(options.runs, folders, strict=True):
        call(options.launch, "train", *settings(name, options))
        if not options.no_open_llm:
            call(sys.executable, "evaluate", str(folder), "--benchmark", "open-llm", *tasks)
        judge = STAND_IN_JUDGE if options.stand_in else shlex.split(options.mt_bench)
        call(sys.executable, "evaluate", str(folder), "--benchmark", "mt-bench", *judge)
    text = "\n\n".join(
        table(name, folder) for name, folder in zip(options.runs, folders, strict=True)
    )
    title = "# The runs of arXiv 2404.04291" + ", on a stand-in: no result" * options.stand_in
    (options.output / "results.md").write_text(f"{title}\n\n{text}\n", encoding="utf-8")
    page = str(options.output / "compare.html")
    call(sys.executable, "report", *map(str, folders), "--to", page)
    console.note(f"{options.output / 'results.md'}; figures: report.html of each run")


def table(name: str, folder: Path) -> str:
    """The leaderboard's six tasks and their mean, and MT-Bench's grade, by iterate, in Markdown.

    Raises:
        InputError: a benchmark was run in several ways, of which none is the one that is meant.
    """
    for kind in ("open-llm", "mt-bench"):
        if len(several := sorted(folder.glob(f"evaluation/{kind}-*"))) > 1:
            names = ", ".join(one.name for one in several)
            raise InputError(f"{folder}/evaluation: {names}: move away all but one")
    found: dict[str, dict[str, str]] = {}
    columns: dict[str, tuple[str, str, str, float]] = {
        **{task: ("open-llm", task, metric, 100) for task, metric in COUNTED.items()},
        "mean": ("open-llm", "mean of the six", "score,none", 100),
        "MT-Bench": ("mt-bench", "all", "grade,none", 1),
        "win rate": ("mt-bench", "all", "win rate,none", 100),
    }
    for file in sorted(folder.glob("evaluation/*/*/results.json")):
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["results"]
        for title, (kind, task, metric, scale) in columns.items():
            if file.parts[-3].startswith(f"{kind}-") and metric in results.get(task, {}):
                shown = f"{scale * results[task][metric]:.2f}"
                found.setdefault(file.parts[-2], {})[title] = shown
    lines = ["| t | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for policy in in_order(found):
        cells = [found[policy].get(title, "–") for title in columns]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return f"## {TITLES[name]}\n\n[report]({name}/report.html)\n\n" + "\n".join(lines)


def main() -> None:
    """Read the options, and do it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--plan", action="store_true", help="print what would be done, and stop")
    parser.add_argument("--stand-in", action="store_true", help="the embedded model, few prompts")
    parser.add_argument("--output", type=Path, help="folder of the runs")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS])
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="of the plan")
    parser.add_argument("--launch", default=shlex.quote(sys.executable), help="starts training")
    parser.add_argument("--train", default="", help="further options of training, in quotes")
    parser.add_argument("--mt-bench", default="", help="options of evaluate --benchmark mt-bench")
    parser.add_argument("--no-open-llm", action="store_true", help="without the harness's tasks")
    options = parser.parse_args()
    if not (options.plan or options.output):
        parser.error("--output FOLDER is needed")
    if not (options.plan or options.stand_in or options.mt_bench):
        parser.error("--mt-bench is needed: a judge, and the questions (see --help)")
    try:
        plan(options) if options.plan else play(options)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
