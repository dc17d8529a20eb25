"""An optimiser step on the pairs that a run really played: this project, and TRL's `DPOTrainer`.

`pytest benchmarks/test_as_played.py --benchmark` plays the embedded default (minutes), or takes the
run folder of one in ALPHASPIN_RUN, and takes steps on its pairs of t = 0, 1, 2 with its batch size,
from the previous iterate. Random pairs, as in `test_end_to_end`, have nothing in common; those of a
run are short, often equal and mostly begin alike. A pair with rejected = chosen has no gradient: it
is not computed here and is in TRL. All variants take the same steps, interleaved, each on pairs of
its own, and must have the same losses.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
import pytest
import torch
from measure import Goal
from test_end_to_end import PREVIOUS, Ours, Size, Trl, Variant, base

from alphaspin import load_config, play
from alphaspin.commands.inputs import load_data
from alphaspin.commands.played import Played
from alphaspin.foundation.paths import packaged
from alphaspin.methods.session import load_answers
from alphaspin.model.batching import collate
from alphaspin.model.settings import LoraConfig
from alphaspin.model.tree import Tree

OURS = "alphaspin"
ROUNDS = 8


def played(run: Path, t: int, folder: Path) -> tuple[list[Tree], int, float]:
    """A run's pairs, its batch size and β; base and previous iterate are put into `folder`."""
    found = Played.open(run)
    _, chat = found.load(torch.device("cpu"))
    demonstrations, _ = load_data(found.config, chat)
    shards = sorted((run / "iterations" / str(t) / "opponents").iterdir())
    answers = [pair for shard in shards for pair in load_answers(shard)]
    trees = [
        Tree(demonstrations[e].prompt, (demonstrations[e].response, answer.tokens))
        for e, answer in answers
    ]
    shutil.copytree(packaged("tiny/model"), folder)
    if t:
        shutil.copytree(run / "iterations" / str(t - 1) / "adapter", folder / PREVIOUS)
    else:
        fresh(folder, found.config.lora)
    return trees, found.config.train.batch_size, found.config.loss.beta[0]


def fresh(folder: Path, lora: LoraConfig) -> None:
    """The adapter of a first iteration, whose update is zero."""
    backbone = base(folder)
    backbone.add_adapter(PREVIOUS, lora, seed=0, iteration=0)
    (folder / PREVIOUS).mkdir()
    backbone.save_adapter(PREVIOUS, folder / PREVIOUS)


def counts(trees: list[Tree]) -> tuple[str, list[list[str]]]:
    """The share of equal pairs, and rows by kind: per pair, and of what TRL computes."""
    unequal = [tree for tree in trees if not np.array_equal(*tree.responses)]
    batch = collate([(None, unequal)], layout="packed")
    asking = len(batch.last.asking.tokens) if batch.last else batch.input_ids.numel()
    twice = sum(2 * len(t.prompt) + sum(map(len, t.responses)) for t in trees)
    once = sum(len(t.prompt) + sum(map(len, t.responses)) for t in unequal)
    found = {
        "TRL: tokens of all pairs, prompts twice, in body and head": (twice, twice),
        "unequal pairs, prompts once": (once, sum(len(y) for t in unequal for y in t.responses)),
        "what they share once, no last tokens": (batch.input_ids.numel(), len(batch.targets)),
        "the same in the last layer's queries and MLP": (asking, len(batch.targets)),
    }
    rows = [[k, *(f"{v / len(trees):.1f}" for v in pair)] for k, pair in found.items()]
    return f"{1 - len(unequal) / len(trees):.1%}", rows


@pytest.fixture(scope="module")
def run(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """A finished run of the embedded default; None without `--benchmark`."""
    if not pytestconfig.getoption("--benchmark"):
        return None
    if given := os.environ.get("ALPHASPIN_RUN"):
        return Path(given)
    output = tmp_path_factory.mktemp("run") / "tiny"
    config = load_config("tiny").model_copy(update={"output": str(output), "control": "none"})
    return Path(play(config).path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("t", [0, 1, 2])
def test_as_played(
    t: int, run: Path | None, measuring: bool, record: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    folder, rounds = tmp_path / "model", ROUNDS
    if not measuring or run is None:  # small, and as pairs of a run are
        size = Size(300, hidden=64, layers=2, pairs=8, prompt=6, shortest=5, longest=9)
        trees, batch, beta, rounds = size.trees(), 4, 0.1, 1
        trees[1] = Tree(trees[1].prompt, trees[1].responses[:1] * 2)
        trees[2].responses[1][:3] = trees[2].responses[0][:3]
        size.folder(folder)
    else:
        trees, batch, beta = played(run, t, folder)
    variants: dict[str, Variant] = {
        **{
            f"TRL DPOTrainer, {n} pairs at once": Trl(folder, n, beta)
            for n in sorted({batch, 16, 4} if measuring else {batch}, reverse=True)
        },
        OURS: Ours(folder, batch, beta=beta),
        f"{OURS}, equal pairs too": Ours(folder, batch, beta=beta, skip=False),
    }
    wall: dict[str, list[float]] = {label: [] for label in variants}
    losses: dict[str, list[float]] = {label: [] for label in variants}
    for number in range(rounds + 1):  # the first is warm-up
        part = trees[number * batch : (number + 1) * batch]
        for variant in variants.values():
            variant.use(part)
            variant.prepare()
        for label, variant in variants.items():
            started = time.perf_counter()
            losses[label].append(variant.step())
            wall[label].append(time.perf_counter() - started)
    for label, found in losses.items():
        np.testing.assert_allclose(found, losses[OURS], rtol=2e-3, err_msg=label)
    seconds = {label: statistics.median(times[1:]) for label, times in wall.items()}
    best = min((label for label in seconds if label.startswith("TRL")), key=seconds.__getitem__)

    def gain(label: str) -> float:
        pairs = zip(wall[best][1:], wall[label][1:], strict=True)
        return statistics.median(theirs / mine for theirs, mine in pairs)

    table = [[k, f"{1e3 * seconds[k]:.0f}", f"{gain(k):.2f}"] for k in variants]
    share, rows = counts(trees)
    name = "throughput as played / TRL's best"
    goals = [Goal(name, gain(OURS), 5, " ×", True)] if t == 1 else []
    lines = [["measure", "goal", "measured", ""], ["---"] * 4, *(goal.row() for goal in goals)]
    lines = lines if goals else []
    more = [["rows a pair", "body", "head"], ["---"] * 3, *rows]
    text = (
        f"Pairs of iteration {t}, {batch} a step; {share} of {len(trees)} have rejected = chosen. "
        f"Medians of {rounds} interleaved steps and of their ratios to {best!r}. "
        f"{measure._load()}\n\n"
        + "\n".join("| " + " | ".join(line) + " |" for line in more)
        + "\n\n"
        + "\n".join("| " + " | ".join(line) + " |" for line in lines)
    ).rstrip()
    header = ["variant", "ms a step", "× TRL's best"]
    path = record(f"as-played-{t}", header, table, text, {"wall": wall, "losses": losses})
    print("\n" + path.read_text(encoding="utf-8"))
