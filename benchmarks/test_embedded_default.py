"""What `make demo` shows, on three seeds: does self-play improve, and is further SFT better?"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alphaspin.commands.job import run
from alphaspin.config import load_config

SEEDS = (0, 1, 2)


def test_embedded_default(tmp_path: Path, record: Callable[..., Path]) -> None:
    header = ["seed", "policy", "NLL/answer", "sampled %", "greedy %", "margin", "wins vs base %"]
    rows: list[list[str]] = []
    raw: list[dict[str, Any]] = []
    seconds: list[float] = []
    for seed in SEEDS:
        config = load_config("tiny").model_copy(
            update={"seed": seed, "output": str(tmp_path / str(seed))}
        )
        started = time.perf_counter()
        summary = run(config)
        seconds.append(time.perf_counter() - started)
        tokens = summary["trained_tokens"]
        entry = {"seed": seed, "seconds": seconds[-1], "tokens": tokens, "rows": summary["rows"]}
        raw.append(entry)
        for row in summary["rows"]:
            rows.append(
                [
                    str(seed),
                    f"t = {row['name']}" if row["name"].isdigit() else row["name"],
                    f"{row['nll']:.3f}",
                    f"{100 * row['sampled']:.1f} ± {100 * row['sampled_se']:.1f}",
                    f"{100 * row['greedy']:.1f} ± {100 * row['greedy_se']:.1f}",
                    f"{row['margin']:+.2f}",
                    f"{100 * row['preferred']:.1f} ± {100 * row['preferred_se']:.1f}",
                ]
            )
    text = (
        f"`pytest benchmarks/test_embedded_default.py --benchmark`; ± is one standard error over "
        f"prompts; seconds per seed with control: {', '.join(f'{s:.0f}' for s in seconds)}.\n\n"
        "Response tokens that carried a gradient, self-play / control: "
        + ", ".join(f"{r['tokens']['train']:,} / {r['tokens']['control']:,}" for r in raw)
        + ". Both process as many; a loser that equals its winner carries none."
    )
    record("embedded-default", header, rows, text, raw)
    for result in raw:
        by_name = {row["name"]: row for row in result["rows"]}
        base, last = by_name["base"], by_name["2"]
        error = math.hypot(base["sampled_se"], last["sampled_se"])
        assert last["sampled"] - base["sampled"] > 2 * error, result["seed"]
