"""Win rates with their intervals, length control and diversity, each against something else."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import sacrebleu
from scipy.optimize import minimize

from alphaspin.evaluation.diversity import REFERENCES, distinct, self_bleu
from alphaspin.evaluation.winrate import RIDGE, Z, at_equal_length, win_rate
from alphaspin.foundation import rng

# Win rates


def trinomial(random: np.random.Generator, p: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    return random.choice([0.0, 0.5, 1.0], size=size, p=p)


@pytest.mark.parametrize(
    "p", [(0.45, 0.1, 0.45), (0.1, 0.8, 0.1), (0.02, 0.9, 0.08), (0, 0.1, 0.9)]
)
@pytest.mark.parametrize("count", [20, 300])
def test_the_interval_covers_the_truth(p: tuple[float, ...], count: int) -> None:
    draws = trinomial(np.random.default_rng(0), p, (2000, count))
    truth = p[2] + p[1] / 2
    found = [win_rate(row.tolist()) for row in draws]
    covered = np.mean([low <= truth <= high for _, low, high in found])
    assert 0.93 <= covered <= (0.975 if count > 20 else 1)
    assert found[0].value == pytest.approx(draws[0].mean())


def test_the_interval_by_hand_and_where_all_verdicts_are_alike() -> None:
    """Bonett and Price: (f12 + 1 - f21 - 1)/(n + 2) ± z √((p12 + p21 - (p12 - p21)²)/(n + 2))."""
    wins, losses, ties = 9, 4, 17
    found = win_rate([1.0] * wins + [0.0] * losses + [0.5] * ties)
    n = wins + losses + ties + 2
    p12, p21 = (wins + 1) / n, (losses + 1) / n
    half = Z * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / n)
    assert found == pytest.approx(
        ((wins + ties / 2) / 30, 0.5 + (p12 - p21 - half) / 2, 0.5 + (p12 - p21 + half) / 2)
    )
    for verdict in (0.0, 0.5, 1.0):
        value, low, high = win_rate([verdict] * 50)
        assert value == verdict and low <= verdict <= high and 0.02 < high - low < 0.1


# At equal length


def judged(
    random: np.random.Generator, theta: float, phi: float, count: int, shift: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Verdicts of a judge that likes length, on answers that are `shift` longer."""
    others = random.integers(20, 200, count)
    lengths = np.maximum(1, others + random.normal(shift, 30, count)).astype(int)
    delta = lengths - others
    p = 1 / (1 + np.exp(-(theta + phi * np.tanh(delta / delta.std()))))
    return (random.random(count) < p).astype(float), lengths, others


@pytest.mark.parametrize(("theta", "phi", "shift"), [(0.0, 1.5, 40), (0.8, -1, 40), (-0.5, 0, -20)])
def test_a_known_preference_for_length_is_taken_out(theta: float, phi: float, shift: int) -> None:
    random = np.random.default_rng(1)
    verdicts, lengths, others = judged(random, theta, phi, 20_000, shift)
    truth = 1 / (1 + math.exp(-theta))
    found = at_equal_length(verdicts.tolist(), lengths.tolist(), others.tolist())
    assert abs(found.value - truth) < 0.02 and found.high - found.low < 0.04
    if phi:
        assert abs(verdicts.mean() - truth) > 0.1 > 5 * abs(found.value - truth)
    covered = 0
    for _ in range(300):
        v, x, y = judged(random, theta, phi, 150, shift)
        _, low, high = at_equal_length(v.tolist(), x.tolist(), y.tolist())
        covered += low <= truth <= high
    assert 0.91 * 300 <= covered <= 0.99 * 300


