"""Why do a GFlowNet's iterates leave the base at t = 5? Iteration 5 again, with other losers.

    pytest benchmarks/test_last_iteration.py --benchmark

Where a GFlowNet draws the losers at β = 0.4 (`test_self_play`), KL to the base doubles at t = 5 in
all three seeds. `last-iteration` changes one thing in each row: a run's folder is copied without
its last iteration, which is then played with other settings. `rare-answers` asks whether the
sampler draws what is rare as often as the mixture does, on answers from sequential Monte Carlo.

What `test_self_play` has finished is read, and so are finished copies in `runs/evidence/again`.
"""

import itertools
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_self_play import ALPHA, ITERATIONS, RUNS, SEEDS, settings

from alphaspin.commands.inputs import load_data
from alphaspin.commands.job import run
from alphaspin.commands.played import Played
from alphaspin.config import Config
from alphaspin.foundation.artefacts import TEMPORARY
from alphaspin.methods.session import load_answers
from alphaspin.model.scoring import logps
from alphaspin.model.tree import Tree
from alphaspin.sampling import mixture
from alphaspin.sampling.answer import Draw
from alphaspin.training.settings import TrainConfig

BETA, LAST = 0.4, ITERATIONS - 1
GFLOWNET, SMC, TOKEN = (f"consistent, {sampler}" for sampler in ("GFlowNet", "SMC", "token level"))


class Row(NamedTuple):
    """Who played up to iterate 4, and who draws the losers of iteration 5.

    copies: name of the copied runs; none is copied for the run as it was played. prompts: those a
    GFlowNet is trained on, eight at a step, where they are not those of its own runs.
    """

    source: str
    losers: str
    title: str
    copies: str | None = None
    prompts: int | None = None

    def config(self, seed: int) -> Config:
        """The settings of iteration 5, with the folder of the copy."""
        config = settings(self.losers, BETA, seed)
        if self.copies is None:
            return config
        fields = config.model_dump(mode="json", exclude_unset=True)
        fields["output"] = str(RUNS / "again" / f"{self.copies}-{seed}")
        if self.prompts is not None:
            fields["gflownet"]["prompts"] = self.prompts
        return Config.model_validate(fields)


LONGER = Row(GFLOWNET, GFLOWNET, "GFlowNet, 125 steps", "gfn-gfn125", 1000)
PARTICLES = Row(GFLOWNET, SMC, "SMC", "gfn-smc8")
ROWS = (
    Row(GFLOWNET, GFLOWNET, "GFlowNet, 32 steps (as played)"),
    Row(GFLOWNET, GFLOWNET, "GFlowNet, 32 steps on other prompts", "gfn-gfn32b", 255),
    LONGER,
    Row(GFLOWNET, TOKEN, "token level", "gfn-token"),
    PARTICLES,
    Row(TOKEN, TOKEN, "token level (as played)"),
    Row(TOKEN, GFLOWNET, "GFlowNet, 32 steps", "token-gfn32"),
)


def again(row: Row, seed: int) -> dict[str, Any]:
    """Iterations 4 and 5 of one row and seed, from a run that `test_self_play` has finished."""
    torch.set_num_threads(1)
    config = row.config(seed)
    folder = config.run_folder()
    if row.copies is not None and not folder.exists():
        graft(settings(row.source, BETA, seed).run_folder(), config)
    summary = run(config)
    evaluated = last(folder) / "evaluation" / "evaluation.json"
    cut = float(np.mean(json.loads(evaluated.read_text())["truncated"]))
    before, after = summary["rows"][-2:]
    return {"before": before, "after": after, "cut": cut, "seed": seed}


def last(folder: Path) -> Path:
    """A run's last iteration."""
    return folder / "iterations" / str(LAST)


def graft(played: Path, config: Config) -> None:
    """Copy a run without its last iteration; the copy goes on with `config`."""
    target = config.run_folder()
    copy = target.with_name(TEMPORARY + target.name)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(played, copy, ignore=shutil.ignore_patterns("summary.json", "lock"))
    shutil.rmtree(last(copy))
    manifest = json.loads((copy / "manifest.json").read_text())
    for stage in ("train", "sampler"):
        manifest["adapters"].pop(f"{stage}/{LAST}", None)
    manifest["identity"]["config"] = config.identity()
    manifest["config"] = config.model_dump(mode="json")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    copy.rename(target)


