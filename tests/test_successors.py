"""The successors of SPIN: each loss against its equation, and the iteration's fixed point.

The world is that of `test_theory`: four answers to one prompt, winners from p, losers from an
opponent, and a policy that each iteration trains to the optimum of the project's own loss, in
float64. An iteration is a map of distributions; its factor at a fixed point is the largest modulus
of the eigenvalues of its derivative, by central differences on log-probs.
"""

import itertools
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import arithmetic, make_tokenizer, save_model, write_rows
from peft import PeftModel
from safetensors.numpy import load_file
from test_preference_losses import BASE, NASH, P, regularised_nash
from test_theory import BASE_POLICY, TARGET, best_response, minimum
from torch import Tensor
from transformers import AutoModelForCausalLM

from alphaspin import play
from alphaspin.config import Config
from alphaspin.data.demonstrations import ChatFormat, hold_out, load_demonstrations
from alphaspin.losses import LOSSES
from alphaspin.losses.base import Loss
from alphaspin.losses.chi2 import ChiSquared, chi2
from alphaspin.losses.dpo import DPO
from alphaspin.losses.inpo import inpo
from alphaspin.losses.reference import mixture_reference
from alphaspin.losses.renyi import Renyi, renyi
from alphaspin.losses.rspo import Regulariser, forward_answers, rspo
from alphaspin.losses.space import SPACE, space
from alphaspin.losses.t_spin import t_spin
from alphaspin.opponents.base import BASE as BASE_PLAYER
from alphaspin.opponents.base import Player

Numbers = Callable[[float, float, float, float], float]


def draw(seed: int, rows: int = 64) -> Tensor:
    """lp_θ(y_w), lp_θ(y_l), lp_ref(y_w), lp_ref(y_l) in nats, float64 [4, rows]."""
    generator = torch.Generator().manual_seed(seed)
    return -12 * torch.rand(4, rows, generator=generator, dtype=torch.float64)


def slope(f: Numbers, row: tuple[float, float, float, float], i: int) -> float:
    """∂f/∂row_i by central differences of fourth order."""
    h = 1e-3

    def at(step: float) -> float:
        moved = list(row)
        moved[i] += step * h
        return f(moved[0], moved[1], moved[2], moved[3])

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)


