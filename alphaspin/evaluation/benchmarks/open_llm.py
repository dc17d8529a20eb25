"""The Open LLM Leaderboards of Hugging Face, through lm-evaluation-harness."""

from functools import partial
from typing import Any, Literal

from alphaspin.evaluation.benchmarks.base import Benchmark, Contest, Record, digest
from alphaspin.evaluation.benchmarks.tasks import Harness

TASKS: dict[int, dict[str, int | None]] = {
    1: {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
    },
    2: dict.fromkeys(
        [
            *("leaderboard_ifeval", "leaderboard_bbh", "leaderboard_math_hard"),
            *("leaderboard_gpqa", "leaderboard_musr", "leaderboard_mmlu_pro"),
        ]
    ),
}
"""The harness's tasks and their shots (None: the task's own), by version of the leaderboard. Those
of version 1 are 2404.04291's."""

COUNTED = {
    "arc_challenge": "acc_norm,none",
    "hellaswag": "acc_norm,none",
    "mmlu": "acc,none",
    "truthfulqa_mc2": "acc,none",
    "winogrande": "acc,none",
    "gsm8k": "exact_match,strict-match",
}
"""What version 1 of the leaderboard counts of each task; its figure is their mean."""


class OpenLLM(Benchmark):
    """The six tasks of the leaderboard, each kept as soon as it is done."""

    kind: str = "open-llm"
    judged = False
    version: Literal[1, 2] = 1
    """Of the leaderboard. 1: ARC 25 shots, HellaSwag 10, MMLU 5, TruthfulQA (mc2) 0, Winogrande 5,
    GSM8K 5. 2: IFEval, BBH, MATH level 5, GPQA, MuSR, MMLU-Pro, with the shots of the harness's
    `leaderboard` tasks."""

    def run(self, contest: Contest) -> dict[str, Record]:
        """Task by task."""
        tasks = TASKS[self.version]
        harness = Harness.of(contest, [*tasks])
        key = digest([harness.key, tasks])
        title = f"Open LLM Leaderboard, version {self.version} ({harness.title})"
        found: dict[str, Record] = {}
        for entrant in contest.entrants:
            results: dict[str, Any] = {}
            for task, shots in tasks.items():
                part = digest([harness.key, task, shots])
                place = f"answers-{part[:8]}/{entrant.name}/{task}"
                make = partial(harness.run, entrant, [task], shots)
                own = contest.kept(place, entrant, part, make)["results"]
                results |= {task: own[task]} if task in own else own  # a group's own row is enough
            notes = ["the leaderboard's normalised mean is not computed"]
            if self.version == 1:
                counted = [results[task][metric] for task, metric in COUNTED.items()]
                results["mean of the six"] = {"score,none": sum(counted) / len(counted)}
                notes = []
            record = {"title": title, "results": results, "notes": notes}
            place = f"open-llm-{key[:8]}/{entrant.name}"
            found[entrant.name] = contest.kept(place, entrant, key, partial(dict, record))
        return found
