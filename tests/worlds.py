"""Worlds small enough to list every answer: exact laws of the mixture and of its samplers.

A policy is a list of levels: level d is [A^d, V], the log-probs after each of the A^d prefixes of
d tokens that are not stop tokens. A prefix is a number in base A, its first token the most
significant digit. An answer of the list is a prefix and a stop token (every prefix shorter than
the cap, every stop token), or a prefix as long as the cap, where decoding is forced to stop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import helpers
import numpy as np
import torch
from torch import Tensor

from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import Segment
from alphaspin.model.settings import LoraConfig
from alphaspin.model.stepper import Ahead, Policy
from alphaspin.model.tree import Tokens

Levels = list[Tensor]


@dataclass(frozen=True)
class World:
    """The answers of at most `cap` tokens over `letters`, ended by one of `stops`."""

    letters: tuple[int, ...]
    stops: tuple[int, ...]
    cap: int

    def answers(self) -> list[Tokens]:
        """All of them, in the order of `law`."""
        result: list[list[int]] = []
        prefixes: list[list[int]] = [[]]
        for _ in range(self.cap):
            result += [[*prefix, stop] for prefix in prefixes for stop in self.stops]
            prefixes = [[*prefix, letter] for prefix in prefixes for letter in self.letters]
        return [np.array(tokens, np.int32) for tokens in result + prefixes]

    def logps(self, levels: Levels) -> Tensor:
        """lp(y) of every answer under a policy."""
        before, parts = torch.zeros(1, dtype=levels[0].dtype), []
        for level in levels:
            parts.append((before[:, None] + level[:, self.stops]).flatten())
            before = (before[:, None] + level[:, self.letters]).flatten()
        return torch.cat([*parts, before])


def mixed(weights: Policy, policies: Mapping[str | None, Levels]) -> Levels:
    """Σ w_i log π_i at every prefix: not normalised."""
    found = [[weight * level for level in policies[name]] for name, weight in weights.items()]
    return [torch.stack(levels).sum(0) for levels in zip(*found, strict=True)]


def token_level(weights: Policy, policies: Mapping[str | None, Levels]) -> Levels:
    """The token-level mixture: normalised at every prefix."""
    return [level.log_softmax(1) for level in mixed(weights, policies)]


def exact(
    world: World, weights: Policy, policies: Mapping[str | None, Levels]
) -> tuple[Tensor, float]:
    """log π of every answer of the exact mixture, and log Z."""
    log_r = world.logps(mixed(weights, policies))
    return log_r.log_softmax(0), float(log_r.logsumexp(0))


def variation(log_p: Tensor, log_q: Tensor) -> float:
    """Total variation."""
    return 0.5 * float((log_p.exp() - log_q.exp()).abs().sum())


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p‖q) in nats."""
    return float((log_p.exp() * (log_p - log_q)).sum())


CHAIN = World(letters=(0, 1), stops=(2,), cap=3)
CHAIN_ROWS = {  # rows ∅, a, b; columns a, b, ⊤
    "previous": [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.7, 0.1, 0.2]],
    None: [[0.3, 0.3, 0.4], [0.4, 0.4, 0.2], [0.1, 0.3, 0.6]],
}


def chain() -> dict[str | None, Levels]:
    """The Markov chain of `docs/theory.md`, section 4: the next token depends on the last one."""
    result: dict[str | None, Levels] = {}
    for name, rows in CHAIN_ROWS.items():
        log_p = torch.tensor(rows, dtype=torch.float64).log()
        after = log_p[1:]
        result[name] = [log_p[:1], *(after.repeat(2**d, 1) for d in range(CHAIN.cap - 1))]
    return result


def transformer(
    seed: int,
    vocabulary: int,
    *,
    rank: int = 8,
    spread: float = 0.15,
    stop_bias: float = 0.0,
    **changes: Any,
) -> Backbone:
    """A random 2-layer Llama with the random adapters `previous` and `older`.

    Token 1 ends an answer; `stop_bias` is added to its logit (strongly negative: most answers
    reach the cap).
    """
    model = helpers.make_model(seed=seed, vocab_size=vocabulary, **changes)
    if stop_bias:
        head = model.get_output_embeddings()
        bias = torch.zeros(vocabulary).index_fill(0, torch.tensor([1]), stop_bias)
        head.bias = torch.nn.Parameter(bias, requires_grad=False)
    backbone = Backbone(model, f"world-{seed}", f"world-{seed}-{vocabulary}")
    for number, name in enumerate(("previous", "older")):
        backbone.add_adapter(name, LoraConfig(r=rank, alpha=rank), seed=seed, iteration=number)
        generator = torch.Generator().manual_seed(2 * seed + number)
        state = backbone.adapter_state(name)
        for key, value in state.items():
            if ".lora_B." in key:
                state[key] = spread * torch.randn(value.shape, generator=generator)
        backbone.set_adapter_state(name, state)
        backbone.adapter_ids[name] = f"{name}-{seed}"
    return backbone


@torch.no_grad()
def levels(backbone: Backbone, adapter: str | None, prompt: Sequence[int], world: World) -> Levels:
    """The policy's log-probs after every prefix: plain full forwards of all longest prefixes."""
    backbone.eval()
    letters = torch.tensor(world.letters)
    leaves = torch.cartesian_prod(*[letters] * (world.cap - 1)).reshape(-1, world.cap - 1)
    rows = torch.cat([torch.tensor(prompt).expand(len(leaves), -1), leaves], 1)
    decoder = backbone.routed([Segment(adapter, 0, len(rows))])
    hidden = decoder(input_ids=rows, use_cache=False).last_hidden_state
    logps = backbone.logits(hidden[:, len(prompt) - 1 :]).double().log_softmax(-1)
    count = len(world.letters)
    return [logps[:: count ** (world.cap - 1 - d), d] for d in range(world.cap)]


class TableSteps:
    """`mixture.Steps` on the levels of a mixture: exact and quick, no network."""

    def __init__(self, world: World, levels: Levels):
        """`levels` are Σ w_i log π_i, as `mixed` gives them; prompts do not matter."""
        self._levels = levels
        self._digit = torch.zeros(max(*world.letters, *world.stops) + 1, dtype=torch.int64)
        self._digit[list(world.letters)] = torch.arange(len(world.letters))
        self._depth, self._prefix = 0, torch.zeros(0, dtype=torch.int64)

    def prefill(self, prompts: Sequence[Tokens], policies: Sequence[Policy]) -> Ahead:
        del policies
        self._prefix = torch.zeros(len(prompts), dtype=torch.int64)
        return self._ahead()

    def step(self, tokens_N: Tensor) -> Ahead:
        self._prefix = self._prefix * self._letters() + self._digit[tokens_N]
        self._depth += 1
        return self._ahead()

    def select(self, indices: Sequence[int]) -> None:
        self._prefix = self._prefix[torch.tensor(indices, dtype=torch.int64)]

    def _letters(self) -> int:
        return len(self._levels[1]) if len(self._levels) > 1 else 1

    def _ahead(self) -> Ahead:
        logits = self._levels[self._depth][self._prefix]
        return Ahead(logits, logits.logsumexp(1))
