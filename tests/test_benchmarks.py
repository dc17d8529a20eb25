"""MT-Bench, AlpacaEval and the Open LLM Leaderboard on a small run, by judges with known rules."""

import importlib
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.forks import fork
from helpers import http_servers, write_rows
from test_played import Command, alphaspin, world  # noqa: F401  (fixtures)
from test_resume import child

from alphaspin.errors import EXIT_INPUT, EXIT_STOPPED, JudgeError
from alphaspin.evaluation.benchmarks import base, open_llm
from alphaspin.evaluation.benchmarks.base import mean
from alphaspin.evaluation.benchmarks.mt_bench import TEMPERATURES
from alphaspin.evaluation.winrate import at_equal_length
from alphaspin.foundation.artefacts import verifies
from alphaspin.foundation.paths import packaged
from alphaspin.judges.base import Comparison, Prompt
from alphaspin.judges.server import parse_grade

JUDGE = """
import os, pathlib, signal

HERE = pathlib.Path(__file__).parent

def note(text):
    with (HERE / "asked").open("a") as file:
        file.write(text + "\\n")
    limit = HERE / "limit"
    if limit.exists() and len((HERE / "asked").read_text().splitlines()) >= int(limit.read_text()):
        os.kill(os.getpid(), signal.SIGKILL)

def vowels(text):
    return sum(letter in "aeiou" for letter in text)

def more_vowels(pair):
    note(f"{pair.first!r} {pair.second!r} {pair.prompt.messages!r} {pair.other!r}")
    one, other = vowels(pair.first), vowels(pair.second)
    return 0.5 if one == other else float(one > other)

def first(pair):
    return 1.0

def grade(pair):
    note(f"grade {pair.first!r} {pair.prompt.messages!r}")
    return 1 + vowels(pair.first) % 10
"""
VOWELS = ["--judge.kind=callable", "--judge.function=known:more_vowels"]
GRADES = [*VOWELS, "--judge.grades=known:grade"]
CATEGORIES = list(TEMPERATURES)


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A copy of the run, a judge and questions in the working directory."""
    shutil.copytree(world / "run", tmp_path / "run")
    (tmp_path / "known.py").write_text(JUDGE)
    sys.modules.pop("known", None)
    rows = [
        {
            "question_id": 81 + n,
            "category": CATEGORIES[n % 8],
            "turns": [f"add {n} and 3", f"and {n}?"],
            **({"reference": [f"it is {n + 3}"]} if n % 8 == 4 else {}),
        }
        for n in range(12)
    ]
    write_rows(tmp_path / "question.jsonl", rows)
    return tmp_path / "run"


def mt_bench(run: Path, *more: str) -> list[str | Path]:
    questions = run.parent / "question.jsonl"
    options = [f"--benchmark.questions={questions}", "--benchmark.max_tokens=6"]
    return ["evaluate", run, "--benchmark", "mt-bench", *options, *more]


def records(run: Path, kind: str) -> dict[str, Any]:
    (folder,) = (run / "evaluation").glob(f"{kind}-*")
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    assert all(map(verifies, found))
    return {path.name: json.loads((path / "results.json").read_text()) for path in found}


def answers(run: Path, name: str, turns: int) -> list[list[str]]:
    """By dialogue, in order of turns."""
    (folder,) = (run / "evaluation").glob(f"answers-*/{name}")
    parts = [json.loads(p.read_text()) for p in sorted(folder.glob("*/results.json"))]
    by_turn = [[one for part in parts[turn::turns] for one in part] for turn in range(turns)]
    return [[turn["text"] for turn in own] for own in zip(*by_turn, strict=True)]


def vowels(text: str) -> int:
    return sum(letter in "aeiou" for letter in text)


def test_mt_bench_by_a_known_rule(
    run: Path,
    alphaspin: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Grades, win rates and their errors by hand from the answers on disk; page and card too."""
    monkeypatch.setattr(base, "SHARD", 5)
    code, printed = alphaspin(*mt_bench(run, *GRADES))
    assert code == 0, printed
    found = records(run, "mt-bench")
    assert sorted(found) == ["0", "1", "base", "sft 0", "sft 1"]
    said = {name: answers(run, name, 2) for name in found}
    assert said["1"] != said["base"]
    for name, own in said.items():
        results = found[name]["results"]
        grades = np.array([[1 + vowels(text) % 10 for text in turns] for turns in own])
        assert results["all"]["grade,none"] == pytest.approx(grades.mean())
        error = grades.mean(1).std(ddof=1) / math.sqrt(len(grades))
        assert results["all"]["grade_stderr,none"] == pytest.approx(error)
        assert results["turn 2"]["grade,none"] == pytest.approx(grades[:, 1].mean())
        of_writing = grades[[0, 8]]
        assert results["writing"]["grade,none"] == pytest.approx(of_writing.mean())
        if name == "base":
            assert "win rate,none" not in results["all"]
            continue
        signs = [
            np.sign(vowels(a) - vowels(b))
            for ours, theirs in zip(own, said["base"], strict=True)
            for a, b in zip(ours, theirs, strict=True)
        ]
        counted = [results["all"][f"{key},none"] for key in ("wins", "ties", "losses")]
        assert counted == [signs.count(1), signs.count(0), signs.count(-1)]
        assert results["all"]["win rate,none"] == pytest.approx((np.mean(signs) + 1) / 2)
    page = (run / "report.html").read_text()
    assert "MT-Bench, 12 questions (question.jsonl)" in page and "roleplay" in page
    assert page.count('aria-label="Grades, 1 to 10"') == 1  # the radar chart
    asked = (run.parent / "asked").read_text()
    code, _ = alphaspin(*mt_bench(run, *GRADES))
    assert code == 0 and (run.parent / "asked").read_text() == asked  # nothing is asked twice
    code, printed = alphaspin("export", run, "--to", run.parent / "out", "--vllm")
    assert code == 0, printed
    card = (run.parent / "out/README.md").read_text()
    assert "## MT-Bench, 12 questions" in card and "| writing | grade |" in card


