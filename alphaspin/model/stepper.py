"""Sequences in progress under mixtures of adapters, one token a step: what comes next in each.

A policy here is a mixture, adapters with weights that sum to 1: at each step the next token has
the distribution softmax(Σ_i w_i z_i / T), with z_i the logits of component i (geometric decoding;
`docs/theory.md`, section 4). One component of weight 1 is a plain policy. All components of all
sequences are rows of a forward pass of the shared base; `caches` has what is kept of them.

Shapes: N sequences, C components at most, R rows (one per sequence and component), V vocabulary,
H hidden size.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alphaspin.model.backbone import Backbone
from alphaspin.model.caches import CACHES
from alphaspin.model.slots import Rows
from alphaspin.model.tree import Tokens

Policy = Mapping[str | None, float]
"""Weights by adapter name, None for the base, of sum 1; see `corrected` for negative ones."""
Components = tuple[tuple[str | None, float], ...]


class Ahead(NamedTuple):
    """What comes next: logits [N, V], fp32 (float64 of a float64 model), and log Z [N] if asked."""

    logits: Tensor
    log_normaliser: Tensor | None


def mixture(adapter: str | None, alpha: float) -> Policy:
    """π_adapter^alpha π_base^(1-alpha); the base itself where there is no adapter."""
    return {None: 1.0} if adapter is None else {adapter: alpha, None: 1 - alpha}


def corrected(policy: Policy, adapter: str) -> Policy:
    """Π_i π_i^{w_i} · π_adapter / π_base: what an adapter adds to the base, added to a mixture.

    A fresh adapter (B = 0) adds nothing.
    """
    more = {adapter: policy.get(adapter, 0.0) + 1, None: policy.get(None, 0.0) - 1}
    return {**policy, **more}


def components(policy: Policy) -> Components:
    """The mixture without what has no weight, in an order of its own.

    Raises:
        ValueError: the weights do not sum to 1.
    """
    if abs(sum(policy.values()) - 1) > 1e-6:
        raise ValueError(f"the weights of a mixture sum to 1: {dict(policy)}")
    return tuple(sorted(((n, w) for n, w in policy.items() if w), key=lambda item: item[0] or ""))


class Stepper:
    """Sequences in progress, one token per call: what decoding and sequential Monte Carlo share.

    Sequences have numbers 0 … N-1: `prefill` adds some at the end, `select` renumbers. All calls
    are without gradients.
    """

    def __init__(self, backbone: Backbone, *, log_normalisers: bool = False):
        """No sequence yet.

        Args:
            backbone: holds the adapters; is put into evaluation mode.
            log_normalisers: whether each step computes log Z too, which takes one head product per
                component in place of one per sequence.
        """
        backbone.eval()
        self._backbone = backbone
        self._log_normalisers = log_normalisers
        self._kept = CACHES[backbone.cache](backbone)
        self._mixtures: list[Components] = []
        self._mixing: tuple[Rows, Tensor, Tensor] | None = None  # of the last step, and its rows

    def __len__(self) -> int:
        """Sequences in progress."""
        return len(self._mixtures)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tokens], policies: Sequence[Policy]) -> Ahead:
        """Add sequences; returns what comes next in these.

        A prompt that several of them share is computed once for each adapter.

        Args:
            prompts: token ids [P_i], at least one each.
            policies: a mixture for each prompt.
        """
        added = [components(policy) for policy in policies]
        self._mixtures += added
        names = [[name for name, _ in mixture] for mixture in added]
        hidden_RH, rows = self._kept.prefill(prompts, names)
        return self._ahead(hidden_RH, *self._places(rows, added))

    @torch.no_grad()
    def step(self, tokens_N: Tensor) -> Ahead:
        """Append one token to each sequence; returns what comes next.

        Args:
            tokens_N: [N] integers, on any device.
        """
        hidden_RH, rows = self._kept.step(tokens_N)
        if self._mixing is None or self._mixing[0] is not rows:
            self._mixing = (rows, *self._places(rows, self._mixtures))
        return self._ahead(hidden_RH, *self._mixing[1:])

    @torch.no_grad()
    def select(self, indices: Sequence[int]) -> None:
        """Sequence i becomes what sequence `indices[i]` was: drops, duplicates and reorders."""
        self._mixtures = [self._mixtures[i] for i in indices]
        self._mixing = None
        self._kept.select(indices)

    def _places(self, rows: Rows, mixtures: Sequence[Components]) -> tuple[Tensor, Tensor]:
        """Rows and weights [N, C]; where there are fewer components the rest weighs nothing."""
        width = max(map(len, rows), default=1)
        row_NC = [[*mine, *mine[:1] * (width - len(mine))] for mine in map(list, rows)]
        weight_NC = [[w for _, w in m] + [0.0] * (width - len(m)) for m in mixtures]
        device = self._backbone.device
        dtype = torch.promote_types(self._backbone.head.weight.dtype, torch.float32)
        return (
            torch.tensor(row_NC, dtype=torch.int64, device=device).view(-1, width),
            torch.tensor(weight_NC, dtype=dtype, device=device).view(-1, width),
        )

    def _ahead(self, hidden_RH: Tensor, row_NC: Tensor, weight_NC: Tensor) -> Ahead:
        """Mix hidden states before one head product, or logits where that is not enough.

        A soft-capped head is not linear, and a mixed state would be rounded to 16 bits. log Z =
        logsumexp_v(Σ_i w_i z_i) - Σ_i w_i logsumexp_v z_i needs the components' own logits.
        """
        logits = self._backbone.logits
        if row_NC.shape[1] == 1:
            logits_NV = logits(hidden_RH[row_NC[:, 0]])
            zero_N = logits_NV.new_zeros(len(logits_NV))
            return Ahead(logits_NV, zero_N if self._log_normalisers else None)
        linear = not self._backbone.softcap and hidden_RH.dtype == weight_NC.dtype
        if linear and not self._log_normalisers:
            return Ahead(logits(_mixed(hidden_RH, row_NC, weight_NC)), None)
        logits_RV = logits(hidden_RH)
        logits_NV = _mixed(logits_RV, row_NC, weight_NC)
        if not self._log_normalisers:
            return Ahead(logits_NV, None)
        own_N = _mixed(logits_RV.logsumexp(-1, keepdim=True), row_NC, weight_NC)[:, 0]
        return Ahead(logits_NV, logits_NV.logsumexp(-1) - own_N)


def _mixed(values_RD: Tensor, row_NC: Tensor, weight_NC: Tensor) -> Tensor:
    """Σ_c weight · values of each sequence's rows, [N, D], in the type of the weights."""
    mixed_ND = values_RD[row_NC[:, 0]] * weight_NC[:, :1]
    for row_N, weight_N in zip(row_NC.T[1:], weight_NC.T[1:], strict=True):
        mixed_ND += values_RD[row_N] * weight_N[:, None]
    return mixed_ND