def check(loss: Callable[..., Tensor], f: Numbers, seed: int) -> None:
    """Values to 1e-9 and gradients to 1e-6 of `f`, of plain numbers; none for the reference."""
    numbers = draw(seed)
    policy = numbers[:2].clone().requires_grad_()
    found = loss(*policy, *numbers[2:])
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    for j, row in enumerate(zip(*numbers.tolist(), strict=True)):
        assert found[j].item() == pytest.approx(f(*row), rel=1e-9, abs=1e-9)
        for i in (0, 1):
            assert gradient[i, j].item() == pytest.approx(slope(f, row, i), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("mu", [0.3, 1.0, 7.0])
def test_space(mu: float) -> None:
    """-log σ_μ(r_w) - μ log σ_{1/μ}(-r_l) with σ_μ(r) = 1/(1 + μe^-r), as in the paper."""

    def expected(w: float, l: float, rw: float, rl: float) -> float:  # noqa: E741
        real = 1 / (1 + mu * math.exp(-(w - rw)))
        noise = 1 / (1 + math.exp(l - rl) / mu)
        return -math.log(real) - mu * math.log(noise)

    check(lambda *four: space(*four, mu=mu), expected, 0)


@pytest.mark.parametrize("beta", [0.2, 1.5])
def test_chi2(beta: float) -> None:
    def expected(w: float, l: float, rw: float, rl: float) -> float:  # noqa: E741
        r_w, r_l = beta * (w - rw), beta * (l - rl)
        return 1 - (r_w - r_l) + (r_w**2 + r_l**2) / 2

    check(lambda *four: chi2(*four, beta=beta), expected, 1)


@pytest.mark.parametrize("order", [0.0, 0.5, 1.0, 1.3, 2.0])
def test_renyi(order: float) -> None:
    """Both sides of the clamp: gains reach ± 12 nats."""
    clamp = 5.0

    def tilted(r: float, t: float) -> float:
        if t == 0:
            return r
        x = t * r
        over = math.exp(clamp) * (1 + x - clamp)
        return ((math.exp(x) if x < clamp else over) - 1) / t

    def expected(w: float, l: float, rw: float, rl: float) -> float:  # noqa: E741
        return tilted(l - rl, order) - tilted(w - rw, order - 1)

    check(lambda *four: renyi(*four, order=order, clamp=clamp), expected, 2)


def test_renyi_is_continuous_in_its_order() -> None:
    numbers = draw(3) / 4
    for order in (0.0, 1.0):
        near = renyi(*numbers, order=order + 1e-7)
        torch.testing.assert_close(near, renyi(*numbers, order=order), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["space", "chi2", "renyi"])
def test_absolute_losses_have_a_gradient_where_both_responses_are_one(kind: str) -> None:
    """Differences have none there; so such a pair is computed."""
    loss = LOSSES[kind]()
    lp = torch.tensor(-4.0, requires_grad=True)
    loss(torch.stack([lp, lp])[None], torch.full((1, 2), -5.0), torch.ones(1, 2), 0).backward()
    assert lp.grad is not None and lp.grad.abs() > 0.1
    assert not loss.ignores_equal_pairs()


@pytest.mark.parametrize("kind", ["space", "chi2", "renyi"])
def test_absolute_losses_need_a_normalised_reference(kind: str) -> None:
    for reference in ({"alpha": 1.0}, {"alpha": 0.0}, {"alpha": 0.4, "kind": "arithmetic"}):
        Config.model_validate({"loss": {"kind": kind}, "reference": reference})
    for reference in ({"alpha": 0.4}, {"alpha": 0.4, "kind": "ema"}):
        with pytest.raises(ValueError, match=r"needs reference\.kind = arithmetic"):
            Config.model_validate({"loss": {"kind": kind}, "reference": reference})


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.1), (0.4, 2.0)])
def test_t_spin(alpha: float, beta: float) -> None:
    """Eq. 7 with ℓ(x) = log(1 + e^-x), and its gradient in all three log-probs."""
    policy = draw(4)[:3].requires_grad_()
    found = t_spin(*policy, alpha=alpha, beta=beta)
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    for j, (won, lost, proto) in enumerate(policy.T.tolist()):
        x, y = alpha * (won - lost), alpha * (lost - proto)
        value = math.log1p(math.exp(-x)) + beta * math.log1p(math.exp(-y))
        assert found[j].item() == pytest.approx(value, rel=1e-9)
        a, b = alpha / (1 + math.exp(x)), alpha * beta / (1 + math.exp(y))
        assert gradient[:, j].tolist() == pytest.approx([-a, a - b, b], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("eta", "tau"), [(2.0, 0.3), (7.0, 1 / 7)])
def test_inpo(eta: float, tau: float) -> None:
    """((…) - ηg)², in both policies' log-probs of the previous iterate and the anchor."""
    generator = torch.Generator().manual_seed(5)
    policy, prev, anchor = -9 * torch.rand(3, 64, 2, generator=generator, dtype=torch.float64)
    gap = torch.rand(64, generator=generator, dtype=torch.float64)
    policy.requires_grad_()
    found = inpo(policy, prev, anchor, gap, eta=eta, tau=tau)
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    rows = zip(policy.tolist(), prev.tolist(), anchor.tolist(), gap.tolist(), strict=True)
    for j, ((w, x), (pw, px), (aw, ax), g) in enumerate(rows):
        error = (w - x) - (1 - eta * tau) * (pw - px) - eta * tau * (aw - ax) - eta * g
        assert found[j].item() == pytest.approx(error**2, rel=1e-9, abs=1e-12)
        assert gradient[j].tolist() == pytest.approx([2 * error, -2 * error], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["chi2_smooth", "cross_entropy"])
