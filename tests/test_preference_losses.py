"""SPPO, RSPO and Nash-MD: each against its equation in plain Python, and against known games.

The games are those of `docs/theory.md`, section 3: one prompt, three answers, a policy with one
logit per answer that the project's own losses move, in float64.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from alphaspin.losses.base import margin
from alphaspin.losses.nash_md import nash_md
from alphaspin.losses.reference import mixture_reference
from alphaspin.losses.rspo import Regulariser, rspo
from alphaspin.losses.sppo import sppo

P = torch.tensor([[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]], dtype=torch.float64)
BASE = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
NASH = torch.tensor([4 / 9, 2 / 9, 1 / 3], dtype=torch.float64)
REGULARISED = {
    1.0: (0.637943, 0.259215, 0.102842),
    0.5: (0.666051, 0.223120, 0.110829),
    0.1: (0.631223, 0.132163, 0.236614),
}


def numbers(seed: int, count: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random lp_θ (with gradient), lp_ref, lp_base and win probabilities."""
    random = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> Tensor:
        return -scale * torch.rand(count, generator=random, dtype=torch.float64)

    return draw(30).requires_grad_(), draw(30), draw(30), -draw(1)


def check(found: Tensor, policy: Tensor, values: list[float], gradients: list[float]) -> None:
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    assert found.tolist() == pytest.approx(values, rel=1e-9, abs=1e-9)
    assert gradient.tolist() == pytest.approx(gradients, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("eta", [0.7, 1000.0])
def test_sppo(eta: float) -> None:
    policy, ref, _, p = numbers(0)
    values, gradients = [], []
    for lp, r, q in zip(policy.tolist(), ref.tolist(), p.tolist(), strict=True):
        error = lp - (r + eta * (q - 0.5))
        values.append(error * error)
        gradients.append(2 * error)
    check(sppo(policy, ref, p, eta=eta), policy, values, gradients)


def regularisers(lp: float, base: float, name: str) -> tuple[float, float]:
    """R and dR/dlp from the table of `docs/theory.md`."""
    d = lp - base
    match name:
        case "reverse_kl":
            return d * d, 2 * d
        case "forward_kl":
            return math.exp(min(-d, 7)), -math.exp(-d) if -d < 7 else 0.0
        case "forward_reverse":
            r, slope = math.exp(min(-d, 10)), -math.exp(-d) if -d < 10 else 0.0
            return r + 5 * d * d, slope + 10 * d
        case "chi2":
            return math.exp(min(d, 10)), math.exp(d) if d < 10 else 0.0
        case _:
            return lp * lp, 2 * lp


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "forward_reverse", "chi2", "entropy"])
def test_rspo_with_the_published_clamps(name: Regulariser) -> None:
    policy, ref, base, p = numbers(1)
    eta, lam = 1.3, 0.4
    ds = (policy - base).tolist()
    assert min(ds) < -10 and max(ds) > 10 and sum(-7 < d < 7 for d in ds) > 3  # both sides of all
    values, gradients = [], []
    rows = zip(policy.tolist(), ref.tolist(), base.tolist(), p.tolist(), strict=True)
    for lp, r, b, q in rows:
        error = lp - (r + eta * (q - 0.5))
        penalty, slope = regularisers(lp, b, name)
        values.append(error * error + 2 * lam * penalty)
        gradients.append(2 * error + 2 * lam * slope)
    found = rspo(policy, ref, base, p, eta=eta, lam=lam, regulariser=name)
    check(found, policy, values, gradients)


def test_rspo_settings_replace_the_published_ones() -> None:
    policy, ref, base = (torch.tensor([x], dtype=torch.float64) for x in (-9.0, -9.0, -4.0))
    half = torch.tensor([0.5], dtype=torch.float64)
    regularised = partial(rspo, policy, ref, base, half, eta=1.0, lam=1.0)
    assert regularised(regulariser="forward_kl", clamp=2.0).item() == pytest.approx(2 * math.exp(2))
    found = regularised(regulariser="forward_reverse", clamp=2.0, reverse_weight=3.0).item()
    assert found == pytest.approx(2 * (math.exp(2) + 3 * 25))


def test_a_pairs_mean_is_the_papers_loss() -> None:
    """½[(…)²_w + (…)²_l] + λ(R_w + R_l), for [B, 2] as for [B]."""
    policy, ref, base, p = (x.detach().view(-1, 2) for x in numbers(2))
    found = rspo(policy, ref, base, p, eta=2.0, lam=0.5, regulariser="reverse_kl").mean(1)
    squared = (policy - ref - 2 * (p - 0.5)) ** 2
    expected = squared.sum(1) / 2 + 0.5 * ((policy - base) ** 2).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("lam", [0.05, 0.5, 3.0])
