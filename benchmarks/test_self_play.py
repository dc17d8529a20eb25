"""Who should play? SPIN, α-SPIN and its consistent form on the embedded default, three seeds each.

    pytest benchmarks/test_self_play.py --benchmark

The runs lie in `runs/evidence` (or ALPHASPIN_RUNS), one process per core plays them with one
thread, and what is finished is not played again: stop and start as you like.

With α = 0.5 the tabular theory (`config.contraction_note`) says what an iteration, trained to its
optimum, multiplies the distance from its fixed point by:

    β     SPIN, 1 - 1/β   α-SPIN, α - 1/β   consistent, α (1 - 1/β)
    1           0              -0.5                0
    0.4        -1.5            -2                 -0.75

At β = 0.4 each iteration has three times the prompts, to come nearer to that optimum (epochs in
their place overfit). The learning rate is constant, so that later iterations move as far as early
ones.
"""

import itertools
import json
import math
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alphaspin.config import Config
from alphaspin.foundation.paths import packaged
from alphaspin.report import overview

SEEDS = (0, 1, 2)
PROMPTS = {1.0: 1024, 0.4: 3072}  # of an iteration, by β
ALPHA = 0.5
RUNS = Path(os.environ.get("ALPHASPIN_RUNS", "runs/evidence"))
COMMON: dict[str, Any] = {
    "model": "tiny",
    "data": "tiny",
    "heldout": "tiny",
    "text": {"max_prompt_tokens": 96, "max_response_tokens": 32},
    "train": {"batch_size": 32, "lr": 5e-4, "schedule": "constant"},
    "evaluate": {"prompts": 256},
}
MIXED = {"reference": {"alpha": ALPHA}}
CONSISTENT = MIXED | {"selfplay": {"opponent": "mixture-token"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "SPIN": {},
    "α-SPIN, h = 1": MIXED,
    "α-SPIN, h = 2": MIXED | {"selfplay": {"history": 2}},
    "α-SPIN, h = ∞": MIXED | {"selfplay": {"opponent": "fictitious"}},
    "consistent, token level": CONSISTENT,
    "consistent, SMC": MIXED
    | {"selfplay": {"opponent": "mixture-smc"}, "sampling": {"particles": 8}},
    "consistent, GFlowNet": MIXED
    | {
        "selfplay": {"opponent": "mixture-gflownet"},
        "gflownet": {"prompts": 256, "epochs": 1, "batch_size": 8, "answers": 16},
    },
}
ITERATIONS = 6
MEASURES = (("nll", "sampled"), ("NLL/answer", "sampled %"))

# Does self-play beat further SFT at equal cost where demonstrations are few and seen often? From
# the embedded base, and from what one iteration of SFT on the same few makes of it.
FEW, EPOCHS = 192, 5
NLL = {"loss": {"nll_weight": 1.0}}
REGIMES: dict[str, dict[str, Any]] = {
    "few, SPIN": {"control": "sft"},
    "few, SPIN + NLL": NLL,
    "few, SPIN + 10 NLL": {"loss": {"nll_weight": 10.0}},
    "few, consistent, token level": CONSISTENT,
    "few, consistent, token level + 10 NLL": CONSISTENT | {"loss": {"nll_weight": 10.0}},
}
AFTER: dict[str, dict[str, Any]] = {
    "after SFT, SPIN": {"control": "sft"},
    "after SFT, SPIN + NLL": NLL,
    "after SFT, consistent, token level + NLL": CONSISTENT | NLL,
}
GROUPS: dict[str, tuple[float, dict[str, dict[str, Any]]]] = {
    **{f"β = {beta:g}": (beta, VARIANTS) for beta in PROMPTS},
    f"{FEW} demonstrations, {EPOCHS} epochs, β = 1": (1.0, REGIMES),
    f"the same {FEW} after SFT on them, β = 1": (1.0, AFTER),
}


def settings(label: str, beta: float, seed: int) -> Config:
    """One run; SFT depends on neither opponent nor β, so SPIN's control is that of all others."""
    changes = (VARIANTS | REGIMES | AFTER)[label]
    name = re.sub(r"\W+", "-", label.replace("∞", "all"))
    fields = COMMON | changes | {"name": name, "seed": seed}
    fields["loss"] = {"beta": beta} | changes.get("loss", {})
    play = {"iterations": ITERATIONS, "prompts": PROMPTS[beta]}
    if label not in VARIANTS:
        fields["data"] = str(RUNS / "few.jsonl")
        play["prompts"] = FEW
        fields["train"] = COMMON["train"] | {"epochs": EPOCHS}
    elif label == "SPIN":
        fields["control"] = "sft"
    if label in AFTER:
        fields["model"] = str(RUNS / f"sft-seed{seed}")
    fields["selfplay"] = play | changes.get("selfplay", {})
    fields["output"] = str(RUNS / f"{name}-beta{beta:g}-seed{seed}")
    return Config.model_validate(fields)


def play(label: str, beta: float, seed: int) -> dict[str, Any]:
    """The rows of one run's table; a finished run is read, not played."""
    torch.set_num_threads(1)
    return {"label": label, "beta": beta, "seed": seed} | outcome(settings(label, beta, seed))


def outcome(config: Config) -> dict[str, Any]:
    """What a run came to; a finished run is read, not played."""
    from alphaspin.commands.job import run

    done = config.run_folder() / "summary.json"
    summary = json.loads(done.read_text()) if done.exists() else run(config)
    keys = ("name", "nll", "sampled", "greedy")
    rows = [{key: row[key] for key in keys} for row in summary["rows"]]
    return {"rows": rows, "seconds": sum(summary["seconds"].values())}


def tuned(seed: int) -> None:
    """The base of the regimes `AFTER`: iteration 0 of the control of "few, SPIN", merged."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = RUNS / f"sft-seed{seed}"
    if folder.exists():
        return
    run = settings("few, SPIN", 1.0, seed).run_folder()
    base = packaged("tiny/model")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(run / "control" / "sft" / "0" / "adapter"))
    unfinished = folder.with_suffix(".unfinished")
    model.merge_and_unload().save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(base).save_pretrained(unfinished)
    unfinished.rename(folder)


def test_self_play(record: Callable[..., Path]) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    rows = packaged("tiny/train.jsonl").read_text(encoding="utf-8").splitlines(True)[:FEW]
    (RUNS / "few.jsonl").write_text("".join(rows), encoding="utf-8")
    *first, after = (
        [(label, beta, seed) for seed in SEEDS for label in labels]
        for beta, labels in GROUPS.values()
    )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        found = list(pool.map(play, *zip(*itertools.chain(*first), strict=True)))
        for seed in SEEDS:
            tuned(seed)
        found += pool.map(play, *zip(*after, strict=True))
    curves = collect(found)
    header = ["setting", "β", "measure", *("base", *(f"t = {t}" for t in range(ITERATIONS)))]
    header += ["change from t = 1", "seconds"]
    table: list[list[str]] = []
    for (label, beta), curve in curves.items():
        for measure in ("nll", "sampled", "greedy"):
            values = curve[measure]
            digits = 3 if measure == "nll" else 1
            cells = [spread(column, digits) for column in values.T]
            change = spread(values[:, -1] - values[:, 2], digits, sign="+")
            unit = "NLL/answer" if measure == "nll" else f"{measure} %"
            table.append([label, f"{beta:g}", unit, *cells, change, f"{curve['seconds']:.0f}"])
    text = (
        f"`pytest benchmarks/test_self_play.py --benchmark`; {ITERATIONS} iterations of "
        f"{PROMPTS[1.0]} prompts at β = 1, {PROMPTS[0.4]} at β = 0.4 (`few` "
        f"and `after SFT`, from a base tuned on these {FEW}: {FEW}, {EPOCHS} epochs), 256 "
        f"held-out prompts, {len(SEEDS)} seeds: mean ± standard error over seeds, each seed with "
        f"prompts, noise and adapters of its own but one base. α = {ALPHA:g} but for SPIN. SFT is "
        "the control of equal cost; seconds are a run's, on one thread, the control's included in "
        "its run."
    )
    path = record("self-play", header, table, text, found)
    draw(curves, path.with_suffix(".svg"))
    for beta, labels in GROUPS.values():
        if labels is AFTER:
            continue  # a base for each seed: not one setting
        runs = [settings(label, beta, seed).run_folder() for label in labels for seed in SEEDS]
        page = f"self-play-{next(iter(labels))}-{beta:g}.html".replace(", ", "-").replace(" ", "-")
        overview.write(runs, path.with_name(page.lower()))


def control(label: str) -> str:
    """What the table calls a run's SFT control."""
    return label.replace("SPIN", "SFT")


def collect(found: list[dict[str, Any]]) -> dict[tuple[str, float], dict[str, Any]]:
    """Curves [seeds, 1 + iterations] by (label, β), SFT controls among them; shares in per cent."""
    curves: dict[tuple[str, float], dict[str, Any]] = {}
    for entry in found:
        names = [row["name"] for row in entry["rows"]]
        kinds = {"": entry["label"]}
        if any(name.startswith("sft ") for name in names):
            kinds["sft "] = control(entry["label"])
        for prefix, label in kinds.items():
            wanted = ["base", *(f"{prefix}{t}" for t in range(ITERATIONS))]
            rows = [entry["rows"][names.index(name)] for name in wanted]
            curve = curves.setdefault((label, entry["beta"]), {"seconds": 0.0})
            curve["seconds"] += entry["seconds"] / len(SEEDS)
            for measure in ("nll", "sampled", "greedy"):
                scale = 1 if measure == "nll" else 100
                values = scale * np.array([[row[measure] for row in rows]])
                curve[measure] = np.concatenate([curve.get(measure, values[:0]), values])
    return curves


def spread(values: np.ndarray, digits: int, sign: str = "") -> str:
    """Mean ± standard error over seeds."""
    error = values.std(ddof=1) / math.sqrt(len(values))
    return f"{values.mean():{sign}.{digits}f} ± {error:.{digits}f}"


def draw(curves: dict[tuple[str, float], dict[str, Any]], path: Path) -> None:
    """NLL and accuracy by iteration, one row of panels per question."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "alphaspin"  # the same bytes for the same numbers
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(GROUPS), 2, figsize=(11, 13), layout="constrained")
    for (title, (beta, labels)), line in zip(GROUPS.items(), panels, strict=True):
        chosen = [
            (label, curve)
            for (label, its_beta), curve in curves.items()
            if its_beta == beta and label in {*labels, *map(control, labels)}
        ]
        for axes, measure, name in zip(line, *MEASURES, strict=True):
            for label, curve in chosen:
                values = curve[measure]
                error = values.std(0, ddof=1) / math.sqrt(len(values))
                axes.errorbar(range(-1, ITERATIONS), values.mean(0), error, label=label, capsize=2)
            axes.set_title(f"{title}: {name}")
            axes.set_xlabel("iteration (-1: the base)")
        line[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
