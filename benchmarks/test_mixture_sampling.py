"""How exactly the samplers of the geometric mixture sample it.

Enumerable worlds (all answers listed, laws computed) and the embedded model (effective sample size
and spread of the weights). `pytest benchmarks/test_mixture_sampling.py --benchmark`.
"""

import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import worlds
from test_self_play import RUNS, settings

from alphaspin.commands.job import run
from alphaspin.data.chat import ChatFormat
from alphaspin.data.demonstrations import load_demonstrations
from alphaspin.foundation.paths import packaged
from alphaspin.foundation.runs import Metrics
from alphaspin.model.distributed import Team
from alphaspin.model.load import load_base
from alphaspin.model.routing import POLICY
from alphaspin.model.settings import LoraConfig
from alphaspin.model.stepper import Policy, Stepper, corrected
from alphaspin.sampling import gflownet, mixture
from alphaspin.sampling.answer import Draw
from alphaspin.sampling.settings import GFlowNetConfig

ALPHAS = (0.25, 0.5, 0.75, 0.95)
Place = tuple[int, int, int, float, int]
"""Seed, vocabulary, cap, bias on the end token's logit, steps of the GFlowNet."""
WORLDS: tuple[Place, ...] = (
    (0, 5, 4, 0.0, 1500),
    (1, 6, 4, 0.0, 1500),
    (2, 5, 5, 0.0, 1500),
    (3, 7, 4, 0.0, 1500),
    (4, 8, 4, 0.0, 4000),
)
CAPPED: tuple[Place, ...] = (  # most answers reach the cap
    (5, 5, 4, -4.0, 1500),
    (1, 9, 3, 0.0, 1500),
    (2, 9, 3, 0.0, 1500),
    (6, 9, 3, -2.0, 1500),
    (3, 8, 3, 0.0, 1500),
    (4, 6, 4, -2.0, 1500),
    (7, 5, 5, -2.0, 1500),
)
PLACES = {"enumerable": (WORLDS, ALPHAS), "capped": (CAPPED, (0.5,))}
PROMPT = np.array([2, 3], np.int32)
DRAWS = 64


def metropolis_law(log_q: Tensor, log_w: Tensor, draws: int) -> Tensor:
    """The exact law of the chain after `draws` proposals, start included."""
    move = log_q.exp() * (log_w - log_w[:, None]).clamp(max=0).exp()
    move.diagonal().add_(1 - move.sum(1))
    law = log_q.exp()
    for _ in range(draws - 1):
        law = law @ move
    return law.log()


def smc_error(
    world: worlds.World, target: Policy, levels: worlds.Levels, runs: int
) -> tuple[float, float, float]:
    """Total variation between π and the law of one answer of 64 particles, the total variation that
    Monte Carlo error alone would show, and the root mean square error of log Ẑ.

    The law is E[W_y] with normalised weights W, and E[W_y Ẑ/Z] = π(y) (tests/test_mixture.py), so
    their difference is E[W_y (1 - Ẑ/Z)], which has little variance.
    """
    number = {answer.tobytes(): i for i, answer in enumerate(world.answers())}
    setting = mixture.Setting(target, DRAWS, world.cap, frozenset(world.stops))
    total = torch.zeros(2, len(number), dtype=torch.float64)  # Σ and Σ² over runs
    log_z = float(world.logps(levels).logsumexp(0))
    squares, block = 0.0, 250
    for first in range(0, runs, block):
        draws = [Draw(0, 0, "smc", first + r) for r in range(block)]
        steps = worlds.TableSteps(world, levels)
        found = mixture.smc(steps, setting, [PROMPT] * block, draws)
        index = torch.tensor([[number[a.tokens.tobytes()] for a in g] for g in found.answers])
        off = mixture.log_mean(found.log_w_BN) - log_z
        excess = torch.zeros(block, len(number), dtype=torch.float64)
        excess.scatter_add_(1, index, found.log_w_BN.softmax(1) * -off.expm1()[:, None])
        total += torch.stack([excess.sum(0), excess.square().sum(0)])
        squares += float(off.square().sum())
    mean = total[0] / runs
    error = ((total[1] / runs - mean.square()).clamp(min=0) / runs).sqrt()
    noise = 0.5 * math.sqrt(2 / math.pi) * float(error.sum())
    return 0.5 * float(mean.abs().sum()), noise, math.sqrt(squares / runs)