@pytest.fixture(scope="module")
def found() -> dict[Row, list[dict[str, Any]]]:
    """Each row's seeds; the runs as played come first, since the others are copies of them."""
    result: dict[Row, list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for copied in (False, True):
            rows = [row for row in ROWS if (row.copies is not None) == copied]
            jobs = [(row, seed) for row in rows for seed in SEEDS]
            played = pool.map(again, *zip(*jobs, strict=True))
            result |= {row: [next(played) for _ in SEEDS] for row in rows}
    return result


def test_last_iteration(found: dict[Row, list[dict[str, Any]]], record: Callable[..., Any]) -> None:
    table: list[list[str]] = []
    for row in ROWS:

        def each(value: Callable[[dict[str, Any]], str], row: Row = row) -> str:
            return ", ".join(map(value, found[row]))

        table.append(
            [
                row.source,
                row.title,
                each(lambda f: f"{f['before']['kl']:.2f}"),
                each(lambda f: f"{f['after']['kl']:.2f}"),
                each(lambda f: f"{f['before']['nll']:.3f}"),
                each(lambda f: f"{f['after']['nll']:.3f}"),
                each(lambda f: f"{100 * f['after']['sampled']:.1f}"),
                each(lambda f: f"{100 * f['cut']:.1f}"),
            ]
        )
    header = ["iterate 4 of", "losers of iteration 5", "KL, t = 4", "KL, t = 5"]
    header += ["NLL, t = 4", "NLL, t = 5", "sampled %, t = 5", "cut %, t = 5"]
    text = (
        f"Seeds {', '.join(map(str, SEEDS))}; β = {BETA}, α = 0.5, else as self-play.md. KL to the "
        "base, nats per answer; cut: sampled answers that reach the cap of 32 tokens. The standard "
        "error of a KL over the 256 held-out prompts is .05 to .25."
    )
    record("last-iteration", header, table, text, [found[row] for row in ROWS])


BINS = (-np.inf, -8.0, -5.0, -3.0, -1.0, 0.5)  # of log π
PROMPTS, ANSWERS = 512, 32  # of a seed; draws per prompt for log Ẑ


def rare(seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """log π [B] of SMC's losers of iteration 5, and log q [2, B] of samplers of 32 and 125 steps.

    π is the mixture of the base and iterate 4 of the GFlowNet's run; log Z is estimated with
    token-level draws.
    """
    torch.set_num_threads(1)
    config = settings(GFLOWNET, BETA, seed)
    folder, longer = config.run_folder(), LONGER.config(seed).run_folder()
    backbone, chat = Played.open(folder).load(torch.device("cpu"))
    data = load_data(config, chat)[0]
    backbone.load_adapter("previous", folder / "iterations" / str(LAST - 1) / "adapter")
    backbone.load_adapter("few", last(folder) / "sampler" / "adapter")
    backbone.load_adapter("more", last(longer) / "sampler" / "adapter")
    shard = min((last(PARTICLES.config(seed).run_folder()) / "opponents").iterdir())
    examples, answers = zip(*itertools.islice(load_answers(shard), PROMPTS), strict=True)
    prompts = [data[example].prompt for example in examples]
    target = {"previous": ALPHA, None: 1 - ALPHA}
    cap = config.text.max_response_tokens
    setting = mixture.Setting(target, ANSWERS, cap, chat.stop_token_ids, batch_size=1024)
    draws = [Draw(seed, LAST, "log Z", example) for example in examples]
    found = mixture.independent(backbone, setting, prompts, draws)
    log_z_B = mixture.log_mean(found.log_w_BN).numpy()
    trees = [Tree(p, (answer.tokens,)) for p, answer in zip(prompts, answers, strict=True)]

    def logp(name: str | None) -> NDArray[np.float64]:
        return np.array(logps(backbone, name, trees, TrainConfig()))[:, 0]

    log_pi_B = sum(weight * logp(name) for name, weight in target.items()) - log_z_B
    return log_pi_B, np.stack([logp("few"), logp("more")])


@pytest.mark.usefixtures("found")
def test_rare_answers(record: Callable[..., Any]) -> None:
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        scored = list(pool.map(rare, SEEDS))
    log_pi_B = np.concatenate([log_pi for log_pi, _ in scored])
    gap_2B = np.concatenate([log_q for _, log_q in scored], 1) - log_pi_B
    table: list[list[str]] = []
    for low, high in itertools.pairwise(BINS):
        inside = (log_pi_B >= low) & (log_pi_B < high)
        means = gap_2B[:, inside].mean(1)
        errors = gap_2B[:, inside].std(1, ddof=1) / inside.sum() ** 0.5
        cells = [f"{m:+.3f} ± {e:.3f}" for m, e in zip(means, errors, strict=True)]
        table.append([f"{low:g} … {min(high, 0):g}", str(inside.sum()), *cells])
    header = ["log π(y)", "answers", "log q - log π, 32 steps", "125 steps"]
    text = (
        f"π: the mixture of the base and iterate {LAST - 1} of the GFlowNet's runs (β = {BETA}, "
        f"α = {ALPHA:g}, seeds {', '.join(map(str, SEEDS))}). Answers: {PROMPTS} for each seed, by "
        f"SMC with 8 particles; log Z from {ANSWERS} token-level draws for each prompt; q: the "
        "GFlowNet's adapter after 32 and 125 steps. Mean ± standard error over answers."
    )
    record("rare-answers", header, table, text, table)
