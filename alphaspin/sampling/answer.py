"""An answer, and what its random numbers are a function of."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alphaspin.model.tree import Tokens


class Draw(NamedTuple):
    """What the random numbers of one answer are a function of."""

    seed: int
    iteration: int
    purpose: str
    example: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Sampled tokens (int32), ending with a stop token unless cut at the cap.

    Where they were asked for: logps [L] float32, log-prob of each token under the distribution it
    was chosen from, temperature and filters included. log_normalisers [L] float32,
    log Z_s = log Σ_v Π_i π_i(v)^w_i of each step at temperature 1 without filters (at most 0, and
    0 for a plain policy): Σ_s log Z_s is the log of the importance weight Π_i π_i(y)^w_i / q(y) of
    an answer sampled at temperature 1 without filters.
    """

    tokens: Tokens
    truncated: bool
    logps: NDArray[np.float32] | None = None
    log_normalisers: NDArray[np.float32] | None = None
