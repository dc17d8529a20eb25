"""Each loss against its equation, written out in plain Python numbers."""

import math

import pytest
import torch

from alphaspin.losses import LOSSES
from alphaspin.losses.dpo import DPO, dpo
from alphaspin.losses.hinge import hinge
from alphaspin.losses.ipo import IPO, ipo
from alphaspin.losses.reference import mixture_reference
from alphaspin.losses.slic import slic

W, L, RW, RL = -3.0, -7.5, -4.0, -6.0
DELTA = (W - RW) - (L - RL)


def tensors() -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in (W, L, RW, RL)]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo(smoothing: float) -> None:
    found = dpo(*tensors(), beta=0.3, label_smoothing=smoothing).item()
    expected = -(1 - smoothing) * log_sigmoid(0.3 * DELTA) - smoothing * log_sigmoid(-0.3 * DELTA)
    assert found == pytest.approx(expected, rel=1e-12)


def test_ipo_hinge_slic() -> None:
    w, l, rw, rl = tensors()  # noqa: E741
    assert ipo(w, l, rw, rl, tau=0.25).item() == pytest.approx((DELTA - 2) ** 2)
    assert hinge(w, l, rw, rl, beta=0.3).item() == pytest.approx(1 - 0.3 * DELTA)
    assert hinge(w, l, rw, rl, beta=3.0).item() == 0
    # δ - lp(w) + lp(l) = 6 + 3 - 7.5
    assert slic(w, l, delta=6.0, lam=0.5).item() == pytest.approx(1.5 + 1.5)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge", "slic"])
def test_nll_weight_adds_the_winners_mean_token_nll(kind: str) -> None:
    policy, reference = torch.tensor([[W, L]]), torch.tensor([[RW, RL]])
    lengths = torch.tensor([[4, 9]])
    plain, heavy = (
        LOSSES[kind](nll_weight=weight)(policy, reference, lengths, 0) for weight in (0.0, 2.0)
    )
    assert (heavy - plain).item() == pytest.approx(2.0 * -W / 4)


def test_ipo_mean_divides_each_log_prob_by_its_own_length() -> None:
    config = IPO(ipo_tau=0.25, ipo_length="mean")
    found = config(torch.tensor([[W, L]]), torch.tensor([[RW, RL]]), torch.tensor([[4, 9]]), 0)
    assert found.item() == pytest.approx(((W - RW) / 4 - (L - RL) / 9 - 2) ** 2)


def test_beta_follows_the_iteration_and_its_last_value_repeats() -> None:
    config = DPO(beta=(0.1, 5.0))
    pair = torch.tensor([[W, L]]), torch.tensor([[RW, RL]]), torch.ones(1, 2)
    found = [config(*pair, t).item() for t in (0, 1, 7)]
    expected = [-log_sigmoid(0.1 * DELTA), -log_sigmoid(5 * DELTA), -log_sigmoid(5 * DELTA)]
    assert found == pytest.approx(expected, rel=1e-5)


def test_mixture_reference() -> None:
    prev, base = torch.tensor([-2.0]), torch.tensor([-5.0])
    geometric = mixture_reference(prev, base, alpha=0.7)
    arithmetic = mixture_reference(prev, base, alpha=0.7, kind="arithmetic")
    assert geometric.item() == pytest.approx(0.7 * -2 + 0.3 * -5)
    assert arithmetic.item() == pytest.approx(math.log(0.7 * math.exp(-2) + 0.3 * math.exp(-5)))


@pytest.mark.parametrize("kind", ["geometric", "arithmetic"])
def test_a_policy_of_weight_zero_takes_no_part(kind: str) -> None:
    never = torch.tensor([-math.inf])
    assert mixture_reference(torch.tensor([-2.0]), never, alpha=1, kind=kind).item() == -2
    assert mixture_reference(never, torch.tensor([-3.0]), alpha=0, kind=kind).item() == -3


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("dpo", {}, True),
        ("ipo", {}, True),
        ("hinge", {}, True),
        ("slic", {}, True),
        ("slic", {"slic_lambda": 0.1}, False),
        ("dpo", {"nll_weight": 0.1}, False),
    ],
)
def test_equal_pairs_are_skipped_only_where_their_gradient_is_zero(
    kind: str, changes: dict[str, float], expected: bool
) -> None:
    """The claim itself, by differentiating: winner and loser are one and the same number."""
    config = LOSSES[kind](**changes)
    lp = torch.tensor(-4.0, requires_grad=True)
    both = torch.stack([lp, lp])[None]
    config(both, torch.full((1, 2), -5.0), torch.full((1, 2), 3), 0).sum().backward()
    assert (lp.grad == 0).item() is expected
    assert config.ignores_equal_pairs() is expected