def test_rspo_regularisers_of_the_public_code(name: Regulariser) -> None:
    """e^d/(1 + e^d) with d cut at 10 (`chisqsm1`), and -lp_θ lp_base (`reverseklnoent`)."""
    lam, eta = 0.3, 2.0

    def expected(lp: float, base: float, ref: float, win: float) -> float:
        squared = (lp - ref - eta * (win - 0.5)) ** 2
        ratio = math.exp(min(lp - base, 10.0))
        return squared + 2 * lam * (-lp * base if name == "cross_entropy" else ratio / (1 + ratio))

    numbers = 2 * draw(6)
    policy = numbers[0].clone().requires_grad_()
    win = numbers[3] / -24
    found = rspo(policy, numbers[2], numbers[1], win, eta=eta, lam=lam, regulariser=name)
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    rows = zip(*numbers[:3].tolist(), win.tolist(), strict=True)
    assert (numbers[0] - numbers[1]).max() > 10
    for j, row in enumerate(rows):
        assert found[j].item() == pytest.approx(expected(*row), rel=1e-9)
        assert gradient[j].item() == pytest.approx(slope(expected, row, 0), rel=1e-6, abs=1e-6)


# The tabular theory

Iteration = Callable[[Tensor], Tensor]
"""log π_t → log π_{t+1}."""


def against_itself(loss: Loss) -> Iteration:
    """Losers and reference are both the previous iterate, as in SPIN."""
    return lambda previous: best_response(loss, 0, previous, previous.exp())


def variations(step: Iteration, first: Iteration | None = None) -> list[float]:
    """Total variation to p after 1, 2, 3 and 12 iterations from the base."""
    policy, found = BASE_POLICY.log(), dict[int, float]()
    for t in range(1, 13):
        policy = (first if first and t == 1 else step)(policy)
        found[t] = 0.5 * (policy.exp() - TARGET).abs().sum().item()
    return [found[t] for t in (1, 2, 3, 12)]


def factor(step: Iteration, fixed: Tensor) -> float:
    """Largest modulus of an eigenvalue of the iteration's derivative at a fixed point."""
    torch.testing.assert_close(step(fixed), fixed, atol=1e-6, rtol=0)
    h, columns = 1e-3, list[Tensor]()
    for unit in torch.eye(len(fixed)):
        up, down = ((fixed + s * h * unit).log_softmax(0) for s in (1, -1))
        columns.append((step(up) - step(down)) / (2 * h))
    return torch.linalg.eigvals(torch.stack(columns, 1)).abs().max().item()


LEARNT = [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("loss", "distances", "at_p"),
    [
        (DPO(beta=(0.6,)), [0.2451, 0.2037, 0.1230, 0.0034], 2 / 3),  # SPIN: |1 - 1/β|
        (SPACE(mu=0.2), LEARNT, 0.0),
        (SPACE(mu=1.0), LEARNT, 0.0),
        (SPACE(mu=5.0), LEARNT, 0.0),
        (Renyi(order=(0.0,)), LEARNT, 0.0),
        (Renyi(order=(0.5,)), LEARNT, 0.0),
        (Renyi(order=(1.0,)), LEARNT, 0.0),
        (Renyi(order=(2.0,)), LEARNT, 0.0),
        (ChiSquared(beta=(0.5,)), [0.0787, 0.0007, 0.0, 0.0], 0.0),  # |1 - 1/(2β)|
        (ChiSquared(beta=(1.0,)), [0.2791, 0.1553, 0.0788, 0.0002], 0.5),
        (ChiSquared(beta=(0.3,)), [0.0854, 0.0649, 0.0358, 0.0010], 2 / 3),
    ],
    ids=str,
)
def test_an_iteration_and_its_factor(loss: Loss, distances: list[float], at_p: float) -> None:
    step = against_itself(loss)
    assert variations(step) == pytest.approx(distances, abs=5.1e-5)
    assert factor(step, TARGET.log()) == pytest.approx(at_p, abs=1e-4)


@pytest.mark.parametrize(
    ("loss", "alpha", "distances"),
    [
        (SPACE(mu=3.0), 0.5, LEARNT),
        (Renyi(order=(1.5,)), 0.5, LEARNT),
        (DPO(beta=(0.6,)), 0.5, [0.2451, 0.0597, 0.1058, 0.0750]),
        (DPO(beta=(0.5,)), 0.95, [0.3247, 0.3032, 0.2928, 0.2019]),
    ],
    ids=str,
)
def test_losers_of_the_arithmetic_mixture(loss: Loss, alpha: float, distances: list[float]) -> None:
    """Reference and losers are α π_t + (1-α) π_base: α-SPIN's leash, without log Z(x)."""

    def step(previous: Tensor) -> Tensor:
        base = BASE_POLICY.log()
        reference = mixture_reference(previous, base, alpha=alpha, kind="arithmetic")
        return best_response(loss, 0, reference, reference.exp())

    assert variations(step) == pytest.approx(distances, abs=5.1e-5)


