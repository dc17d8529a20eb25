"""Does any successor of SPIN beat SFT that stops in time? Two worlds, three seeds, equal cost.

    pytest benchmarks/test_successors.py --benchmark

`tiny` is the embedded default: a base that answers sloppily, of which SFT on the demonstrations
makes a good one. `chain` (scripts/make_chain.py, an hour on one core, made when it is missing) is
the setting that the papers assume: a larger model, answers of 30 to 60 tokens, more demonstrations
than are used, and a base that had an epoch of SFT on all of them.

The runs lie in `runs/successors` (or ALPHASPIN_RUNS), one process per core plays them with one
thread, and what is finished is not played again: stop and start as you like.

A setting is judged by its best iterate, that of the lowest NLL (mean over seeds), against SFT's,
chosen alike, and by its last.
"""

import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_self_play import outcome, spread

from alphaspin.config import Config
from alphaspin.report import overview

SEEDS, ITERATIONS = (0, 1, 2), 6
RUNS = Path(os.environ.get("ALPHASPIN_RUNS", "runs/successors"))
CHAIN = RUNS / "chain"
WORLDS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": "tiny",
        "data": "tiny",
        "heldout": "tiny",
        "text": {"max_prompt_tokens": 96, "max_response_tokens": 32},
        "selfplay": {"prompts": 1024},
    },
    "chain": {
        "model": str(CHAIN / "model"),
        "data": str(CHAIN / "train.jsonl"),
        "heldout": str(CHAIN / "heldout.jsonl"),
        "text": {"max_prompt_tokens": 160, "max_response_tokens": 72},
        "selfplay": {"prompts": 512},
    },
}
COMMON: dict[str, Any] = {
    "train": {"batch_size": 32, "lr": 5e-4, "schedule": "constant"},
    "evaluate": {"prompts": 256},
}
GAP = {"kind": "dpo", "beta": 1.0}
MIXED = {"loss": GAP, "reference": {"alpha": 0.95}}  # the paper's α
SETTINGS: dict[str, dict[str, Any]] = {
    "SPIN": {"loss": GAP, "control": "sft"},
    "SPIN + 10 NLL": {"loss": GAP | {"nll_weight": 10.0}},
    "α-SPIN, h = 1": MIXED,
    "α-SPIN, h = 2": MIXED | {"selfplay": {"history": 2}},
    "α-SPIN, h = ∞": MIXED | {"selfplay": {"opponent": "fictitious"}},
    "SPACE": {"loss": {"kind": "space"}},
    "χ² (after SPIF)": {"loss": {"kind": "chi2"}},
    "Rényi, order ½ (after IRIS)": {"loss": {"kind": "renyi"}},
    "T-SPIN": {"method": "t_spin"},
}
PLAYED = {
    "tiny": SETTINGS,
    "chain": SETTINGS | {"SPIN, lr 1e-4": SETTINGS["SPIN"] | {"train": {"lr": 1e-4}}},
}


def settings(world: str, label: str, seed: int) -> Config:
    """One run; SFT is the control of SPIN's, of the same prompts, steps and learning rates."""
    changes = PLAYED[world][label]
    name = f"{world}-" + re.sub(
        r"\W+", "-", label.replace("χ²", "chi2").replace("∞", "all"), flags=re.ASCII
    ).strip("-")
    fields = WORLDS[world] | COMMON | changes | {"name": name, "seed": seed}
    play = WORLDS[world]["selfplay"] | {"iterations": ITERATIONS}
    fields["selfplay"] = play | changes.get("selfplay", {})
    fields["train"] = COMMON["train"] | changes.get("train", {})
    fields["output"] = str(RUNS / f"{name}-seed{seed}")
    return Config.model_validate(fields)