def test_a_dialogue_is_judged_with_its_own_turns(run: Path, alphaspin: Command) -> None:  # noqa: F811
    """The second turn has each side's own first answer before it; references reach the judge."""
    code, printed = alphaspin(*mt_bench(run, *GRADES, "--iterations=1", "--prompts=5"))
    assert code == 0, printed
    said = {name: answers(run, name, 2) for name in ("base", "1")}
    lines = (run.parent / "asked").read_text().splitlines()
    for k in range(5):
        (ours, ours2), (theirs, theirs2) = said["1"][k], said["base"][k]
        if ours != theirs and ours2 != theirs2:
            own = [
                {"role": "user", "content": f"add {k} and 3"},
                {"role": "assistant", "content": ours},
                {"role": "user", "content": f"and {k}?"},
            ]
            (line,) = [x for x in lines if x.startswith(f"{ours2!r} {theirs2!r} {own!r} Prompt(")]
            assert repr(theirs) in line.partition("Prompt(")[2]
    pair = Comparison(
        Prompt(own, "ref"), "A2", "B2", Prompt([own[0], {**own[1], "content": "B"}, own[2]])
    )
    flat = pair.flat()
    assert flat.prompt == Prompt(own[:1], "ref") and flat.other is None
    assert flat.first == f"{ours}\nUser: {own[2]['content']}\nAssistant: A2"
    assert flat.second == f"B\nUser: {own[2]['content']}\nAssistant: B2"
    assert pair.swapped().swapped() == pair and pair.swapped().first == "B2"


def test_a_preference_for_a_position_gives_ties(run: Path, alphaspin: Command) -> None:  # noqa: F811
    judge = ["--judge.kind=callable", "--judge.function=known:first"]
    code, printed = alphaspin(*mt_bench(run, *judge, "--iterations=1"))
    assert code == 0 and "no grades: callable" in printed
    results = records(run, "mt-bench")["1"]["results"]["all"]
    assert (results["wins,none"], results["ties,none"], results["losses,none"]) == (0, 24, 0)
    code, printed = alphaspin(*mt_bench(run, *judge, "--benchmark.grading=single"))
    assert code == EXIT_INPUT and "gives no grades" in printed
    code, printed = alphaspin(*mt_bench(run))
    assert code == EXIT_INPUT and "compares with references" in printed


