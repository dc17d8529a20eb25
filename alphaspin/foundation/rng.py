"""Counter-based randomness: every number is a function of (seed, iteration, purpose, example).

Nothing here has state, so a run that was killed and started again draws the same numbers.
"""

import hashlib

import numpy as np


def key(seed: int, iteration: int, purpose: str, example: int = 0) -> int:
    """128 bits from the four coordinates (BLAKE2b), stable over machines and versions."""
    text = f"{seed}/{iteration}/{purpose}/{example}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def generator(seed: int, iteration: int, purpose: str, example: int = 0) -> np.random.Generator:
    """A Philox generator keyed by the four coordinates."""
    return np.random.Generator(np.random.Philox(key=key(seed, iteration, purpose, example)))