def enumerable(place: Place, alpha: float, runs: int, folder: Path) -> dict[str, Any]:
    """All samplers in one world at one α, on one thread; what `folder` holds is not done again."""
    torch.set_num_threads(1)
    seed, vocabulary, cap, bias, steps = place
    folder = folder / f"{seed}-{vocabulary}-{cap}-{bias:g}-{alpha}-{steps}"
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "found.json").exists():
        return json.loads((folder / "found.json").read_text())
    world = worlds.World(tuple(i for i in range(vocabulary) if i != 1), (1,), cap)
    size = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    backbone = worlds.transformer(seed, vocabulary, spread=0.2, stop_bias=bias, **size)
    target: Policy = {"previous": alpha, None: 1 - alpha}
    policies = {name: worlds.levels(backbone, name, PROMPT.tolist(), world) for name in target}
    mixed = worlds.mixed(target, policies)
    log_p, log_z = worlds.exact(world, target, policies)
    token = world.logps(worlds.token_level(target, policies))
    imh = metropolis_law(token, log_p - token, DRAWS)
    smc, noise, smc_rms = smc_error(world, target, mixed, runs)
    started = time.perf_counter()
    config = GFlowNetConfig(
        prompts=1,
        batch_size=1,
        epochs=steps,
        answers=64,
        lr=1e-3,
        checkpoint_every=10**6,
        lora=LoraConfig(r=32, alpha=32),
    )
    stops = frozenset(world.stops)
    task = gflownet.Task(target, [PROMPT], cap, stops, config, seed, 0, "gflownet", folder)
    gflownet.train_sampler(backbone, task, Metrics(folder / "metrics.jsonl"), Team(backbone.device))
    seconds = time.perf_counter() - started
    backbone.load_adapter(POLICY, folder / "adapter")
    policy = corrected(target, POLICY)
    policies[POLICY] = worlds.levels(backbone, POLICY, PROMPT.tolist(), world)
    levels = worlds.token_level(policy, policies)
    sampler = world.logps(levels)
    setting = mixture.Setting(target, DRAWS, cap, stops)
    draws = [Draw(seed, 0, "check", 0)]
    weighed = mixture.independent(backbone, setting, [PROMPT], draws, proposal=policy).diagnose()
    found = {
        "seed": seed,
        "vocabulary": vocabulary,
        "cap": cap,
        "answers": len(log_p),
        "cut": float(log_p[-((vocabulary - 1) ** cap) :].exp().sum()),
        "alpha": alpha,
        "log_z": log_z,
        "apart": worlds.variation(*(world.logps(policies[name]) for name in target)),
        "tv": {
            "token": worlds.variation(log_p, token),
            "imh": worlds.variation(log_p, imh),
            "smc": smc,
            "smc_noise": noise,
            "gflownet": worlds.variation(log_p, sampler),
        },
        "kl": {
            "token": worlds.divergence(log_p, token),
            "imh": worlds.divergence(log_p, imh),
            "gflownet": worlds.divergence(log_p, sampler),
        },
        "log_z_error": {
            "smc_rms": smc_rms,
            "gflownet_root": float((mixed[0] - levels[0])[0, 1]) - log_z,
            "gflownet_weights": float(weighed.log_z) - log_z,
        },
        "steps": steps,
        "seconds": seconds,
    }
    (folder / "found.json").write_text(json.dumps(found))
    return found


