"""A judge of your own: `--method sppo --judge.kind judges:brief --judge.scale 5`, from here.

A function of a `Comparison` is a judge; its keyword-only arguments are its settings, checked and
shown by `--help`. It is asked in both orders, and may use `comparison.prompt.messages`.
"""

from math import exp

from alphaspin.foundation.section import PositiveFloat
from alphaspin.judges.base import Comparison


def brief(comparison: Comparison, *, scale: PositiveFloat = 10.0) -> float:
    """P(first ≻ second): σ of the characters that the first saves, by `scale`; nothing loses."""

    def cost(answer: str) -> int:
        return len(answer) if answer.strip() else 200

    return 1 / (1 + exp((cost(comparison.first) - cost(comparison.second)) / scale))
