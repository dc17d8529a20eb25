"""The tiny recipes with a judge, on three seeds: is the base beaten, at which KL and what cost?"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alphaspin.commands.job import run
from alphaspin.config import load_config

SEEDS = (0, 1, 2)
RECIPES = ("tiny-sppo", "tiny-rspo", "tiny-nash-md")
HEADER = [
    "recipe",
    "seed",
    "t",
    "judge vs base %",
    "95 % interval",
    "at equal length %",
    "KL to base",
    "sampled %",
    "greedy %",
    "tokens",
    "self-BLEU",
    "seconds",
]


def test_preference(tmp_path: Path, record: Callable[..., Path]) -> None:
    rows: list[list[str]] = []
    raw: list[dict[str, Any]] = []
    for recipe in RECIPES:
        for seed in SEEDS:
            output = str(tmp_path / f"{recipe}-{seed}")
            config = load_config(recipe).model_copy(update={"seed": seed, "output": output})
            started = time.perf_counter()
            summary = run(config)
            seconds = time.perf_counter() - started
            raw.append(
                {"recipe": recipe, "seed": seed, "seconds": seconds, "rows": summary["rows"]}
            )
            base, *iterates = summary["rows"]
            rows += [cells(recipe, seed, row, "") for row in [base, *iterates[:-1]]]
            rows.append(cells(recipe, seed, iterates[-1], f"{seconds:.0f}"))
    text = (
        "`pytest benchmarks/test_preference.py --benchmark`; ± is one standard error over prompts; "
        "the judge is exact match with the demonstrated answers; seconds are those of the run, its "
        "evaluations included."
    )
    record("preference", HEADER, rows, text, raw)
    last = {(r["recipe"], r["seed"]): r["rows"][-1] for r in raw}
    for key, row in last.items():
        assert row["judged"] - 0.5 > 2 * row["judged_se"], key
    for seed in SEEDS:
        assert last["tiny-rspo", seed]["kl"] < last["tiny-sppo", seed]["kl"], seed


def cells(recipe: str, seed: int, row: dict[str, Any], seconds: str) -> list[str]:
    """An evaluation as a row of the table."""
    judged = ["-"] * 3
    if row["name"] != "base":
        judged = [
            f"{100 * row['judged']:.1f} ± {100 * row['judged_se']:.1f}",
            f"{100 * row['judged_low']:.1f} to {100 * row['judged_high']:.1f}",
            f"{100 * row['controlled']:.1f}",
        ]
    return [
        recipe,
        str(seed),
        row["name"],
        *judged,
        f"{row['kl']:.3f} ± {row['kl_se']:.3f}",
        f"{100 * row['sampled']:.1f} ± {100 * row['sampled_se']:.1f}",
        f"{100 * row['greedy']:.1f} ± {100 * row['greedy_se']:.1f}",
        f"{row['length']:.1f}",
        f"{row['self_bleu']:.3f}",
        seconds,
    ]