@pytest.mark.parametrize("name", PLACES)
def test_enumerable_worlds(
    name: str, measuring: bool, tmp_path: Path, record: Callable[..., Path]
) -> None:
    places, alphas = PLACES[name]
    if not measuring:
        bias = places[0][3]
        places, alphas = ((0, 5, 2, bias, 10),), (0.5,)
    runs = 2000 if measuring else 250
    jobs = [(place, alpha) for place in places for alpha in alphas]
    count = os.cpu_count() if measuring else 1
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        folder = RUNS / "worlds" if measuring else tmp_path
        play = partial(enumerable, runs=runs, folder=folder)
        raw: list[dict[str, Any]] = []
        for found in (pool.map if measuring else map)(play, *zip(*jobs, strict=True)):
            raw.append(found)
            print(found, flush=True)
    torch.set_num_threads(threads)
    header = [
        "seed", "V, cap", "steps", "answers", "cut %", "α", "log Z", "TV token", "TV IMH",
        "TV SMC (noise)", "TV GFlowNet", "/ token", "KL token", "KL IMH", "KL GFlowNet",
        "log Ẑ SMC", "r₀", "weights",
    ]  # fmt: skip
    rows = [
        [
            str(r["seed"]),
            f"{r['vocabulary']}, {r['cap']}",
            str(r["steps"]),
            str(r["answers"]),
            f"{100 * r['cut']:.0f}",
            f"{r['alpha']:g}",
            f"{r['log_z']:.4f}",
            f"{r['tv']['token']:.4f}",
            f"{r['tv']['imh']:.1e}",
            f"{r['tv']['smc']:.1e} ({r['tv']['smc_noise']:.1e})",
            f"**{r['tv']['gflownet']:.4f}**",
            f"{r['tv']['gflownet'] / r['tv']['token']:.2f}",
            f"{r['kl']['token']:.1e}",
            f"{r['kl']['imh']:.1e}",
            f"{r['kl']['gflownet']:.1e}",
            f"{r['log_z_error']['smc_rms']:.4f}",
            f"{r['log_z_error']['gflownet_root']:+.4f}",
            f"{r['log_z_error']['gflownet_weights']:+.4f}",
        ]
        for r in raw
    ]
    worst = max(r["tv"]["gflownet"] for r in raw)
    ratio = max(r["tv"]["gflownet"] / r["tv"]["token"] for r in raw)
    off = max(abs(r["log_z_error"][k]) for r in raw for k in ("gflownet_root", "gflownet_weights"))
    particles = max(r["tv"]["smc"] for r in raw)

    def judged(measure: str, value: float, limit: float) -> str:
        verdict = "met" if value <= limit else "**missed**"
        return f"| {measure} | ≤ {limit:g} | {value:.4f} | {verdict} |"

    text = "\n".join(
        [
            f"""Random 2-layer Llamas of width 64, π_prev a random LoRA of rank 8; π_prev and base
are {min(r["apart"] for r in raw):.2f} to {max(r["apart"] for r in raw):.2f} apart in total
variation. Laws of token-level decoding, IMH (64 proposals) and the GFlowNet are computed over all
answers; SMC's (64 particles) is the mean of {runs:,} runs, and in brackets is the total
variation that its Monte Carlo error alone would show. Errors of log Z: SMC root mean square;
GFlowNet by r₀, and by the weights of 64 draws. GFlowNet: rank 32, so many steps of 64 answers, lr
1e-3, {min(r["seconds"] for r in raw):.0f} to {max(r["seconds"] for r in raw):.0f} s each, on
one thread of a shared machine.""",
            "",
            "| worst of all rows | goal | measured | |",
            "| --- | --- | --- | --- |",
            judged("GFlowNet, total variation", worst, 0.005),
            judged("GFlowNet / token level", ratio, 0.2),
            judged("GFlowNet, error of log Ẑ", off, 0.01),
            judged("SMC, total variation, noise included", particles, 0.01),
        ]
    )
    record(f"mixture-{name}", header, rows, text, raw)


