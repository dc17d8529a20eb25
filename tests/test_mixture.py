"""Weights, resampling and Metropolis-Hastings against laws computed from all answers of a world."""

import math
from typing import Literal

import numpy as np
import pytest
import torch
import worlds
from torch import Tensor

from alphaspin.foundation import rng
from alphaspin.model.backbone import Backbone
from alphaspin.model.stepper import Policy, Stepper, corrected
from alphaspin.sampling import mixture
from alphaspin.sampling.answer import Draw

# docs/theory.md, section 4: α, Z, TV(exact, token level), KL(exact‖token level), p(∅) of both.
CHECK_VALUES = [
    (0.25, "0.849728", "0.047324", "5.316e-03", "0.332863", "0.301023"),
    (0.5, "0.791773", "0.066751", "1.0314e-02", "0.252598", "0.216388"),
    (0.75, "0.831177", "0.050468", "5.830e-03", "0.170146", "0.149500"),
    (0.95, "0.953069", "0.012330", "3.486e-04", "0.112455", "0.108618"),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "z", "tv", "kl", "exact", "token"), CHECK_VALUES)
def test_the_markov_chain_to_all_printed_digits(
    alpha: float, z: str, tv: str, kl: str, exact: str, token: str
) -> None:
    """And log Ẑ, an expectation of the weights, under the token-level law of all 15 answers."""
    weights = {"previous": alpha, None: 1 - alpha}
    policies = worlds.chain()
    log_p, log_z = worlds.exact(worlds.CHAIN, weights, policies)
    log_q = worlds.CHAIN.logps(worlds.token_level(weights, policies))
    assert len(log_p) == len(worlds.CHAIN.answers()) == 15
    assert f"{math.exp(log_z):.6f}" == z
    assert f"{worlds.variation(log_p, log_q):.6f}" == tv
    assert f"{worlds.divergence(log_p, log_q):.{len(kl) - 6}e}" == kl
    assert (f"{log_p[0].exp():.6f}", f"{log_q[0].exp():.6f}") == (exact, token)
    log_w = log_p + log_z - log_q
    assert float((log_q + log_w).logsumexp(0)) == pytest.approx(log_z)
    # Draws in the proportions of q: the estimate is then the expectation.
    counts = (10**5 * log_q.exp()).round().long()
    found = mixture.diagnose(log_w.repeat_interleave(counts)[None])
    assert float(found.log_z) == pytest.approx(log_z, abs=1e-4)
    chi2 = float((2 * log_p - log_q).logsumexp(0).exp())
    assert float(found.size) == pytest.approx(1 / chi2, abs=1e-4)


def test_estimates_from_weights() -> None:
    log_w = torch.tensor([[0.0, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0]]) - 700  # exp underflows
    w = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64).exp()
    assert mixture.log_mean(log_w).tolist() == pytest.approx(
        [float(w.mean().log()) - 700, -695.0], abs=1e-9
    )
    assert mixture.effective_size(log_w).tolist() == pytest.approx(
        [float(w.sum() ** 2 / w.square().sum()), 4.0], rel=1e-9
    )


def test_systematic_resampling_has_the_right_multiplicities() -> None:
    log_w = 2 * normal(50, 16)
    expected = 16 * log_w.softmax(1)
    drawn = torch.stack([mixture.resample(log_w, uniform(50, seed=s)) for s in range(400)])
    counts = torch.nn.functional.one_hot(drawn, 16).sum(2).double()
    assert ((counts - expected).abs() < 1).all()
    assert (counts.mean(0) - expected).abs().max() < 4 * 0.5 / math.sqrt(400)


def test_a_draw_without_weight_is_never_chosen() -> None:
    log_w = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    last = torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float64)
    for u in (torch.zeros(1), last):
        assert set(mixture.resample(log_w, u)[0].tolist()) == {1, 3}
        assert mixture.choose(log_w, u)[0] in (1, 3)


def test_choose_follows_the_weights() -> None:
    log_w = normal(1, 6).expand(20_000, 6)
    counts = mixture.choose(log_w, uniform(20_000)).bincount(minlength=6) / 20_000
    torch.testing.assert_close(counts.double(), log_w[0].softmax(0), atol=0.012, rtol=0)


def test_metropolis_approaches_the_mixture_at_the_known_rate() -> None:
    """The exact law after each step of the chain over 15 answers, and 40,000 simulated chains."""
    weights = {"previous": 0.5, None: 0.5}
    log_p, log_z = worlds.exact(worlds.CHAIN, weights, worlds.chain())
    log_q = worlds.CHAIN.logps(worlds.token_level(weights, worlds.chain()))
    log_w = log_p + log_z - log_q
    move = log_q.exp() * (log_w - log_w[:, None]).clamp(max=0).exp()
    move += torch.diag(1 - move.sum(1))
    chains, draws = 40_000, 6
    proposed = torch.searchsorted(log_q.exp().cumsum(0), uniform(chains, draws, seed=1))
    path = mixture.metropolis(log_w[proposed.clamp(max=14)], uniform(chains, draws, seed=2))
    law = log_q.exp()
    rate = 1 - math.exp(log_z - float(log_w.max()))
    for n in range(draws):
        assert worlds.variation(log_p, law.log()) <= rate**n + 1e-12
        found = proposed.gather(1, path[:, n : n + 1])[:, 0].bincount(minlength=15) / chains
        noise = 0.4 * float((law / chains).sqrt().sum())  # E of ½ Σ|f - law| is below this
        assert 0.5 * float((found - law).abs().sum()) < 1.7 * noise, n
        law = law @ move