def started(folder: Path, words: list[str], log: Path) -> None:
    """As `cd folder && alphaspin WORDS`, in a process of its own."""
    os.chdir(folder)
    child(words, None, "", str(log))


def test_killed_half_way_and_gone_on_with(
    run: Path,
    alphaspin: Command,  # noqa: F811
    tmp_path: Path,
) -> None:
    """SIGKILL among the verdicts: the same command asks only the rest, and finds the same."""
    shutil.copytree(run, tmp_path / "other")
    words = [str(word) for word in mt_bench(run, *GRADES, "--iterations=0")]
    (tmp_path / "limit").write_text("40")
    process = fork(started, tmp_path, words, tmp_path / "log")
    process.start()
    process.join(180)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    (tmp_path / "limit").unlink()
    before = {p: p.stat().st_mtime_ns for p in (run / "evaluation").rglob("answers-*/*/*/*.json")}
    assert before and len((tmp_path / "asked").read_text().splitlines()) == 40
    code, printed = alphaspin(*words)
    assert code == 0, printed
    assert all(p.stat().st_mtime_ns == before[p] for p in before)  # no answer was made again
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) - len(set(asked)) <= 1  # the one that was under way
    (tmp_path / "asked").unlink()
    code, _ = alphaspin(*mt_bench(tmp_path / "other", *GRADES, "--iterations=0"))
    assert code == 0 and records(tmp_path / "other", "mt-bench") == records(run, "mt-bench")
    assert sorted(set(asked)) == sorted((tmp_path / "asked").read_text().splitlines())


@pytest.fixture
def serve() -> Generator[Callable[..., Any]]:
    with http_servers() as start:
        yield start


def reply(text: str) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode(), {}


def test_what_a_server_says_that_cannot_be_read(
    run: Path,
    alphaspin: Command,  # noqa: F811
    serve: Callable[..., Any],
) -> None:
    """Counted and told, never scored, and not asked again; the rest is graded."""

    def respond(path: str, body: dict[str, Any], number: int) -> tuple[int, bytes, dict[str, str]]:
        (question,) = (m["content"] for m in body["messages"])
        if "You grade" not in question:
            return reply("I cannot choose." if "add 2 and" in question else "[[C]]")
        if "add 2 and" in question:
            return reply("Rather good, a seven.")
        assert ("<reference>" in question) == (
            "add 4 and 3" in question and "and 4?" not in question
        )
        return reply("As asked. [[8]]")

    url, requests = serve(respond)
    judge = ["--judge.kind=server", f"--judge.url={url}", "--judge.model=m"]
    code, printed = alphaspin(*mt_bench(run, *judge, "--iterations=1", "--prompts=8"))
    assert code == 0, printed
    assert "2 of 16 replies of server:m:" in printed and "count neither for nor against" in printed
    for name, found in records(run, "mt-bench").items():
        assert found["results"]["all"]["grade,none"] == 8
        assert found["results"]["all"]["grade: not read,none"] == 2
        assert not any("grade,none" in key for key in found["results"][CATEGORIES[2]]), name
    assert "could not be read" in (run / "report.html").read_text()
    count = len(requests)
    assert alphaspin(*mt_bench(run, *judge, "--iterations=1", "--prompts=8"))[0] == 0
    assert len(requests) == count
    code, _ = alphaspin(*mt_bench(run, "--judge.kind=server", "--judge.url=http://127.0.0.1:9/v1"))
    assert code in (EXIT_INPUT, EXIT_STOPPED)