def play(world: str, label: str, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {"world": world, "label": label, "seed": seed} | outcome(settings(world, label, seed))


def curves(found: list[dict[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """NLL and shares in per cent [seeds, 1 + iterations] of a world's settings, controls first."""
    played = PLAYED[found[0]["world"]]

    def curve(label: str, prefix: str) -> dict[str, np.ndarray]:
        names = ["base", *(f"{prefix}{t}" for t in range(ITERATIONS))]
        rows = [
            [{row["name"]: row for row in entry["rows"]}[name] for name in names]
            for entry in found
            if entry["label"] == label
        ]
        return {
            key: scale * np.array([[row[key] for row in line] for line in rows])
            for key, scale in (("nll", 1.0), ("sampled", 100.0), ("greedy", 100.0))
        }

    controls = {
        label.replace("SPIN", "SFT"): curve(label, "sft ")
        for label, changes in played.items()
        if "control" in changes
    }
    return controls | {label: curve(label, "") for label in played}


@pytest.mark.parametrize("world", WORLDS)
def test_successors(world: str, record: Callable[..., Path]) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    if world == "chain" and not (CHAIN / "model").exists():
        script = Path(__file__).parent.parent / "scripts" / "make_chain.py"
        subprocess.run([sys.executable, script, "--out", CHAIN], check=True)
    jobs = [(world, label, seed) for seed in SEEDS for label in PLAYED[world]]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        found = list(pool.map(play, *zip(*jobs, strict=True)))
    header = ["setting", "best t", "NLL", "sampled %", "greedy %"]
    header += ["NLL - SFT's best", "sampled - SFT's best", "last: NLL", "sampled %", "greedy %"]
    header += ["last: NLL - SPIN's"]
    known = curves(found)
    bars = [at_best(curve) for name, curve in known.items() if name.startswith("SFT")]
    bar = min(bars, key=lambda best: best["nll"].mean())
    table = [["base", "", *cells(known["SFT"], 0), "", "", "", "", "", ""]]
    for label, curve in known.items():
        best, ours = int(curve["nll"].mean(0).argmin()), at_best(curve)
        ahead = [
            spread(ours[key] - bar[key], digits, sign="+")
            for key, digits in (("nll", 3), ("sampled", 1))
        ]
        name = "base" if best == 0 else str(best - 1)
        beside = spread((curve["nll"] - known["SPIN"]["nll"])[:, -1], 3, sign="+")
        table.append([label, name, *cells(curve, best), *ahead, *cells(curve, -1), beside])
    prompts = WORLDS[world]["selfplay"]["prompts"]
    text = (
        f"`pytest benchmarks/test_successors.py --benchmark -k {world}`; {ITERATIONS} iterations "
        f"of {prompts} prompts, one epoch each, 256 held-out prompts, "
        f"{len(SEEDS)} seeds: mean ± standard error over seeds (differences: of each seed's pair). "
        "Best t: the iterate, or the base, of the lowest mean NLL; SFT is the control of equal "
        "cost. NLL in nats an answer."
    )
    path = record(f"successors-{world}", header, table, text, found)
    draw(known, path.with_suffix(".svg"))
    runs = [settings(world, label, seed).run_folder() for label in PLAYED[world] for seed in SEEDS]
    overview.write(runs, path.with_suffix(".html"))


def at_best(curve: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each measure [seeds] at the iterate of the lowest mean NLL."""
    best = int(curve["nll"].mean(0).argmin())
    return {key: values[:, best] for key, values in curve.items()}


def cells(curve: dict[str, np.ndarray], t: int) -> list[str]:
    return [
        spread(curve[key][:, t], digits)
        for key, digits in (("nll", 3), ("sampled", 1), ("greedy", 1))
    ]


def draw(known: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """NLL and sampled exact match by iteration."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "alphaspin"  # the same bytes for the same numbers
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for axes, key, name in zip(
        panels, ("nll", "sampled"), ("NLL/answer", "sampled %"), strict=True
    ):
        for i, (label, curve) in enumerate(known.items()):
            mean, n = curve[key].mean(0), len(curve[key])
            error = curve[key].std(0, ddof=1) / math.sqrt(n)
            style = (
                {"linewidth": 3} if label.startswith("SFT") else {"marker": "osD^v<>xP*+"[i - 1]}
            )
            axes.errorbar(range(-1, ITERATIONS), mean, error, label=label, capsize=2, **style)
        axes.set_title(name)
        axes.set_xlabel("iteration (-1: the base)")
    panels[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
