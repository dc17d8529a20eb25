"""Per-sequence log-probs of any policy, and the cache of those that never change.

A log-prob depends on (policy, prompt, response) alone. The base's are computed once per run and the
previous iterate's once per iteration, both in one pass over the frozen weights; they are kept under
the hash of all three, so that a value of another adapter or other tokens is never found by mistake.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from alphaspin_kernels import sequence_logprob
from safetensors.numpy import load_file, save_file
from torch import Tensor

from alphaspin.foundation.artefacts import commit, stands
from alphaspin.foundation.batched import batched
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import Batch, collate
from alphaspin.model.tree import Tokens, Tree

T = TypeVar("T")


@dataclass(slots=True)
class Skip:
    """What the head's gradient may leave out.

    Attributes:
        below: ε; tokens whose probabilities do not reach it are left out of E_p[W].
        sums: [2] fp32, so far: the probability left out, and the predictions.
    """

    below: float
    sums: Tensor


def sequence_logps(backbone: Backbone, batch: Batch, skip: Skip | None = None) -> Tensor:
    """lp(y) of each sequence of a batch, [B] fp32 in nats, summed over its tokens.

    Args:
        backbone: also holds the head [V, H].
        batch: on the backbone's device.
        skip: of the gradient; values are the same with it.
    """
    return hidden_logps(backbone(batch), backbone, batch, skip)


def hidden_logps(
    hidden_NH: Tensor, backbone: Backbone, batch: Batch, skip: Skip | None = None
) -> Tensor:
    """The same from the hidden states [N, H] of the predictions."""
    mass_N = hidden_NH.new_empty(len(hidden_NH), dtype=torch.float32) if skip else None
    logps_B = sequence_logprob(
        hidden_NH,
        backbone.head.weight,
        batch.targets,
        torch.nn.functional.pad(batch.lengths.cumsum(0), (1, 0)),
        rows=batch.entries,
        bias=backbone.head.bias,
        softcap=backbone.softcap,
        temperature=1 / backbone.scale,
        skip_below=skip.below if skip else 0.0,
        skipped_mass=mass_N,
    )
    if skip and mass_N is not None:
        skip.sums += torch.stack([mass_N.sum(), mass_N.new_tensor(len(mass_N))])
    return logps_B


@dataclass(frozen=True, slots=True)
class OnlineReference:
    """A reference that is computed at each step, for responses that are trained on once or less.

    Attributes:
        policies: adapters (None is the base) whose log-probs it takes, in one pass.
        mix: their log-probs, each [B], to lp_ref [B].
        joint: with the policy, layer by layer, instead of in a pass of its own.
    """

    policies: tuple[str | None, ...]
    mix: Callable[..., Tensor]
    joint: bool

    def logps(
        self, backbone: Backbone, batch: Batch, trees: Sequence[Tree], skip: Skip | None = None
    ) -> tuple[Tensor, Tensor]:
        """lp_θ with its graph, and lp_ref, both [B] fp32.

        Args:
            backbone: holds the adapters.
            batch: the policy's, on the backbone's device.
            trees: its trees.
            skip: of the policy's gradient.
        """
        groups = [(name, trees) for name in self.policies]
        frozen = collate(groups, layout=backbone.layout).to(backbone.device)
        if self.joint:
            hidden_NH, beside_NH = backbone(batch, frozen)
            policy_B, frozen_B = (
                hidden_logps(hidden_NH, backbone, batch, skip),
                hidden_logps(beside_NH, backbone, frozen),
            )
        else:
            with torch.no_grad():
                frozen_B = sequence_logps(backbone, frozen)
            policy_B = sequence_logps(backbone, batch, skip)
        return policy_B, self.mix(*frozen_B.chunk(len(self.policies)))


class ReferenceCache:
    """Log-probs by (policy, prompt, response), in memory and as durable shards on disk."""

    def __init__(self) -> None:
        """Start empty."""
        self._values: dict[bytes, float | None] = {}  # None: another process computes it

    @staticmethod
    def key(policy: str, prompt: Tokens, response: Tokens) -> bytes:
        """128 bits that identify a log-prob: hash of the policy's hash and both token sequences."""
        digest = hashlib.blake2b(policy.encode(), digest_size=16)
        digest.update(len(prompt).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(prompt, np.int32).tobytes())
        digest.update(np.ascontiguousarray(response, np.int32).tobytes())
        return digest.digest()

    def lookup(self, policy: str, tree: Tree) -> list[float]:
        """The log-probs of a tree's responses.

        Raises:
            KeyError: one was never computed under this very policy: never a silent number.
        """
        values: list[float] = []
        for response in tree.responses:
            found = self._values.get(self.key(policy, tree.prompt, response))
            if found is None:
                raise KeyError(f"no log-prob of this response under policy {policy[:12]} is cached")
            values.append(found)
        return values

    def missing(self, policy: str, trees: Iterable[Tree]) -> list[Tree]:
        """Trees cut down to the responses that have no value yet, without repetition."""
        result: list[Tree] = []
        planned: set[bytes] = set()
        for tree in trees:
            wanted: list[Tokens] = []
            for response in tree.responses:
                key = self.key(policy, tree.prompt, response)
                if key not in self._values and key not in planned:
                    planned.add(key)
                    wanted.append(response)
            if wanted:
                result.append(Tree(tree.prompt, tuple(wanted)))
        return result

    def expect(self, policies: Iterable[str], trees: Iterable[Tree]) -> None:
        """Count what is not there as not missing: a shard that comes from elsewhere brings it."""
        trees = list(trees)
        for policy in policies:
            for tree in trees:
                for response in tree.responses:
                    self._values.setdefault(self.key(policy, tree.prompt, response))

    def store(self, keys: list[bytes], values: list[float]) -> None:
        """Add values."""
        self._values.update(zip(keys, values, strict=True))

    def save(
        self,
        folder: Path,
        keys: list[bytes],
        values: list[float],
        policies: dict[str, str],
        made_of: Mapping[str, str] | None = None,
    ) -> None:
        """Add values and write them as a durable shard; the header names the policies' hashes.

        `made_of`: hashes of what the responses come from, by name.
        """
        packed = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
        with commit(folder, made_of) as temporary:
            tensors = {"key": packed, "logp": np.array(values, np.float32)}
            # One entry: safetensors writes several in an order that differs between processes.
            header = {"policies": json.dumps(policies, sort_keys=True)}
            save_file(tensors, temporary / "logps.safetensors", metadata=header)
        self.store(keys, values)

    def load(
        self,
        folder: Path,
        made_of: Mapping[str, str] | None = None,
        *,
        otherwise: str = "made again",
    ) -> bool:
        """Read a shard; False where there is none that stands, and then `otherwise` is said."""
        if not stands(folder, made_of, otherwise=otherwise):
            return False
        tensors = load_file(folder / "logps.safetensors")
        keys = [row.tobytes() for row in tensors["key"]]
        self.store(keys, tensors["logp"].tolist())
        return True


