"""The tabular theory of `docs/theory.md`, section 1, as an oracle for losses and opponents.

A policy over four answers to one prompt is trained to the optimum of the project's own loss over
all (winner, loser) pairs, in float64; winners come from p, losers from the project's own opponents.
The total variation to p after 1, 2, 3 and 12 iterations is known in closed form.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alphaspin.losses.base import Loss
from alphaspin.losses.dpo import DPO
from alphaspin.losses.ipo import IPO
from alphaspin.losses.reference import mixture_reference
from alphaspin.opponents.iterates import opponents

TARGET = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
BASE_POLICY = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
PAIRS = torch.tensor(list(itertools.product(range(4), range(4))))  # (winner, loser)


def minimum(value: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The log-policy of least value, over softmax logits."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        tolerance_grad=1e-13,
        tolerance_change=1e-16,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = value(logits.log_softmax(0))
        found.backward()
        return found

    for _ in range(3):
        optimizer.step(closure)
    return logits.detach().log_softmax(0)


def best_response(loss: Loss, iteration: int, reference: Tensor, losers: Tensor) -> Tensor:
    """Minimiser of E_{w~p, l~q} loss over all log-policies, from the project's own loss."""
    weights = TARGET[PAIRS[:, 0]] * losers[PAIRS[:, 1]]
    lengths = torch.ones(len(PAIRS), 2)

    def value(policy: Tensor) -> Tensor:
        return (weights * loss(policy[PAIRS], reference[PAIRS], lengths, iteration)).sum()

    return minimum(value, reference)


def self_play(
    *, alpha: float, beta: float, history: int | str = 1, consistent: bool = False, until: int = 12
) -> dict[int, float]:
    """Total variation to p after t = 1 … `until` trained iterates."""
    loss = DPO(beta=(beta,))
    iterates: list[Tensor] = []
    base = BASE_POLICY.log()
    distance: dict[int, float] = {}
    for t in range(until):
        reference = mixture_reference(iterates[-1] if t else base, base, alpha=alpha)
        players = [base if k < 0 else iterates[k] for k in opponents(t, history)]
        losers = torch.stack(players).exp().mean(0)
        if consistent:
            losers = reference.softmax(0)
        iterates.append(best_response(loss, t, reference, losers))
        distance[t + 1] = 0.5 * (iterates[-1].exp() - TARGET).abs().sum().item()
    return distance


@pytest.mark.parametrize(
    ("beta", "history", "expected"),
    [
        (1.0, 1, (0.0, 0.0, 0.0, 0.0)),
        (0.6, 1, (0.2451, 0.2037, 0.1230, 0.0034)),
        (0.5, 1, (0.3247, 0.5000, 0.3247, 0.5)),  # on the edge of the bound: a cycle
        (5.0, 1, (0.3967, 0.3078, 0.2366, 0.0310)),
        (0.6, 2, (0.2451, 0.1957, 0.1681, 0.1009)),
    ],
)
def test_spin(beta: float, history: int, expected: tuple[float, ...]) -> None:
    found = self_play(alpha=1.0, beta=beta, history=history)
    assert [found[t] for t in (1, 2, 3, 12)] == pytest.approx(expected, abs=5.1e-5)


def test_alpha_spin_diverges_where_the_consistent_one_contracts() -> None:
    assert self_play(alpha=0.95, beta=0.5)[12] == pytest.approx(0.7353, abs=5.1e-5)
    assert self_play(alpha=0.95, beta=0.5, consistent=True)[12] == pytest.approx(0.2457, abs=5.1e-5)


def test_optimum_is_the_reference_times_the_likelihood_ratio() -> None:
    """π_{t+1} ∝ π_ref (p/q)^{1/β}, for a mixture reference and an opponent of its own."""
    beta, alpha = 0.7, 0.4
    previous = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    losers = torch.tensor([0.3, 0.2, 0.1, 0.4], dtype=torch.float64)
    reference = mixture_reference(previous.log(), BASE_POLICY.log(), alpha=alpha)
    found = best_response(DPO(beta=(beta,)), 0, reference, losers)
    expected = (reference + (TARGET / losers).log() / beta).log_softmax(0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_ipo_moves_every_margin_to_one_over_two_tau() -> None:
    """With one pair only, the optimum of (Δ - 1/(2τ))² is reached: Δ = 1/(2τ)."""
    loss = IPO(ipo_tau=0.2)
    policy = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-1.0, -3.0]], dtype=torch.float64)
    optimizer = torch.optim.LBFGS([policy], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(policy, reference, torch.ones(1, 2), 0).sum()
        value.backward()
        return value

    optimizer.step(closure)
    gain = (policy - reference).detach()
    assert (gain[0, 0] - gain[0, 1]).item() == pytest.approx(1 / 0.4, abs=1e-6)