def test_diagnosis_says_when_not_to_trust() -> None:
    even, skewed = 0.1 * normal(1, 64), 6 * normal(1, 64, seed=3)
    found = mixture.diagnose(torch.cat([even, skewed]))
    assert found.trusted.tolist() == [True, False]
    assert "1 of 2 prompts are NOT to be trusted" in found.note()
    assert "NOT" not in mixture.diagnose(even).note()
    assert float(found.spread[0]) == pytest.approx(float(even.var(correction=0)))
    one_heavy = torch.tensor([[0.0] * 63 + [math.log(80.0)]])
    assert not mixture.diagnose(one_heavy).trusted


# Sequential Monte Carlo


def setting(world: worlds.World, target: Policy, particles: int) -> mixture.Setting:
    return mixture.Setting(target, particles, world.cap, frozenset(world.stops))


def table_smc(
    world: worlds.World,
    target: Policy,
    levels: worlds.Levels,
    *,
    n: int,
    repeats: int,
    **how: float,
) -> tuple[mixture.Draws, Tensor]:
    """Independent repeats in one batch, and each draw's number in the list of answers, [B, N]."""
    number = {answer.tobytes(): i for i, answer in enumerate(world.answers())}
    draws = [Draw(0, 0, "test", r) for r in range(repeats)]
    prompts = [np.zeros(1, np.int32)] * repeats
    steps = worlds.TableSteps(world, levels)
    found = mixture.smc(steps, setting(world, target, n), prompts, draws, **how)
    index = [[number[a.tokens.tobytes()] for a in group] for group in found.answers]
    return found, torch.tensor(index)


@pytest.mark.parametrize("threshold", [0.0, 0.97, 1.0])
def test_smc_measures_every_answer_without_bias(threshold: float) -> None:
    """E[(1/N) Σ_n w_n 1(y_n = y)] = R(y) for each of the 15 answers, however few particles."""
    target: Policy = {"previous": 0.5, None: 0.5}
    levels = worlds.mixed(target, worlds.chain())
    repeats, n = 4000, 3
    found, index = table_smc(
        worlds.CHAIN, target, levels, n=n, repeats=repeats, threshold=threshold
    )
    weights = found.log_w_BN.exp() / n
    measure = torch.zeros(repeats, 15, dtype=torch.float64).scatter_add(1, index, weights)
    error = measure.std(0) / math.sqrt(repeats)
    expected = worlds.CHAIN.logps(levels).exp()
    assert ((measure.mean(0) - expected).abs() < 4 * error).all()
    copied = (found.origin_BN != torch.arange(n)).any(1)
    assert bool(copied.any()) == (threshold > 0)
    truncated = [[len(a.tokens) == 3 and a.tokens[-1] != 2 for a in g] for g in found.answers]
    assert truncated == [[a.truncated for a in g] for g in found.answers]


def test_one_answer_of_64_particles_has_nearly_the_law_of_the_mixture() -> None:
    """The law of the chosen answer is E[W_y], and E[W_y Ẑ/Z] = π(y) (the test above): the
    difference E[W_y (1 - Ẑ/Z)] has little Monte Carlo error."""
    runs = 400
    for alpha in (0.25, 0.95):
        target: Policy = {"previous": alpha, None: 1 - alpha}
        levels = worlds.mixed(target, worlds.chain())
        found, index = table_smc(worlds.CHAIN, target, levels, n=64, repeats=runs)
        _, log_z = worlds.exact(worlds.CHAIN, target, worlds.chain())
        off = mixture.log_mean(found.log_w_BN) - log_z
        excess = torch.zeros(15, dtype=torch.float64)
        weights = found.log_w_BN.softmax(1) * -off.expm1()[:, None]
        excess.scatter_add_(0, index.flatten(), weights.flatten() / runs)
        assert 0.5 * float(excess.abs().sum()) < 0.002
        assert float(off.mean()) == pytest.approx(0.0, abs=0.005)


def test_lineages_are_what_smc_is_judged_by() -> None:
    """Even last weights hide that few beginnings survive."""
    draws = mixture.Draws([], torch.zeros(1, 8).double(), torch.tensor([[0, 0, 0, 0, 0, 0, 0, 7]]))
    found = draws.diagnose()
    assert float(found.size) == pytest.approx(1 / (49 / 64 + 1 / 64) / 8)
    assert not found.trusted and float(found.log_z) == pytest.approx(0.0)