def test_the_fit_is_the_minimum_and_the_interval_the_sandwich() -> None:
    """SciPy's minimum, and derivatives by differences, of the penalised likelihood written out."""
    random = np.random.default_rng(2)
    verdicts = random.random(60)
    lengths, others = random.integers(1, 90, 60), random.integers(1, 50, 60)
    x = np.append(np.tanh((lengths - others) / (lengths - others).std()), [0, 0])
    y = np.append(verdicts, [1, 0])

    def terms(w: np.ndarray) -> np.ndarray:
        p = 1 / (1 + np.exp(-(w[0] + w[1] * x)))
        return -(y * np.log(p) + (1 - y) * np.log(1 - p))

    def loss(w: np.ndarray) -> float:
        return terms(w).sum() + RIDGE * w[1] ** 2 / 2

    best = minimize(loss, np.zeros(2), tol=1e-14).x
    h = 1e-4 * np.eye(2)
    scores = np.stack([(terms(best + d) - terms(best - d)) / 2e-4 for d in h], 1)
    hessian = (
        np.array(
            [
                [
                    (
                        loss(best + a + b)
                        - loss(best + a - b)
                        - loss(best - a + b)
                        + loss(best - a - b)
                    )
                    for b in h
                ]
                for a in h
            ]
        )
        / 4e-8
    )
    variance = (np.linalg.inv(hessian) @ scores.T @ scores @ np.linalg.inv(hessian))[0, 0]
    half = Z * math.sqrt(variance)
    expected = [1 / (1 + math.exp(-(best[0] + d))) for d in (0, -half, half)]
    found = at_equal_length(verdicts.tolist(), lengths.tolist(), others.tolist())
    assert found == pytest.approx(expected, abs=1e-5)


def test_length_control_where_there_is_nothing_to_control() -> None:
    for verdict, low, high in ((1.0, 0.96, 1.0), (0.0, 0.0, 0.04), (0.5, 0.45, 0.55)):
        found = at_equal_length([verdict] * 200, [7] * 200, [7] * 200)
        assert low <= found.low < found.value < found.high <= high
    # Complete separation by length alone: the prior keeps it finite, and gives the win to length.
    found = at_equal_length([1.0] * 50 + [0.0] * 50, [9] * 50 + [1] * 50, [5] * 100)
    assert found.value == pytest.approx(0.5) and found.high - found.low > 0.1


# Diversity


def test_distinct() -> None:
    texts = ["a b a b", "a  b\nc", "d", ""]
    assert distinct(texts, 1) == 4 / 8
    assert distinct(texts, 2) == 3 / 5  # ab ba ab | ab bc
    assert distinct(texts, 3) == 3 / 3  # aba bab | abc
    assert distinct(texts, 5) is None


def sentences(count: int, seed: int) -> list[str]:
    """Of a small vocabulary, with much in common; a few are empty or have words of their own."""
    random = np.random.default_rng(seed)
    words = ["the", "number", "is", "odd", "seven", "of", "all"]
    texts = [" ".join(random.choice(words, random.integers(0, 12))) for _ in range(count)]
    return [*texts, "", "never seen before", "the"]


@pytest.mark.parametrize("count", [5, 40, REFERENCES + 60])
def test_self_bleu_is_sacrebleus(count: int) -> None:
    texts = sentences(count, count)
    order = rng.generator(3, 0, "self-bleu").permutation(len(texts))
    metric = sacrebleu.BLEU(effective_order=True, tokenize="none")
    expected = [
        metric.sentence_score(text, [texts[j] for j in order[:REFERENCES] if j != i]).score / 100
        for i, text in enumerate(texts)
    ]
    assert self_bleu(texts, 3) == pytest.approx(np.mean(expected), rel=1e-9)
    assert min(expected) == 0 and len(set(expected)) >= 4


def test_self_bleu_by_hand() -> None:
    assert self_bleu(["yes", "yes"], 0) == pytest.approx(1)
    assert self_bleu(["it is seven or more"] * 3, 0) == pytest.approx(1)
    assert self_bleu(["a", "b"], 0) == 0
    # "a b c" in "a b d e": precisions 2/3, 1/2, 1/2 for none of 1, brevity e^(1 - 4/3); and back
    # 2/4, 1/3, 1/(2·2), 1/(4·1).
    there = (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3) * math.exp(1 - 4 / 3)
    back = (2 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** (1 / 4)
    assert self_bleu(["a b c", "a b d e"], 0) == pytest.approx((there + back) / 2)
    assert self_bleu(["alone"], 0) is None


def test_self_bleu_depends_on_the_seed_alone() -> None:
    texts = sentences(REFERENCES + 60, 0)
    assert self_bleu(texts, 0) == self_bleu(texts, 0) != self_bleu(texts, 1)
