"""Prompts and their responses, as tokens."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and its responses, as token ids [P] and [L_1], [L_2], … (int32)."""

    prompt: Tokens
    responses: tuple[Tokens, ...]
