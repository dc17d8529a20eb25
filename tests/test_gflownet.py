"""The GFlowNet sampler against exact laws: the loss, the rewards, the start, training, resuming."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import worlds
from torch import Tensor

from alphaspin.commands.gflownet_job import run
from alphaspin.commands.options import GFlowNetRun
from alphaspin.errors import InputError, Interrupted
from alphaspin.foundation.runs import Metrics, SignalGuard
from alphaspin.model.backbone import WEIGHTS, Backbone
from alphaspin.model.distributed import Team
from alphaspin.model.routing import POLICY
from alphaspin.model.settings import LoraConfig
from alphaspin.model.stepper import Policy, corrected
from alphaspin.model.tree import Tokens
from alphaspin.sampling import gflownet, mixture
from alphaspin.sampling.answer import Answer, Draw
from alphaspin.sampling.gflownet import Replay, Task, Trajectory, edit_distance
from alphaspin.sampling.settings import GFlowNetConfig

PROMPT = np.array([2, 3], np.int32)
HALF: Policy = {"previous": 0.5, None: 0.5}
ENDS = worlds.World(letters=(0, 2, 3, 4), stops=(1, 5, 6), cap=3)


class Guard(SignalGuard):
    """A signal that comes by itself, when the `after`-th step looks for it."""

    def __init__(self, after: int):
        self.left = after

    @property
    def requested(self) -> bool:  # type: ignore[override]
        self.left -= 1
        return self.left < 0


def alone(after: int = 10**9) -> Team:
    return Team(torch.device("cpu"), Guard(after))


# The loss


def best_levels(world: worlds.World, levels: worlds.Levels) -> worlds.Levels:
    """The next-token log-probs of the exact mixture itself, from its mass beyond each prefix."""
    below = torch.zeros(len(world.letters) ** world.cap, dtype=levels[0].dtype)
    result: worlds.Levels = []
    for level in reversed(levels):
        ahead = level.clone()
        ahead[:, world.letters] += below.view(len(level), -1)
        below = ahead.logsumexp(1)
        result.insert(0, ahead - below[:, None])
    return result


def rows(world: worlds.World, levels: worlds.Levels, answers: list[Tokens]) -> Tensor:
    """log p of each token and of each end token in its place, [N, K]."""
    digit = {letter: i for i, letter in enumerate(world.letters)}
    found: list[Tensor] = []
    for answer in answers:
        prefix = 0
        for depth, token in enumerate(answer.tolist()):
            found.append(levels[depth][prefix, [token, *world.stops]])
            prefix = prefix * len(world.letters) + digit.get(token, 0)
    return torch.stack(found)


def loss_of(
    world: worlds.World, levels_q: worlds.Levels, levels_r: worlds.Levels, lam: float = 0.9
) -> float:
    answers = world.answers()
    log_q, log_r = (rows(world, levels, answers) for levels in (levels_q, levels_r))
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(len(world.stops), (len(log_q),), generator=generator)
    lengths = torch.tensor([len(answer) for answer in answers])
    truncated = torch.tensor([int(answer[-1]) not in world.stops for answer in answers])
    return float(gflownet.balance(log_q, log_r, ends, lengths, truncated, lam))


def three_ends() -> dict[str | None, worlds.Levels]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: [
            torch.randn(4**d, 7, generator=generator, dtype=torch.float64).log_softmax(1)
            for d in range(3)
        ]
        for name in ("previous", None)
    }


@pytest.mark.parametrize("world", [worlds.CHAIN, ENDS])
def test_the_loss_is_zero_at_the_exact_mixture_alone(world: worlds.World) -> None:
    """Over all answers, cut ones too, whichever end token stands for the others."""
    policies = worlds.chain() if world is worlds.CHAIN else three_ends()
    target = worlds.mixed(HALF, policies)
    exact = best_levels(world, target)
    assert worlds.variation(world.logps(exact), worlds.exact(world, HALF, policies)[0]) < 1e-12
    assert loss_of(world, exact, target) < 1e-20
    assert loss_of(world, worlds.token_level(HALF, policies), target) > 1e-3
    if world is ENDS:
        # The right mass on ending and on the first end token; of the other two half each. Neither
        # a sum over end tokens nor the first of them would see it.
        even = [level.clone() for level in exact]
        for level in even:
            level[:, [5, 6]] = (level[:, [5, 6]].logsumexp(1) - math.log(2))[:, None]
        assert loss_of(world, even, target) > 1e-3


def test_the_loss_is_its_definition() -> None:
    """All pairs of states of all answers, written out."""
    target = worlds.mixed(HALF, worlds.chain())
    policy = worlds.token_level(HALF, worlds.chain())
    lam, total, weights = 0.7, 0.0, 0.0
    counts: list[int] = []
    for answer in worlds.CHAIN.answers():
        z = [t for t in answer.tolist() if t != 2]
        residual: list[float] = []
        before_r = before_q = 0.0
        for i in range(len(z) + 1):
            prefix = int("".join(map(str, z[:i])) or "0", 2)
            forced = i == worlds.CHAIN.cap
            stop_r = 0.0 if forced else float(target[i][prefix, 2])
            stop_q = 0.0 if forced else float(policy[i][prefix, 2])
            residual.append(before_r + stop_r - stop_q - before_q)
            if i < len(z):
                before_r += float(target[i][prefix, z[i]])
                before_q += float(policy[i][prefix, z[i]])
        counts.append(len(z))
        for j in range(len(residual)):
            for i in range(j):
                total += lam ** (j - i - 1) * (residual[i] - residual[j]) ** 2
                weights += lam ** (j - i - 1)
    found = loss_of(worlds.CHAIN, policy, target, lam=lam)
    assert found == pytest.approx(total / weights, rel=1e-12)
    assert gflownet.pair_weight(counts, lam) == pytest.approx(weights, rel=1e-12)


# Rewards, start


@pytest.fixture(scope="module")
def tiny() -> tuple[Backbone, worlds.World]:
    return worlds.transformer(3, 6), worlds.World((0, 2, 3, 4), (1, 5), cap=4)


def task_of(folder: Path, world: worlds.World, target: Policy = HALF, **changes: Any) -> Task:
    settings: dict[str, Any] = {
        "prompts": 1,
        "epochs": 4,
        "batch_size": 1,
        "lr": 3e-3,
        "checkpoint_every": 2,
        "lora": LoraConfig(r=16, alpha=16),
    }
    config = GFlowNetConfig(**(settings | changes))
    return Task(target, [PROMPT], world.cap, frozenset(world.stops), config, 0, 0, "g", folder)


def renew(backbone: Backbone, task: Task) -> None:
    """Give the policy an adapter that adds nothing."""
    if backbone.has_adapter(POLICY):
        backbone.remove_adapter(POLICY)
    backbone.add_adapter(POLICY, task.config.lora, seed=0, iteration=0)


def test_rewards_of_all_prefixes_are_those_of_plain_forward_passes(
    tiny: tuple[Backbone, worlds.World], tmp_path: Path
) -> None:
    backbone, world = tiny
    target: Policy = {"previous": 0.5, "older": 0.2, None: 0.3}
    task = task_of(tmp_path, world, target)
    prompts = [PROMPT, np.array([4, 0, 2], np.int32)]
    answers = [world.answers()[::17], world.answers()[5::31]]
    wrapped = [[Answer(y, int(y[-1]) not in world.stops) for y in group] for group in answers]
    found = gflownet.trajectories(backbone, task, prompts, wrapped)
    for prompt, group, trajectories in zip(prompts, answers, found, strict=True):
        policies = {n: worlds.levels(backbone, n, prompt.tolist(), world) for n in target}
        expected = rows(world, worlds.mixed(target, policies), group)
        log_r = torch.cat([t.log_r_LK for t in trajectories])
        torch.testing.assert_close(log_r.double(), expected, atol=2e-5, rtol=0)
        reward = torch.tensor([t.reward for t in trajectories]).double()
        sums = [part[:, 0].sum() for part in expected.split([len(y) for y in group])]
        torch.testing.assert_close(reward, torch.stack(sums), atol=5e-5, rtol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_sampler_is_the_corrected_mixture(
    softcap: float | None, tiny: tuple[Backbone, worlds.World], tmp_path: Path
) -> None:
    """Its log-probs, where logits are mixed too, and its gradient, are those of whole logits; a
    fresh adapter corrects nothing."""
    backbone, world = tiny
    target: Policy = {"previous": 0.6, "older": 0.3, None: 0.1}
    renew(backbone, task_of(tmp_path, world, target))
    trees = [gflownet.tree_of(PROMPT, [Answer(y, True) for y in world.answers()[::29]])]
    ids = frozenset(world.stops)
    backbone.softcap = softcap
    try:
        policies = {n: worlds.levels(backbone, n, PROMPT.tolist(), world) for n in target}
        token = rows(world, worlds.token_level(target, policies), world.answers()[::29])
        found = gflownet.sampler_logps(backbone, target, trees, ids)
        torch.testing.assert_close(found.double(), token, atol=2e-5, rtol=0)
        with torch.no_grad():
            for number, parameter in enumerate(backbone.policy_parameters().values()):
                parameter += 0.1 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(number)
                )
        found = gflownet.sampler_logps(backbone, target, trees, ids)
        policies[POLICY] = worlds.levels(backbone, POLICY, PROMPT.tolist(), world)
        law = worlds.token_level(corrected(target, POLICY), policies)
        expected = rows(world, law, world.answers()[::29])
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
        assert (expected - token).abs().max() > 0.1
        parameter = next(iter(backbone.policy_parameters().values()))
        (slope,) = torch.autograd.grad(found.sum(), parameter)
        step = 1e-2 * slope / slope.norm()
        values: list[float] = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter += sign * step
                moved = gflownet.sampler_logps(backbone, target, trees, ids)
                values.append(float(moved.double().sum()))
                parameter -= sign * step
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(slope.norm()), rel=0.02)
    finally:
        backbone.softcap = None


# Replay


def test_edit_distance() -> None:
    random = np.random.default_rng(0)

    def table(a: list[int], b: list[int]) -> int:
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            previous, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
        return row[-1]

    for _ in range(300):
        a, b = (random.integers(0, 3, random.integers(0, 80)).astype(np.int32) for _ in range(2))
        assert edit_distance(a, b) == table(a.tolist(), b.tolist())


def kept(*tokens: int, reward: float) -> Trajectory:
    log_r = torch.full((len(tokens), 2), -1.0)
    log_r[:, 0] = reward / len(tokens)
    return Trajectory(Answer(np.array(tokens, np.int32), False), log_r)


def test_replay_keeps_the_best_and_of_near_duplicates_one(tmp_path: Path) -> None:
    replay = Replay(capacity=3, near=0.25)
    far = [kept(i, i, i, 1, reward=-i) for i in (2, 3, 4)]
    better = kept(2, 2, 2, 2, 1, reward=-0.5)  # one edit in five tokens
    worse = kept(4, 4, 4, 4, 1, reward=-9.0)
    replay.add(7, [*far, better, worse])
    replay.add(7, [kept(5, 5, 5, 1, reward=-3.5)])
    replay.add(8, [kept(6, 1, reward=-1.0)])
    replay.save(tmp_path)
    again = Replay(capacity=3, near=0.25)
    again.load(tmp_path)
    for each in (replay, again):
        assert len(each) == 4
        found = each.draw(7, 5, np.random.default_rng(0))
        rewards = sorted((t.reward for t in found), reverse=True)
        assert rewards == pytest.approx([-0.5, -3.0, -3.5])
        best = max(found, key=lambda t: t.reward)
        assert best.answer.tokens.tolist() == [2, 2, 2, 2, 1] and not best.answer.truncated
    empty = Replay(3, 0.25)
    empty.save(tmp_path)
    again.load(tmp_path)
    assert not len(again)


def test_the_reward_temperature_ends_at_exactly_one() -> None:
    found = [gflownet.reward_temperature(step, 10, 3.0) for step in range(10)]
    assert found[0] == 3 and found[1:5] == sorted(found[1:5], reverse=True)
    assert found[5:] == [1.0] * 5


# Training


@pytest.mark.parametrize("stop_bias", [0.0, -4.0])
def test_training_reaches_the_exact_mixture(stop_bias: float, tmp_path: Path) -> None:
    """Total variation over all answers, computed; with stop_bias nearly all are cut at the cap."""
    world = worlds.World(letters=(0, 2, 3, 4), stops=(1,), cap=2)
    size = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    backbone = worlds.transformer(1, 5, spread=0.3, stop_bias=stop_bias, **size)
    policies = {n: worlds.levels(backbone, n, PROMPT.tolist(), world) for n in HALF}
    log_p, log_z = worlds.exact(world, HALF, policies)
    token = worlds.variation(log_p, world.logps(worlds.token_level(HALF, policies)))
    assert token > 0.01 and (float(log_p[-(4**2) :].exp().sum()) > 0.99) == (stop_bias < 0)
    task = task_of(tmp_path, world, epochs=80, answers=64, lora=LoraConfig(r=32, alpha=32))
    gflownet.train_sampler(backbone, task, Metrics(tmp_path / "m.jsonl"), alone())
    policies[POLICY] = worlds.levels(backbone, POLICY, PROMPT.tolist(), world)
    levels = worlds.token_level(corrected(HALF, POLICY), policies)
    found = worlds.variation(log_p, world.logps(levels))
    root = float((worlds.mixed(HALF, policies)[0] - levels[0])[0, 1])
    assert found <= 0.005 and found <= token / 5, (found, token)
    assert root == pytest.approx(log_z, abs=0.01)
    backbone.load_adapter(POLICY, tmp_path / "adapter")  # as others do: it has an identity now
    how = mixture.Setting(HALF, 64, world.cap, frozenset(world.stops))
    weighed = mixture.independent(
        backbone, how, [PROMPT], [Draw(0, 0, "check", 0)], proposal=corrected(HALF, POLICY)
    ).diagnose()
    assert float(weighed.log_z) == pytest.approx(log_z, abs=0.01)
    assert float(weighed.size) > 0.99 and weighed.trusted


def test_a_stopped_run_goes_on_to_the_same_bits(
    tiny: tuple[Backbone, worlds.World], tmp_path: Path
) -> None:
    """Stopped at a signal after step 1, and with the work after the checkpoint of step 2 lost."""
    backbone, world = tiny
    for name in ("whole", "stopped", "lost"):
        (tmp_path / name).mkdir()
    changes = {"lora": LoraConfig(r=16, alpha=16, dropout=0.1), "answers": 8}
    tasks = {n: task_of(tmp_path / n, world, **changes) for n in ("whole", "stopped", "lost")}
    metrics = {n: Metrics(tmp_path / n / "metrics.jsonl") for n in tasks}
    gflownet.train_sampler(backbone, tasks["whole"], metrics["whole"], alone())
    with pytest.raises(Interrupted):
        gflownet.train_sampler(backbone, tasks["stopped"], metrics["stopped"], alone(2))
    assert [r["step"] for r in metrics["stopped"].read()] == [1]

    class Power(Exception):
        pass

    class Cut(Metrics):
        def write(self, stage: str, step: int, values: Any) -> None:
            super().write(stage, step, values)
            if step == 4:
                raise Power

    with pytest.raises(Power):
        cut = Cut(tmp_path / "lost" / "metrics.jsonl")
        gflownet.train_sampler(backbone, tasks["lost"], cut, alone())
    for name in ("stopped", "lost"):
        done = gflownet.train_sampler(backbone, tasks[name], metrics[name], alone())
        assert (
            done == tmp_path / name / "adapter" and not (tmp_path / name / "checkpoints").exists()
        )
        bits = [(tmp_path / n / "adapter" / WEIGHTS).read_bytes() for n in ("whole", name)]
        assert bits[0] == bits[1], name
        records = [
            [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in metrics[n].read()]
            for n in ("whole", name)
        ]
        assert records[0] == records[1] and len(records[0]) == 4
    assert records[0][-1]["replay"] > records[0][0]["replay"] > 0
    before = (tmp_path / "whole" / "adapter" / WEIGHTS).stat().st_mtime_ns
    gflownet.train_sampler(backbone, tasks["whole"], metrics["whole"], alone())
    assert (tmp_path / "whole" / "adapter" / WEIGHTS).stat().st_mtime_ns == before


def test_micro_batches_add_up(tiny: tuple[Backbone, worlds.World], tmp_path: Path) -> None:
    backbone, world = tiny
    prompts = [np.array(p, np.int32) for p in ([2, 3], [4], [3, 0, 2])]
    found: list[tuple[dict[str, float], Tensor]] = []
    for parts in (1, 2):
        task = replace(task_of(tmp_path, world, accumulation=parts, batch_size=4), prompts=prompts)
        renew(backbone, task)
        fresh, _ = gflownet.behave(backbone, task, Replay(4, 0.25), [0, 2, 1], 0)
        for parameter in backbone.policy_parameters().values():
            parameter.grad = None
        values = gflownet.accumulate(backbone, task, [0, 2, 1], fresh, [[], [], []], 1.3, 0)
        grads = [
            p.grad.flatten() for p in backbone.policy_parameters().values() if p.grad is not None
        ]
        found.append((values, torch.cat(grads)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-3)


def test_behaviour_is_a_quarter_on_policy_and_half_tempered(
    tiny: tuple[Backbone, worlds.World], tmp_path: Path
) -> None:
    """By what the answers of a batch are: those at T = 1 come first, and follow q."""
    backbone, world = tiny
    task = task_of(tmp_path, world, answers=400)
    renew(backbone, task)
    replay = Replay(200, 0.0)
    replay.add(0, [kept(2, i, 3, reward=-1.0) for i in range(150)])
    (fresh,), (old,) = gflownet.behave(backbone, task, replay, [0], 0)
    assert (len(fresh), len(old)) == (300, 100)
    assert len({t.answer.tokens.tobytes() for t in old}) == 100
    policies = {n: worlds.levels(backbone, n, PROMPT.tolist(), world) for n in (*HALF, POLICY)}
    first = worlds.token_level(corrected(HALF, POLICY), policies)[0][0].exp()

    def counts(part: list[Trajectory]) -> Tensor:
        return torch.tensor([int(t.answer.tokens[0]) for t in part]).bincount(minlength=6).double()

    def chi2(observed: Tensor) -> float:
        expected = first * observed.sum()
        return float(((observed - expected) ** 2 / expected).sum())

    assert chi2(counts(fresh[:100])) < 21  # 5 degrees of freedom: p = 0.0008
    (again,), _ = gflownet.behave(backbone, task, replay, [0], 1)
    assert [t.answer.tokens.tolist() for t in again] != [t.answer.tokens.tolist() for t in fresh]


# The command


def test_the_command_trains_compares_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = helpers.save_model(tmp_path / "model")
    backbone = Backbone(helpers.make_model(), "m", "m")
    backbone.add_adapter("previous", LoraConfig(r=4), seed=0, iteration=0)
    (tmp_path / "adapter").mkdir()
    backbone.save_adapter("previous", tmp_path / "adapter")
    data = helpers.write_rows(tmp_path / "data.jsonl", helpers.arithmetic(12))
    config = GFlowNetRun.model_validate(
        {
            "model": str(model),
            "adapter": str(tmp_path / "adapter"),
            "data": str(data),
            "output": str(tmp_path / "out"),
            "text": {"max_response_tokens": 5},
            "check_prompts": 4,
            "check_answers": 8,
            "gflownet": {
                "prompts": 6,
                "epochs": 1,
                "batch_size": 3,
                "answers": 8,
                "lora": {"r": 4},
            },
        }
    )
    summary = run(config)
    # B = 0 in a fresh adapter: it is the base, and so is the mixture: every weight is 1.
    assert summary["token"]["ess"] == pytest.approx(1, abs=1e-5)
    assert summary["gflownet"]["ess"] > 0.99
    assert (tmp_path / "out" / "adapter" / WEIGHTS).is_file()
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    with pytest.raises(InputError, match=r"its config.alpha is 0.5, not 0.9"):
        run(config.model_copy(update={"alpha": 0.9}))
    with pytest.raises(InputError, match=r"adapter = .*nowhere: no adapter_model.safetensors"):
        run(config.model_copy(update={"adapter": str(tmp_path / "nowhere")}))