@pytest.fixture(scope="module")
def tiny() -> tuple[Backbone, worlds.World]:
    world = worlds.World(letters=(0, 2, 3, 4), stops=(1, 5), cap=4)
    return worlds.transformer(3, 6), world


PROMPTS = [np.array(p, np.int32) for p in ([2, 3], [4], [3, 0, 2])]
TARGET: Policy = {"previous": 0.5, "older": 0.2, None: 0.3}


def test_weights_of_a_transformer_are_those_of_the_whole_answers(
    tiny: tuple[Backbone, worlds.World],
) -> None:
    """log R - log q of each answer, from plain full forward passes: two end tokens, three policies,
    three prompts; token-level draws, SMC that never resamples, and an adapter's draws."""
    backbone, world = tiny
    number = {answer.tobytes(): i for i, answer in enumerate(world.answers())}
    draws = [Draw(1, 2, "test", e) for e in range(len(PROMPTS))]
    how = setting(world, TARGET, 12)
    stepper = Stepper(backbone, log_normalisers=True)
    plain: Policy = {"older": 1.0}
    results = {
        "token": mixture.independent(backbone, how, PROMPTS, draws),
        "smc": mixture.smc(stepper, how, PROMPTS, draws, threshold=0.0),
        "older": mixture.independent(backbone, how, PROMPTS, draws, proposal=plain),
        "corrected": mixture.independent(
            backbone, how, PROMPTS, draws, proposal=corrected(TARGET, "older")
        ),
    }
    for b, prompt in enumerate(PROMPTS):
        policies = {name: worlds.levels(backbone, name, prompt.tolist(), world) for name in TARGET}
        log_r = world.logps(worlds.mixed(TARGET, policies))
        token = world.logps(worlds.token_level(TARGET, policies))
        more = worlds.token_level(corrected(TARGET, "older"), policies)
        laws = {"older": world.logps(policies["older"]), "corrected": world.logps(more)}
        for name, found in results.items():
            log_q = laws.get(name, token)
            index = [number[a.tokens.tobytes()] for a in found.answers[b]]
            expected = (log_r - log_q)[index]
            torch.testing.assert_close(found.log_w_BN[b], expected, atol=2e-5, rtol=0)
    assert any(a.truncated for group in results["smc"].answers for a in group)


@pytest.mark.parametrize("method", ["smc", "imh"])
def test_an_answer_depends_on_its_draw_alone(
    tiny: tuple[Backbone, worlds.World], method: Literal["smc", "imh"]
) -> None:
    """Not on the other prompts of the batch; and it is the one that weights and uniforms choose."""
    backbone, world = tiny
    draws = [Draw(1, 2, "test", e) for e in range(3)]
    how = setting(world, TARGET, 8)
    together, _ = mixture.sample(backbone, how, PROMPTS, draws, method=method)
    for prompt, draw, found in zip(PROMPTS, draws, together, strict=True):
        noise = rng.generator(1, 2, "test/choose", draw.example).random(8)
        uniform_BN = torch.from_numpy(noise)[None]
        if method == "smc":
            stepper = Stepper(backbone, log_normalisers=True)
            alone = mixture.smc(stepper, how, [prompt], [draw])
            index = mixture.choose(alone.log_w_BN, uniform_BN[:, 0])
        else:
            alone = mixture.independent(backbone, how, [prompt], [draw])
            index = mixture.metropolis(alone.log_w_BN, uniform_BN)[:, -1]
        assert found.tokens.tolist() == alone.answers[0][index].tokens.tolist()


def test_answers_from_a_wrong_adapter_follow_the_mixture(
    tiny: tuple[Backbone, worlds.World],
) -> None:
    """Chi-square over the answers expected at least 5 times, the rest as one; the adapter's own
    answers fail it."""
    backbone, world = tiny
    count, n = 300, 10
    draws = [Draw(5, 0, "law", e) for e in range(count)]
    target: Policy = {"previous": 0.5, None: 0.5}
    policies = {name: worlds.levels(backbone, name, [2, 3], world) for name in target}
    expected = count * worlds.exact(world, target, policies)[0].exp()
    number = {answer.tobytes(): i for i, answer in enumerate(world.answers())}
    often = expected >= 5
    degrees = int(often.sum())
    # Wilson-Hilferty: 3.5 standard deviations.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.5 * math.sqrt(2 / (9 * degrees))) ** 3
    passed: list[bool] = []
    for particles in (n, 1):
        how = mixture.Setting(target, particles, world.cap, frozenset(world.stops), 2 * count)
        answers, _ = mixture.sample(
            backbone, how, [PROMPTS[0]] * count, draws, method="imh", proposal={"older": 1.0}
        )
        seen = torch.tensor([number[a.tokens.tobytes()] for a in answers]).bincount(
            minlength=len(expected)
        )
        f, e = (torch.cat([x[often], x[~often].sum()[None]]) for x in (seen.double(), expected))
        passed.append(float(((f - e) ** 2 / e).sum()) < limit)
    assert degrees > 8 and passed == [True, False]
