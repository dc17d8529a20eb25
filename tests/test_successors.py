"""The successors of SPIN: each loss against its equation, and the iteration's fixed point.

The world is that of `test_theory`: four answers to one prompt, winners from p, losers from an
opponent, and a policy that each iteration trains to the optimum of the project's own loss, in
float64. An iteration is a map of distributions; its factor at a fixed point is the largest modulus
of the eigenvalues of its derivative, by central differences on log-probs.
"""

import math
from collections.abc import Callable

import pytest
import torch
from test_theory import BASE_POLICY, TARGET, best_response
from torch import Tensor

from alphaspin.config import Config
from alphaspin.losses import LOSSES
from alphaspin.losses.base import Loss
from alphaspin.losses.chi2 import ChiSquared, chi2
from alphaspin.losses.dpo import DPO
from alphaspin.losses.renyi import Renyi, renyi
from alphaspin.losses.space import SPACE, space

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


# The tabular theory

Iteration = Callable[[Tensor], Tensor]
"""log π_t → log π_{t+1}."""


def against_itself(loss: Loss) -> Iteration:
    """Losers and reference are both the previous iterate, as in SPIN."""
    return lambda previous: best_response(loss, 0, previous, previous.exp())


def variations(step: Iteration, until: int = 12) -> list[float]:
    """Total variation to p after 1, 2, 3 and `until` iterations from the base."""
    policy, found = BASE_POLICY.log(), dict[int, float]()
    for t in range(1, until + 1):
        policy = step(policy)
        found[t] = 0.5 * (policy.exp() - TARGET).abs().sum().item()
    return [found[t] for t in (1, 2, 3, until)]


def factor(step: Iteration, fixed: Tensor) -> float:
    """Largest modulus of an eigenvalue of the iteration's derivative at a fixed point."""
    torch.testing.assert_close(step(fixed), fixed, atol=1e-6, rtol=0)
    h, columns = 1e-3, list[Tensor]()
    for i in range(len(fixed)):
        up, down = ((fixed + s * h * torch.eye(4)[i]).log_softmax(0) for s in (1, -1))
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