TRIPLETS = torch.tensor(list(itertools.product(range(4), repeat=3)))


def triplets(alpha: float, beta: float) -> Iteration:
    """T-SPIN's: y_w ~ p, y_l ~ the previous iterate, y_0 ~ the base, no reference."""

    def step(previous: Tensor) -> Tensor:
        laws = torch.stack([TARGET, previous.exp(), BASE_POLICY])
        weights = torch.stack([law[i] for law, i in zip(laws, TRIPLETS.T, strict=True)]).prod(0)

        def value(lp: Tensor) -> Tensor:
            return (weights * t_spin(*lp[TRIPLETS].unbind(1), alpha=alpha, beta=beta)).sum()

        return minimum(value, previous)

    return step


@pytest.mark.parametrize(
    ("alpha", "beta", "distances", "fixed", "at_fixed"),
    [
        # without history: p^{1/(1+α)}, and -1/α
        (1.0, 0.0, [0.2018, 0.5, 0.2018, 0.5], [0.3790, 0.2936, 0.2076, 0.1198], 1.0),
        (2.0, 0.0, [0.0346, 0.2637, 0.1411, 0.1809], [0.3359, 0.2833, 0.2249, 0.1559], 0.5),
        # as published: β = 0 at t = 0, then 0.1
        (1.0, 0.1, [0.2018, 0.3250, 0.1221, 0.1722], [0.3875, 0.2963, 0.2046, 0.1115], 0.8912),
        (1.0, 1.0, [0.2018, 0.1031, 0.0278, 0.0454], [0.4546, 0.3103, 0.1745, 0.0605], 0.3246),
    ],
)
def test_t_spin_settles_beside_the_data(
    alpha: float, beta: float, distances: list[float], fixed: list[float], at_fixed: float
) -> None:
    step = triplets(alpha, beta)
    assert variations(step, triplets(alpha, 0.0)) == pytest.approx(distances, abs=5.1e-5)
    policy = BASE_POLICY.log()
    for _ in range(60):  # halfway steps, which a cycle does not trap
        policy = ((policy + step(policy)) / 2).log_softmax(0)
    assert policy.exp().tolist() == pytest.approx(fixed, abs=5.1e-5)
    if not beta:
        power = (TARGET.log() / (1 + alpha)).log_softmax(0)
        torch.testing.assert_close(policy, power, atol=1e-6, rtol=0)
    assert factor(step, policy) == pytest.approx(at_fixed, abs=1e-4)


# The game of `docs/theory.md`, section 3

GAME = torch.tensor(list(itertools.product(range(3), repeat=2)))


def mirror(prev: Tensor, anchor: Tensor, rival: Tensor, eta: float, tau: float) -> Tensor:
    """The optimum of the project's loss over all pairs, with win rates against a rival."""
    rates = P @ rival.exp()
    gap = rates[GAME[:, 0]] - rates[GAME[:, 1]]

    def value(lp: Tensor) -> Tensor:
        return inpo(lp[GAME], prev[GAME], anchor[GAME], gap, eta=eta, tau=tau).sum()

    return minimum(value, prev)


def divergence(p: Tensor, q: Tensor) -> float:
    return (p.exp() * (p - q)).sum().item()