def test_reverse_kl_is_the_squared_loss_against_a_mixture(lam: float) -> None:
    """The identity of section 3: equal up to a constant, hence in gradient and in differences."""
    policy, ref, base, p = numbers(3)
    eta, a = 2.5, 1 / (1 + 2 * lam)
    target = mixture_reference(ref + eta * (p - 0.5), base, alpha=a)
    mixed = (1 + 2 * lam) * sppo(policy, target, torch.full_like(p, 0.5), eta=eta)
    found = rspo(policy, ref, base, p, eta=eta, lam=lam, regulariser="reverse_kl")
    (one,) = torch.autograd.grad(found.sum(), policy, retain_graph=True)
    (two,) = torch.autograd.grad(mixed.sum(), policy, retain_graph=True)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    at_zero = rspo(
        torch.zeros_like(p), ref, base, p, eta=eta, lam=lam, regulariser="reverse_kl"
    ) - (1 + 2 * lam) * sppo(torch.zeros_like(p), target, torch.full_like(p, 0.5), eta=eta)
    torch.testing.assert_close(found - mixed, at_zero, rtol=1e-9, atol=1e-9)


def test_nash_md() -> None:
    policy, _, base, p = numbers(4)
    tau = 0.3
    factors = [
        q - 0.5 - tau * (lp - b)
        for lp, b, q in zip(policy.tolist(), base.tolist(), p.tolist(), strict=True)
    ]
    values = [-lp * f for lp, f in zip(policy.tolist(), factors, strict=True)]
    check(nash_md(policy, base, p, tau=tau), policy, values, [-f for f in factors])


def test_nash_md_descends_to_what_is_preferred_and_to_the_base() -> None:
    """Plain gradient descent on E_{y~π} of the surrogate raises P(π ≻ rival) - τ KL(π‖base)."""
    tau, rival = 0.2, BASE.exp()

    def value(lp: Tensor) -> float:
        return (lp.exp() @ P @ rival - tau * (lp.exp() * (lp - BASE)).sum()).item()

    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    found = [value(logits.detach().log_softmax(0))]
    for _ in range(800):
        lp = logits.log_softmax(0)
        loss = (lp.detach().exp() * nash_md(lp, BASE, P @ rival, tau=tau)).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - gradient).detach().requires_grad_()
        found.append(value(logits.detach().log_softmax(0)))
    assert all(after >= before - 1e-15 for before, after in itertools.pairwise(found))
    best = (BASE + P @ rival / tau).log_softmax(0)
    torch.testing.assert_close(logits.detach().log_softmax(0), best, atol=1e-5, rtol=0)


# The game