def test_a_served_judge_that_dies_half_way(
    run: Path,
    alphaspin: Command,  # noqa: F811
    serve: Callable[..., Any],
) -> None:
    """What it had graded is kept; the same command asks the rest, and finds what a whole one does.

    Grades are a rule of the question, so that whose they are shows.
    """
    alive = [True]

    def respond(path: str, body: dict[str, Any], number: int) -> tuple[int, bytes, dict[str, str]]:
        if alive[0] and number > 20:
            return 400, b'{"error": "the model is gone"}', {}
        (question,) = (m["content"] for m in body["messages"])
        if "You grade" not in question:
            return reply("[[A]]")
        return reply(f"[[{1 + len(question) % 10}]]")

    other = shutil.copytree(run, run.parent / "other")
    url, requests = serve(respond)
    judge = ["--judge.kind=server", f"--judge.url={url}", "--judge.model=m"]
    words = [*mt_bench(run, *judge, "--iterations=1", "--prompts=6"), "--benchmark.grading=single"]
    code, printed = alphaspin(*words)
    assert code == EXIT_STOPPED and "the model is gone" in printed and "Traceback" not in printed
    asked = [json.dumps(r["messages"]) for r in requests[:20]]
    alive[0] = False
    count = len(requests)
    code, printed = alphaspin(*words)
    assert code == 0, printed
    rest = [json.dumps(r["messages"]) for r in requests[count:]]
    assert rest and not {*rest} & {*asked}, "nothing that was graded is asked again"
    assert alphaspin(*(words[0], other, *words[2:]))[0] == 0
    assert records(run, "mt-bench") == records(other, "mt-bench")
    for found in records(run, "mt-bench").values():
        assert found["results"]["all"]["grade: not read,none"] == 0


@pytest.mark.parametrize(
    ("text", "grade"), [("Good. [[7]]", 7), ("[[7]] or so: [[7]]", 7), ("[[9.5]].", 9.5)]
)
def test_grades(text: str, grade: float) -> None:
    assert parse_grade(text) == grade


@pytest.mark.parametrize("text", ["7", "[[7]] and more", "[[11]]", "[[0]]", "[[3]] [[4]]", "[[x]]"])
def test_what_is_no_grade(text: str) -> None:
    with pytest.raises(JudgeError, match=re.escape("[[grade]]")):
        parse_grade(text)


def test_means_leave_out_what_was_not_read() -> None:
    found = mean("m", [[1.0, math.nan], [3.0, 5.0], [math.nan]])
    assert found["m,none"] == 3
    assert found["m_stderr,none"] == pytest.approx(math.sqrt(2 * (2**2 + 2**2)) / 3)
    assert mean("m", [[math.nan]]) == {}


BAD = [
    ({"turns": ["a"]}, "category: needs a text"),
    ({"category": "math", "turns": "a"}, "turns: needs a list of texts"),
    ({"category": "math", "turns": []}, "turns: needs a list of texts"),
    ({"category": "math", "turns": ["a"], "reference": ["b", "c"]}, "at most 1 texts"),
]


@pytest.mark.parametrize(("row", "told"), BAD)
def test_broken_questions_are_named(
    run: Path,
    alphaspin: Command,  # noqa: F811
    row: dict[str, Any],
    told: str,
) -> None:
    good = {"category": "math", "turns": ["a"]}
    write_rows(run.parent / "question.jsonl", [good, row])
    code, printed = alphaspin(*mt_bench(run, *VOWELS))
    assert code == EXIT_INPUT and "question.jsonl:2" in printed and told in printed


def test_the_questions_that_ship() -> None:
    rows = [json.loads(x) for x in packaged("benchmarks/mt-bench.jsonl").read_text().splitlines()]
    assert {row["category"] for row in rows} == set(CATEGORIES) and len(rows) == 16
    assert all(len(row["turns"]) == 2 for row in rows)
    assert len({row["question_id"] for row in rows}) == 16