@pytest.mark.parametrize("labels", ["soft", "single", "hard"])
def test_inpo_steps_to_the_mirror_descent_update(labels: str) -> None:
    """With win rates; with P - ½ of pairs of the previous iterate; with their winners alone."""
    eta, tau, prev = 1.5, 0.4, torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    i, j = GAME.T
    drawn = (prev[i] + prev[j]).exp()
    half = torch.full((9,), 0.5, dtype=torch.float64)
    weights, gap = {
        "soft": (drawn, (P @ prev.exp())[i] - (P @ prev.exp())[j]),
        "single": (drawn, P[i, j] - 0.5),
        "hard": (drawn * P[i, j], half),
    }[labels]

    def value(lp: Tensor) -> Tensor:
        return (weights * inpo(lp[GAME], prev[GAME], BASE[GAME], gap, eta=eta, tau=tau)).sum()

    expected = (1 - eta * tau) * prev + eta * tau * BASE + eta * P @ prev.exp()
    found = minimum(value, prev)
    torch.testing.assert_close(found, expected.log_softmax(0), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("eta", "tau", "inpo_10", "inpo_factor", "egpo_10", "egpo_factor"),
    [
        (1.0, 0.5, "2.34e-08", 0.5132, "8.93e-09", 0.4901),
        (5.0, 0.1, "1.12e-03", 0.8061, "3.87e-11", 0.3316),
    ],
)
def test_inpo_and_egpo_find_the_regularised_nash(
    eta: float, tau: float, inpo_10: str, inpo_factor: float, egpo_10: str, egpo_factor: float
) -> None:
    """KL(solution‖π) after ten steps, and the factor at the solution; a step of EGPO is two."""

    def one(lp: Tensor) -> Tensor:
        return mirror(lp, BASE, lp, eta, tau)

    def two(lp: Tensor) -> Tensor:
        return mirror(lp, BASE, one(lp), eta, tau)

    solution = regularised_nash(tau)
    for step, distance, at in ((one, inpo_10, inpo_factor), (two, egpo_10, egpo_factor)):
        policy = BASE
        for _ in range(10):
            policy = step(policy)
        assert f"{divergence(solution, policy):.1e}" == f"{float(distance):.1e}"
        assert factor(step, solution) == pytest.approx(at, abs=1e-4)


def test_cross_entropy_steps_to_the_best_response_without_entropy() -> None:
    """π_{t+1} ∝ π_t e^{ηP̂} π_base^λ, with the step's normaliser in ½'s place as for SPPO."""
    eta, lam, prev = 0.8, 0.3, torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    rates = P @ prev.exp()
    step = prev + eta * (rates - 0.5) + lam * BASE
    ref = prev - step.logsumexp(0)

    def value(lp: Tensor) -> Tensor:
        loss = rspo(lp, ref, BASE, rates, eta=eta, lam=lam, regulariser="cross_entropy")
        return (prev.exp() * loss).sum()

    torch.testing.assert_close(minimum(value, prev), step.log_softmax(0), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("name", "tau", "nash"),
    [
        ("forward_kl", 0.5, (0.662128, 0.228979, 0.108893)),
        ("forward_answers", 0.25, (0.680540, 0.186957, 0.132503)),
    ],
)
def test_the_forward_kls_land_on_their_regularised_nash(
    name: Regulariser, tau: float, nash: tuple[float, ...]
) -> None:
    """P̂(y) + τ base(y)/π(y) is constant, τ = λ/η by importance and λ/(2η) by the base's answers."""
    eta, lam, policy = 1.0, 0.5, BASE
    for _ in range(400):
        prev = policy

        def value(lp: Tensor, prev: Tensor = prev) -> Tensor:
            rates = P @ prev.exp()
            loss = rspo(lp, prev, BASE, rates, eta=eta, lam=lam, regulariser=name)
            own = forward_answers(lp, lam=lam) * (name == "forward_answers")
            return (prev.exp() * loss + BASE.exp() * own).sum()

        policy = minimum(value, prev)
        if (policy - prev).abs().max() < 1e-9:
            break
    balance = P @ policy.exp() + tau * (BASE - policy).exp()
    assert (balance - balance.mean()).abs().max() < 1e-6
    assert policy.exp().tolist() == pytest.approx(nash, abs=5.1e-7)


def test_comal_finds_the_nash_of_the_game_itself() -> None:
    """KL(Nash‖π) after 6, 60 and 120 iterations; INPO's limit stays at 7.38e-2."""
    eta, tau, interval = 2.0, 0.1, 6
    policy, found = BASE, dict[int, float]()
    anchor = BASE
    for t in range(120):
        anchor = policy if t and t % interval == 0 else anchor
        policy = mirror(policy, anchor, policy, eta, tau)
        found[t + 1] = divergence(NASH.log(), policy)
    assert [f"{found[t]:.2e}" for t in (6, 60, 120)] == ["1.63e-01", "6.71e-03", "1.24e-04"]
    assert f"{divergence(NASH.log(), regularised_nash(tau)):.2e}" == "7.38e-02"