def optimum(loss: Callable[[Tensor], Tensor], weights: Tensor, start: Tensor) -> Tensor:
    """Log-policy that minimises Σ_y weights(y) loss(lp)(y) over softmax logits."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=200,
        tolerance_grad=1e-13,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (weights * loss(logits.log_softmax(0))).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


def regularised_nash(tau: float) -> Tensor:
    """log π with π ∝ base · exp(Pπ/τ), by damped iteration to the last bits."""
    lp = BASE
    for _ in range(4000):
        lp = ((1 - 0.2 * tau) * lp + 0.2 * (tau * BASE + P @ lp.exp())).log_softmax(0)
    torch.testing.assert_close(lp, (BASE + P @ lp.exp() / tau).log_softmax(0), atol=1e-12, rtol=0)
    return lp


@pytest.mark.parametrize("tau", [1.0, 0.5, 0.1])
def test_regularised_nash_has_the_printed_digits(tau: float) -> None:
    assert regularised_nash(tau).exp().tolist() == pytest.approx(REGULARISED[tau], abs=5.1e-7)


def test_sppo_steps_to_the_multiplicative_weights_update_and_averages_to_nash() -> None:
    """With log E_π[e^{ηP̂}] in its place, the optimum is π_{t+1} ∝ π_t e^{ηP̂}; averages converge."""
    eta, steps = 0.3, 600
    lp, mean = BASE, torch.zeros(3, dtype=torch.float64)
    for step in range(steps):
        p = P @ lp.exp()
        mean += lp.exp() / steps
        log_z = (lp + eta * (p - 0.5)).logsumexp(0)
        after = optimum(partial(sppo, ref=lp - log_z, win_prob=p, eta=eta), lp.exp(), lp)
        if step < 20:
            closed = (lp + eta * p).log_softmax(0)
            torch.testing.assert_close(after, closed, atol=1e-7, rtol=0)
        lp = after
    torch.testing.assert_close(mean, NASH, atol=0.02, rtol=0)


def test_sppo_stands_still_at_nash_and_only_there() -> None:
    for start, still in ((NASH, True), (BASE.exp(), False)):
        lp = start.log()
        after = optimum(partial(sppo, ref=lp, win_prob=P @ start, eta=1.0), start, lp)
        assert torch.allclose(after, lp, atol=1e-9) is still


@pytest.mark.parametrize(("lam", "tau"), [(0.5, 1.0), (0.05, 0.1)])
def test_rspo_reverse_kl_lands_on_the_regularised_nash(lam: float, tau: float) -> None:
    """Each iterate minimises the expected loss over answers of the previous one."""
    lp = BASE
    for _ in range(300):
        loss = partial(
            rspo,
            ref=lp,
            base=BASE,
            win_prob=P @ lp.exp(),
            eta=1.0,
            lam=lam,
            regulariser="reverse_kl",
        )
        after = optimum(loss, lp.exp(), lp)
        moved, lp = (after - lp).abs().max().item(), after
        if moved < 1e-10:
            break
    assert lp.exp().tolist() == pytest.approx(REGULARISED[tau], abs=5.1e-7)


@pytest.mark.parametrize(
    ("tau", "at_100", "at_1000"), [(0.5, "9.82e-07", "9.82e-09"), (0.1, "4.69e-05", "4.32e-07")]
)
def test_nash_md_converges_as_printed(tau: float, at_100: str, at_1000: str) -> None:
    """Natural gradient steps t = 1, 2, … of η_t = 2/(τ(t+2)) against π^(1-ητ) base^(ητ)."""
    solution, lp = regularised_nash(tau), BASE
    distance: dict[int, float] = {}
    for t in range(1, 1001):
        eta = 2 / (tau * (t + 2))
        rival = mixture_reference(lp, BASE, alpha=1 - eta * tau).softmax(0)
        policy = lp.clone().requires_grad_()
        loss = (lp.exp() * nash_md(policy, BASE, P @ rival, tau=tau)).sum()
        (gradient,) = torch.autograd.grad(loss, policy)
        lp = (lp - eta * gradient / lp.exp()).log_softmax(0)  # softmax logits: Fisher is diag(π)
        distance[t] = (solution.exp() * (solution - lp)).sum().item()
        assert distance[t] <= 8 / (tau**2 * (t + 1))  # the proven bound
    assert (f"{distance[100]:.2e}", f"{distance[1000]:.2e}") == (at_100, at_1000)


# log Z(x)


def test_mixture_reference_is_normalised_by_log_z() -> None:
    prev = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
    log_z = mixture_reference(prev, BASE, alpha=0.4).logsumexp(0)
    assert log_z.item() < -0.1
    found = mixture_reference(prev, BASE, alpha=0.4, log_z=log_z)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-12)
    for alpha in (0.0, 1.0):  # one policy alone is normalised already
        torch.testing.assert_close(
            mixture_reference(prev, BASE, alpha=alpha, log_z=log_z),
            mixture_reference(prev, BASE, alpha=alpha),
        )


def test_pointwise_losses_miss_a_mixture_without_log_z_and_pairwise_ones_do_not() -> None:
    """No preference at all: the optimum must be the reference itself."""
    prev = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    half = torch.full((3,), 0.5, dtype=torch.float64)
    raw = mixture_reference(prev, BASE, alpha=0.4)
    right = raw.log_softmax(0)
    log_z = raw.logsumexp(0)
    normalised = mixture_reference(prev, BASE, alpha=0.4, log_z=log_z)
    shifted = optimum(partial(sppo, ref=raw, win_prob=half, eta=1.0), weights, prev)
    corrected = optimum(partial(sppo, ref=normalised, win_prob=half, eta=1.0), weights, prev)
    torch.testing.assert_close(corrected, right, atol=1e-6, rtol=0)
    assert (shifted - right).abs().max() > 0.01
    i, j = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    torch.testing.assert_close(
        margin(right[i], right[j], raw[i], raw[j]), torch.zeros(3, dtype=torch.float64)
    )


def test_rspo_is_corrected_by_log_z_over_a() -> None:
    lam, prev = 0.5, torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    half = torch.full((3,), 0.5, dtype=torch.float64)
    a = 1 / (1 + 2 * lam)
    raw = mixture_reference(prev, BASE, alpha=a)
    loss = partial(
        rspo,
        ref=prev - raw.logsumexp(0) / a,
        base=BASE,
        win_prob=half,
        eta=1.0,
        lam=lam,
        regulariser="reverse_kl",
    )
    torch.testing.assert_close(optimum(loss, weights, prev), raw.log_softmax(0), atol=1e-6, rtol=0)