def test_alpaca_eval(run: Path, alphaspin: Command) -> None:  # noqa: F811
    """Win rates by hand; at equal length against a fit by L-BFGS of the published model."""
    rows = [
        {
            "instruction": f"add {n} and {n % 7}",
            "output": "it is a long one" * (n % 4) or "no",
            "generator": "m",
            "difficulty": math.sin(n),
        }
        for n in range(40)
    ]
    file = write_rows(run.parent / "outputs.jsonl", rows)
    options = [f"--benchmark.outputs={file}", "--benchmark.max_tokens=8", "--iterations=1"]
    code, printed = alphaspin("evaluate", run, "--benchmark", "alpaca-eval", *options, *VOWELS)
    assert code == 0, printed
    assert "40 instructions (outputs.jsonl), against m" in printed
    for name, found in records(run, "alpaca-eval").items():
        own = [a for (a,) in answers(run, name, 1)]
        signs = [np.sign(vowels(a) - vowels(r["output"])) for a, r in zip(own, rows, strict=True)]
        wins = (np.array(signs) + 1) / 2
        assert found["results"]["all"]["win rate,none"] == pytest.approx(wins.mean())
        lengths = [len(a) for a in own], [len(r["output"]) for r in rows]
        expected = fitted(wins, *lengths, [r["difficulty"] for r in rows])
        assert found["results"]["all"]["length-controlled,none"] == pytest.approx(
            expected, abs=1e-5
        )
    write_rows(file, [rows[0], {**rows[1], "difficulty": None}])
    code, printed = alphaspin("evaluate", run, "--benchmark", "alpaca-eval", *options, *VOWELS)
    assert code == EXIT_INPUT and "difficulty in some rows only" in printed
    code, printed = alphaspin("evaluate", run, "--benchmark", "alpaca-eval", *VOWELS)
    assert code == EXIT_INPUT and "benchmark.outputs" in printed


def fitted(wins: Any, lengths: Any, others: Any, difficulty: Any) -> float:
    """θ, φ and ψ of `at_equal_length` by another optimiser."""
    delta = np.subtract(lengths, others).astype(float)
    x = np.stack([np.ones(len(wins)), np.tanh(delta / delta.std()), difficulty], 1)
    middle = [1, 0, np.mean(difficulty)]
    features = torch.tensor(np.concatenate([x, [middle, middle]]))
    wanted = torch.tensor([*wins, 1.0, 0.0], dtype=torch.float64)
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    fit = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        fit.zero_grad()
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        value = bce(features @ w, wanted, reduction="sum") + w[1:].square().sum() / 2
        value.backward()
        return value

    fit.step(loss)
    a, _, psi = w.detach().numpy()
    return float((1 / (1 + np.exp(-(a + psi * np.array(difficulty))))).mean())


def test_difficulty_is_no_luck() -> None:
    """Where instructions differ, their difficulties narrow the interval and keep the rate."""
    random = np.random.default_rng(0)
    gamma, delta = random.normal(size=4000), random.integers(-50, 50, 4000)
    p = 1 / (1 + np.exp(-(0.4 + 2 * gamma + np.tanh(delta / delta.std()))))
    wins = (random.random(4000) < p).astype(float)
    truth = (1 / (1 + np.exp(-(0.4 + 2 * gamma)))).mean()
    ours = at_equal_length(wins, (100 + delta).tolist(), [100] * 4000, gamma.tolist())
    assert ours.low < truth < ours.high and ours.value == pytest.approx(truth, abs=0.01)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, train: {shots}}}}}
test_split: test
training_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