# Whole runs: the first loss of the second iteration, by plain transformers and PEFT

Answers = dict[int, list[np.ndarray]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("successors")
    save_model(folder / "model")
    write_rows(folder / "data.jsonl", arithmetic(20))
    return {
        "model": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "selfplay": {"iterations": 2, "prompts": 8},
        "text": {"max_response_tokens": 8},
        "lora": {"r": 2},
        "train": {"batch_size": 64, "accumulation": 2, "lr": 1e-2},
        "evaluate": {"prompts": 3},
    }


def demonstrations(settings: dict[str, Any]) -> list[Any]:
    chat = ChatFormat.create(make_tokenizer())
    return hold_out(load_demonstrations(settings["data"], chat, Config().text)[0], 3, 0)[0]


def answers(run: Path, iteration: int, kind: str) -> Answers:
    """The answers of an iteration by example, without the package's reader."""
    found: Answers = {}
    for path in sorted((run / f"iterations/{iteration}/{kind}").rglob("*.safetensors")):
        data = load_file(path)
        parts = np.split(data["tokens"], data["length"].cumsum()[:-1])
        for example, ids in zip(data["example"].tolist(), parts, strict=True):
            found.setdefault(example, []).append(ids)
    return found


class Scorer:
    """lp(y) under the base (-1) and the iterates of a run, from their PEFT adapters."""

    def __init__(self, settings: dict[str, Any], run: Path, iterates: int) -> None:
        base = AutoModelForCausalLM.from_pretrained(settings["model"]).eval()
        self.model = PeftModel.from_pretrained(base, run / "iterations/0/adapter", "0").eval()
        for k in range(1, iterates):
            self.model.load_adapter(run / f"iterations/{k}/adapter", str(k))

    @torch.no_grad()
    def __call__(self, iterate: int, prompt: np.ndarray, answer: np.ndarray) -> float:
        ids = torch.from_numpy(np.concatenate([prompt, answer])).long()[None]
        if iterate < 0:
            with self.model.disable_adapter():
                logits = self.model(input_ids=ids).logits[0]
        else:
            self.model.set_adapter(str(iterate))
            logits = self.model(input_ids=ids).logits[0]
        after = range(len(prompt), ids.shape[1])
        return sum(float(logits[i - 1].log_softmax(-1)[ids[0, i]]) for i in after)


def first_loss(run: Any, iteration: int) -> float:
    return next(r["loss"] for r in run.metrics if r["stage"] == f"train/{iteration}")


def test_a_run_of_t_spin(settings: dict[str, Any], tmp_path: Path) -> None:
    """Pairs at t = 0, where β is 0; triplets with the base's own answers after."""
    run = play({**settings, "method": "t_spin", "control": "sft", "output": str(tmp_path / "run")})
    assert not answers(run.path, 0, "opponents")
    demos, score = demonstrations(settings), Scorer(settings, run.path, 1)
    ys, protos = answers(run.path, 1, "responses"), answers(run.path, 1, "opponents")
    expected: list[float] = []
    for e, (y,) in ys.items():
        demo, (y_0,) = demos[e], protos[e]
        won, lost, proto = (score(0, demo.prompt, ids) for ids in (demo.response, y, y_0))
        current, history = math.exp(lost - won), math.exp(proto - lost)
        expected.append(math.log1p(current) + 0.1 * math.log1p(history))
    assert len(expected) == 8
    assert first_loss(run, 1) == pytest.approx(float(np.mean(expected)), rel=1e-4)
    tokens = {r["stage"]: r["tokens"] for r in run.metrics if r["stage"].startswith("control/")}
    count = [sum(len(demos[e].response) for e in answers(run.path, t, "responses")) for t in (0, 1)]
    assert tokens == {"control/0": 2 * count[0], "control/1": 3 * count[1]}


JUDGE = """
import zlib

def cyclic(pair):
    one, other = (zlib.crc32(text.encode()) % 3 for text in (pair.first, pair.second))
    return [0.5, 0.8, 0.2][(one - other) % 3]
"""
METHODS: dict[str, dict[str, float]] = {
    "inpo": {"eta": 3.0, "tau": 0.1},
    "comal": {"eta": 3.0, "tau": 0.1, "interval": 2},
    "egpo": {"eta": 3.0, "tau": 0.1},
}


@pytest.mark.parametrize(
    ("method", "labels", "prev", "anchor"),
    [
        ("inpo", "hard", 2, -1),
        ("inpo", "single", 2, -1),
        ("comal", "soft", 2, 1),
        ("egpo", "soft", 1, -1),
    ],
)
def test_a_run_of_mirror_steps(
    settings: dict[str, Any], tmp_path: Path, method: str, labels: str, prev: int, anchor: int
) -> None:
    """The fourth iteration: who its policy, its reference and its anchor are."""
    (tmp_path / "cyclic_judge.py").write_text(JUDGE)
    judge = {
        "kind": "callable",
        "function": "cyclic_judge:cyclic",
        "folder": str(tmp_path),
        "both_orders": False,
    }
    chosen = METHODS[method]
    run = play(
        {
            **settings,
            "method": method,
            "selfplay": {"iterations": 4, "prompts": 8},
            "judge": judge,
            "preference": {**chosen, "labels": labels, "responses": 3},
            "output": str(tmp_path / "run"),
        }
    )
    demos, score = demonstrations(settings), Scorer(settings, run.path, 4)
    decode = make_tokenizer().decode
    rivals = answers(run.path, 3, "opponents")
    assert bool(rivals) is (method == "egpo")
    eta, share = chosen["eta"], chosen["eta"] * chosen["tau"]
    expected: list[float] = []
    for e, ys in answers(run.path, 3, "responses").items():
        texts = [decode(y, skip_special_tokens=True) for y in ys]
        others = [decode(y, skip_special_tokens=True) for y in rivals.get(e, ys)]
        rates = [sum(verdict(one, other) for other in others) / 3 for one in texts]
        best, worst = rates.index(max(rates)), rates.index(min(rates))
        if rates[best] == rates[worst]:
            continue
        gap = rates[best] - rates[worst]
        gap = {"hard": 0.5, "single": verdict(texts[best], texts[worst]) - 0.5}.get(labels, gap)

        def over(k: int, e: int, w: np.ndarray, x: np.ndarray) -> float:
            return score(k, demos[e].prompt, w) - score(k, demos[e].prompt, x)

        pair = ys[best], ys[worst]  # the policy starts as π_prev, so that of Δ the anchor is left
        moved = over(prev, e, *pair) - over(anchor, e, *pair)
        expected.append((share * moved - eta * gap) ** 2)
    assert len(expected) > 2
    assert first_loss(run, 3) == pytest.approx(float(np.mean(expected)), rel=2e-4)


def test_a_run_of_rspo_on_answers_of_the_base(settings: dict[str, Any], tmp_path: Path) -> None:
    """The first loss of the second iteration: SPPO's, and -λ lp_θ of the base's own answer."""
    (tmp_path / "cyclic_judge.py").write_text(JUDGE)
    judge = {"kind": "callable", "function": "cyclic_judge:cyclic", "folder": str(tmp_path)}
    chosen = {"regulariser": "forward_answers", "lam": 0.7, "eta": 3.0, "responses": 3}
    run = play(
        {
            **settings,
            "method": "rspo",
            "judge": {**judge, "both_orders": False},
            "preference": chosen,
            "output": str(tmp_path / "run"),
        }
    )
    demos, score = demonstrations(settings), Scorer(settings, run.path, 1)
    decode = make_tokenizer().decode
    protos = answers(run.path, 1, "opponents")
    expected: list[float] = []
    for e, ys in answers(run.path, 1, "responses").items():
        texts = [decode(y, skip_special_tokens=True) for y in ys]
        rates = [sum(verdict(one, other) for other in texts) / 3 for one in texts]
        if max(rates) == min(rates):
            continue
        squares = [(3 * (rate - 0.5)) ** 2 for rate in (max(rates), min(rates))]
        expected.append(sum(squares) / 2 - 0.7 * score(0, demos[e].prompt, protos[e][0]))
    assert len(expected) > 2
    assert first_loss(run, 1) == pytest.approx(float(np.mean(expected)), rel=2e-4)


def verdict(one: str, other: str) -> float:
    """The judge's, written again; equal texts tie unasked."""
    beats = (zlib.crc32(one.encode()) - zlib.crc32(other.encode())) % 3
    return 0.5 if one == other else {0: 0.5, 1: 0.8, 2: 0.2}[beats]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "inpo", "preference": {"eta": 10.0, "tau": 0.2}}, "is over 1"),
        ({"method": "inpo", "preference": {"interval": 3}}, "interval = 3 has no effect"),
        ({"method": "inpo", "reference": {"alpha": 0.5}}, "has no effect with method = inpo"),
        ({"method": "egpo", "selfplay": {"iterations": 3}}, "an even selfplay.iterations"),
        ({"method": "egpo", "preference": {"labels": "hard"}}, "win rates only"),
    ],
)
def test_mirror_steps_refuse(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Config.model_validate(fields)


@pytest.mark.parametrize(("alpha", "count"), [(0.3, 3), (0.75, 7), (0.0, 0), (1.0, 10)])
def test_the_arithmetic_mixture_deals_out_its_shares(alpha: float, count: int) -> None:
    config = Config.model_validate(
        {
            "reference": {"kind": "arithmetic", "alpha": alpha},
            "selfplay": {"opponent": "mixture-arithmetic"},
        }
    )
    dealt = config.selfplay.deal(list(range(10)), 2, config.reference)
    assert dealt.count(Player.single(1)) == count
    assert dealt.count(Player.single(BASE_PLAYER)) == 10 - count
    assert set(config.selfplay.deal([4, 5], 0, config.reference)) == {Player.single(BASE_PLAYER)}


def test_a_run_against_the_arithmetic_mixture(settings: dict[str, Any], tmp_path: Path) -> None:
    """SPACE's first loss of the second iteration, with both players' answers."""
    run = play(
        {
            **settings,
            "loss": {"kind": "space", "mu": 2.0},
            "reference": {"kind": "arithmetic", "alpha": 0.5},
            "selfplay": {
                "iterations": 2,
                "prompts": 8,
                "opponent": "mixture-arithmetic",
            },
            "output": str(tmp_path / "run"),
        }
    )
    folders = {path.name for path in (run.path / "iterations/1/opponents").iterdir()}
    assert {name.rpartition("-")[0] for name in folders} == {"base", "iterate-0"}
    demos, score = demonstrations(settings), Scorer(settings, run.path, 1)
    expected: list[float] = []
    for e, (y,) in answers(run.path, 1, "opponents").items():
        gains: list[float] = []
        for tokens in (demos[e].response, y):
            policy, base = (score(k, demos[e].prompt, tokens) for k in (0, -1))
            gains.append(policy - math.log(0.5 * math.exp(policy) + 0.5 * math.exp(base)))
        real, noise = math.log1p(2 * math.exp(-gains[0])), math.log1p(math.exp(gains[1]) / 2)
        expected.append(real + 2 * noise)
    assert len(expected) == 8
    assert first_loss(run, 1) == pytest.approx(float(np.mean(expected)), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "warns"),
    [
        ({}, False),
        ({"selfplay": {"opponent": "previous"}}, False),
        ({"selfplay": {"history": 2}}, True),
        ({"reference": {"alpha": 0.0}}, True),
        ({"reference": {"kind": "arithmetic", "alpha": 0.5}}, True),
        (
            {
                "reference": {"kind": "arithmetic", "alpha": 0.5},
                "selfplay": {"opponent": "mixture-arithmetic"},
            },
            False,
        ),
        ({"reference": {"kind": "ema"}, "selfplay": {"opponent": "ema"}}, False),
        ({"reference": {"kind": "ema"}}, True),
    ],
)
def test_losers_that_are_not_the_references_are_warned_of(
    fields: dict[str, Any], warns: bool
) -> None:
    config = Config.model_validate({"loss": {"kind": "space"}, **fields})
    said = config.preference.warning(config) or ""
    assert ("not drawn from its reference" in said) is warns


def test_t_spin_refuses_a_reference_and_other_opponents() -> None:
    for fields in ({"reference": {"alpha": 0.5}}, {"selfplay": {"history": 2}}):
        with pytest.raises(ValueError, match="has no effect with method = t_spin"):
            Config.model_validate({"method": "t_spin", **fields})