@torch.no_grad()
def score(
    backbone: Backbone,
    cache: ReferenceCache,
    policies: Sequence[str | None],
    trees: Sequence[Tree],
    size: int,
    *,
    progress: Callable[[int, int], None] = lambda trees, tokens: None,
) -> tuple[list[bytes], list[float]]:
    """Log-probs that the cache lacks, all policies' rows in one pass per batch.

    Args:
        backbone: holds the adapters.
        cache: what is there already.
        policies: adapter names; None is the base.
        trees: prompts with their responses.
        size: trees per pass.
        progress: called with the trees done and the response tokens scored.

    Returns:
        keys and values to add to the cache.
    """
    backbone.eval()
    keys: list[bytes] = []
    values: list[float] = []
    for part in batched(trees, size):
        groups: list[tuple[str | None, list[Tree]]] = []
        part_keys: list[bytes] = []
        tokens = 0
        for name in policies:
            identity = backbone.adapter_ids[name]
            wanted = cache.missing(identity, part)
            if wanted:
                groups.append((name, wanted))
                for tree in wanted:
                    part_keys += [cache.key(identity, tree.prompt, y) for y in tree.responses]
        if groups:
            batch = collate(groups, layout=backbone.layout)
            found = sequence_logps(backbone, batch.to(backbone.device)).tolist()
            cache.store(part_keys, found)  # so that later parts do not compute a repetition again
            keys += part_keys
            values += found
            tokens = int(batch.lengths.sum())
        progress(len(part), tokens)
    return keys, values


def logps(
    backbone: Backbone, policy: str | None, trees: Sequence[Tree], size: int
) -> list[list[float]]:
    """lp(y) of every response of every tree under one policy, not cached on disk."""
    cache = ReferenceCache()
    score(backbone, cache, [policy], trees, size)
    identity = backbone.adapter_ids[policy]
    return [cache.lookup(identity, tree) for tree in trees]