def test_embedded_model(tmp_path: Path, record: Callable[..., Path]) -> None:
    """π_prev is the last iterate of a run of `test_self_play`, far from the base."""
    spin = settings("SPIN", beta=0.4, seed=0)
    last = run(spin)["config"]["selfplay"]["iterations"] - 1
    backbone, tokenizer = load_base("tiny", dtype="fp32", device=torch.device("cpu"))
    backbone.load_adapter("previous", spin.run_folder() / "iterations" / str(last) / "adapter")
    chat = ChatFormat.create(tokenizer, "auto", backbone.stop_ids)
    train, heldout = (
        load_demonstrations(str(packaged(f"tiny/{name}.jsonl")), chat, spin.text, "train")[0]
        for name in ("train", "heldout")
    )
    learning = GFlowNetConfig(prompts=1000, epochs=6, lr=1e-4)
    steps = learning.epochs * learning.prompts // learning.batch_size
    target: Policy = {"previous": 0.5, None: 0.5}
    prompts = [demo.prompt for demo in heldout[:128]]
    raw: list[dict[str, Any]] = []
    for cap in (8, 16, 32):
        folder = tmp_path / str(cap)
        folder.mkdir()
        used = [demo.prompt for demo in train[: learning.prompts]]
        stops = chat.stop_token_ids
        task = gflownet.Task(target, used, cap, stops, learning, 0, 0, "gflownet", folder)
        started = time.perf_counter()
        gflownet.train_sampler(
            backbone, task, Metrics(folder / "metrics.jsonl"), Team(backbone.device)
        )
        seconds = time.perf_counter() - started
        backbone.load_adapter(POLICY, folder / "adapter")
        setting = mixture.Setting(target, DRAWS, cap, stops, batch_size=512)
        draws = [Draw(0, 0, "check", e) for e in range(len(prompts))]
        found = {
            "token": mixture.independent(backbone, setting, prompts, draws),
            "gflownet": mixture.independent(
                backbone, setting, prompts, draws, proposal=corrected(target, POLICY)
            ),
            "smc": mixture.smc(Stepper(backbone, log_normalisers=True), setting, prompts, draws),
        }
        for name, result in found.items():
            judged = result.diagnose()
            raw.append(
                {
                    "cap": cap,
                    "sampler": name,
                    "ess": judged.size.tolist(),
                    "last_ess": (mixture.effective_size(result.log_w_BN) / DRAWS).tolist(),
                    "variance": judged.spread.tolist(),
                    "log_z": judged.log_z.tolist(),
                    "untrusted": int((~judged.trusted).sum()),
                    "cut": float(np.mean([a.truncated for g in result.answers for a in g])),
                    "length": float(np.mean([len(a.tokens) for g in result.answers for a in g])),
                    "seconds": seconds if name == "gflownet" else None,
                }
            )
            print({k: v for k, v in raw[-1].items() if not isinstance(v, list)}, flush=True)
    header = [
        "cap", "sampler", "ESS/n", "lowest", "ESS/n, last weights", "Var(log w)", "largest",
        "mean log Ẑ", "untrusted", "cut %", "tokens",
    ]  # fmt: skip
    rows = [
        [
            str(r["cap"]),
            r["sampler"],
            f"{np.mean(r['ess']):.3f}",
            f"{min(r['ess']):.3f}",
            f"{np.mean(r['last_ess']):.3f}",
            f"{np.mean(r['variance']):.4f}",
            f"{max(r['variance']):.3f}",
            f"{np.mean(r['log_z']):+.4f}",
            f"{r['untrusted']} of {len(prompts)}",
            f"{100 * r['cut']:.0f}",
            f"{r['length']:.1f}",
        ]
        for r in raw
    ]
    took = ", ".join(f"{r['seconds']:.0f}" for r in raw if r["seconds"])
    ess = {r["sampler"]: float(np.mean(r["ess"])) for r in raw if r["cap"] == 32}
    verdict = "met" if ess["gflownet"] >= max(0.8, ess["token"]) else "**missed**"
    text = f"""Embedded model, α = 0.5, π_prev SPIN's iterate {last} (β = 0.4, seed 0,
as in self-play.md); {DRAWS} draws for each of {len(prompts)} held-out prompts. ESS/n of SMC counts
draws with a common ancestor as one; its last weights are even by construction, and its Var(log w)
is theirs. GFlowNet: rank 16, {steps} steps of 8 prompts x 16 answers, lr 1e-4; {took} s on a
shared machine.

Goal, length 32: ESS/n >= 0.8 with the GFlowNet and above token level: {ess["gflownet"]:.3f}
against {ess["token"]:.3f}, {verdict}."""
    record("mixture-embedded", header, rows, text, raw)