GROUP = """
group: mmlu
task: [mmlu_a, mmlu_b]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""


def test_open_llm(
    run: Path,
    alphaspin: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tasks of the leaderboard's names on local data: the shots, the mean, and going on."""
    harness = pytest.importorskip("lm_eval.evaluator")
    monkeypatch.setattr(harness, "add_env_info", lambda results: None)
    tasks = importlib.import_module("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(run.parent / "cache"))
    folder = run.parent / "tasks"
    folder.mkdir()
    rows = [{"question": f"{k}:", "choices": ["7", "no", "12"], "gold": k % 3} for k in range(30)]
    shots = write_rows(folder / "shots.jsonl", rows)
    test = write_rows(folder / "rows.jsonl", rows[:6])
    wanted = {"arc_challenge": 9, "mmlu": 2, "truthfulqa_mc2": 0}
    parts = {"mmlu_a": test, "mmlu_b": write_rows(folder / "few.jsonl", rows[6:8])}
    monkeypatch.setitem(open_llm.TASKS, 1, wanted)
    monkeypatch.setattr(open_llm, "COUNTED", {k: open_llm.COUNTED[k] for k in wanted})
    for name, own in {"arc_challenge": test, "truthfulqa_mc2": test, **parts}.items():
        text = TASK.format(name=name, rows=own, shots=shots)
        (folder / f"{name}.yaml").write_text(text)
    (folder / "mmlu.yaml").write_text(GROUP)
    command = ["evaluate", run, "--benchmark", "open-llm", f"--include_path={folder}"]
    whole, calls = harness.simple_evaluate, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["tasks"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(importlib.import_module("lm_eval"), "simple_evaluate", counted)
    code, printed = alphaspin(*command, "--iterations=1")
    assert code == 75 and len(calls) == 4
    code, printed = alphaspin(*command, "--iterations=1")
    assert code == 0, printed
    # What was done was not done again: 3 policies x 3 tasks, and the failed one.
    assert len(calls) == 9 + 1
    for name, found in records(run, "open-llm").items():
        results = found["results"]
        mean_of = (
            results["arc_challenge"]["acc_norm,none"]
            + results["mmlu"]["acc,none"]
            + results["truthfulqa_mc2"]["acc,none"]
        ) / 3
        assert results["mean of the six"]["score,none"] == pytest.approx(mean_of)
        assert not {*parts} & {*results}, "the row of a group is enough"
        right: list[float] = []
        for task, count in {**wanted, **dict.fromkeys(parts, 2)}.items():
            group = "mmlu" if task in parts else task
            (file,) = (run / "evaluation").glob(f"answers-*/{name}/{group}/results.json")
            kept = json.loads(file.read_text())
            if task == "mmlu":
                assert kept["results"]["mmlu"]["acc,none"] == results["mmlu"]["acc,none"]
                continue
            if task in parts:
                right += [sample["acc"] for sample in kept["samples"][task]]
            assert kept["n-samples"][task]["effective"] == (2 if task == "mmlu_b" else 6)
            context = kept["samples"][task][0]["arguments"][0][0]
            assert context.count(":") == count + 1
        assert len(right) == 8 and results["mmlu"]["acc,none"] == pytest.approx(np.mean(right))
    assert "Open LLM Leaderboard, version 1" in (run / "report.html").read_text()


def test_the_leaderboards_tasks_are_the_harness_s() -> None:
    """Names of tasks and groups, as its files define them; its own shots of version 1."""
    root = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
    where = ["arc", "hellaswag", "mmlu/default", "truthfulqa", "winogrande", "gsm8k", "leaderboard"]
    named: set[str] = set()
    for folder in where:
        for file in (root / folder).rglob("*.yaml"):
            named |= set(re.findall(r"^(?:task|group): *([\w-]+) *$", file.read_text(), re.M))
    wanted = {**open_llm.TASKS[1], **open_llm.TASKS[2]}
    assert len(wanted) == 12 and not set(wanted) - named
    whole = (root / "benchmarks/openllm.yaml").read_text()
    for task, shots in open_llm.TASKS[1].items():
        name = "truthfulqa" if task == "truthfulqa_mc2" else task
        assert re.search(
            rf"task: {name}\n(?:    fewshot_split: train\n)?    num_fewshot: {shots}\n", whole
        )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--benchmark", "mt-bnch"], "did you mean 'mt-bench'"),
        (["--benchmark", "open-llm", "--benchmark.questions=x"], "has no effect"),
        (["--benchmark", "mt-bench", "--tasks", "gsm8k"], "do not go together"),
        (["--benchmark", "mt-bench", "--chat"], "chat = True has no effect"),
        (["--benchmark", "mt-bench", "--heldout=x.jsonl"], "heldout"),
        (["--chat"], "chat = True has no effect"),
        (["--benchmark", "mt-bench", "--benchmark.questions=none.jsonl", *VOWELS], "no such file"),
    ],
)
def test_what_does_not_go_is_refused(
    run: Path,
    alphaspin: Command,  # noqa: F811
    options: list[str],
    told: str,
) -> None:
    code, printed = alphaspin("evaluate", run, *options)
    assert code == EXIT_INPUT and told in printed, printed
