"""Answers from adapters, the base, and their geometric mixtures: batched decoding, KV-cached.

A policy here is a mixture, adapters with weights that sum to 1: at every step the next token has
the distribution softmax(Σ_i w_i z_i / T), with z_i the logits of component i (geometric decoding;
`algorithms.md`, section 4). One component of weight 1 is a plain policy. All components of all
sequences are rows of one forward pass of the shared base, each at its own position: a sequence that
ends makes room for the next prompt, whatever its neighbours are doing.

Each position of each example consumes one uniform number that depends on (seed, iteration, purpose,
example, position) and on nothing else, by inversion of the distribution function: batch composition
and the speed of neighbours do not change what is drawn. (transformers' own continuous batching
draws a whole batch from one global stream, and has no adapters: it cannot serve here.)

Shapes: N sequences, C components at most, R rows (one per sequence and component), U rows of a
prefill, P tokens of the longest prompt in it, V vocabulary, H hidden size, W width of the cache.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

from alphaspin import rng
from alphaspin.backbone import Backbone
from alphaspin.batching import Segment, Tokens
from alphaspin.config import SamplingConfig

Policy = Mapping[str | None, float]
"""Weights by adapter name, None for the base; not negative, of sum 1."""
Components = tuple[tuple[str | None, float], ...]

BLOCK = 64  # columns; the cache's width is a multiple of it
PREFILL_TOKENS = 16_384  # of one forward pass over prompts, padding included
SPAN = 256  # tokens summed at once
REFILL = 8  # newcomers wait until 1/REFILL of the batch is free, so that their passes are few


class Draw(NamedTuple):
    """What the random numbers of one answer are a function of."""

    seed: int
    iteration: int
    purpose: str
    example: int


@dataclass(frozen=True, slots=True)
class Request:
    """One answer that is wanted.

    prompt: token ids [P], at least one. policy: what to sample from. max_tokens: cap on the
    answer's length. draw: its random numbers; None for greedy decoding. temperature: None is the
    configuration's.
    """

    prompt: Tokens
    policy: Policy
    max_tokens: int
    draw: Draw | None
    temperature: float | None = None


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


class Ahead(NamedTuple):
    """What comes next: logits [N, V], fp32 (float64 of a float64 model), and log Z [N] if asked."""

    logits: Tensor
    log_normaliser: Tensor | None


def mixture(adapter: str | None, alpha: float) -> Policy:
    """π_adapter^alpha π_base^(1-alpha); the base itself where there is no adapter."""
    return {None: 1.0} if adapter is None else {adapter: alpha, None: 1 - alpha}


def components(policy: Policy) -> Components:
    """The mixture without what has no weight, in an order of its own.

    Raises:
        ValueError: a negative weight, or a sum that is not 1.
    """
    if min(policy.values(), default=0) < 0 or abs(sum(policy.values()) - 1) > 1e-6:
        raise ValueError(f"the weights of a mixture are not negative and sum to 1: {dict(policy)}")
    return tuple(sorted(((n, w) for n, w in policy.items() if w), key=lambda item: item[0] or ""))


def uniforms(seed: int, iteration: int, purpose: str, example: int, length: int) -> Tensor:
    """The uniform numbers in [0, 1) of one example's positions, [length] float64."""
    return torch.from_numpy(rng.generator(seed, iteration, purpose, example).random(length))


def filtered(
    logits_NV: Tensor, config: SamplingConfig, temperature_N: Tensor | None = None
) -> Tensor:
    """Token probabilities [N, V] after temperature, top-k and top-p (nucleus) filtering.

    The type is that of the logits. Not normalised again. `temperature_N` replaces the
    configuration's.
    """
    if temperature_N is not None:
        logits_NV = logits_NV / temperature_N[:, None]
    elif config.temperature != 1:
        logits_NV = logits_NV / config.temperature
    probs_NV = torch.softmax(logits_NV, dim=-1)
    if config.top_k:
        kth = probs_NV.topk(min(config.top_k, probs_NV.shape[-1])).values[:, -1:]
        probs_NV = probs_NV.masked_fill(probs_NV < kth, 0)
    if config.top_p < 1:
        ordered, order = probs_NV.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        keep = before < config.top_p * ordered.sum(-1, keepdim=True)
        probs_NV = torch.zeros_like(probs_NV).scatter(1, order, ordered * keep)
    return probs_NV


def invert(probs_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """The token at which the distribution function passes u: exact sampling from unnormalised rows.

    float64, because a running fp32 sum over 256k tokens is off by more than small probabilities.
    Two levels, because running sums are slow: over spans of the vocabulary, then inside one.
    """
    size = min(SPAN, probs_NV.shape[1])
    whole = probs_NV.shape[1] // size
    spans_NBS = probs_NV[:, : whole * size].unflatten(1, (whole, size))
    rest_NS = probs_NV[:, whole * size :]
    sums = (spans_NBS.sum(-1, dtype=torch.float64), rest_NS.sum(1, True, dtype=torch.float64))
    total_NB = torch.cat(sums, 1).cumsum(1)
    threshold_N1 = uniform_N[:, None] * total_NB[:, -1:]
    span_N1 = _passed(total_NB, threshold_N1)
    below_N1 = torch.nn.functional.pad(total_NB, (1, 0)).gather(1, span_N1)
    token_NS = span_N1 * size + torch.arange(size, device=probs_NV.device)
    inside_NS = probs_NV.gather(1, token_NS.clamp(max=probs_NV.shape[1] - 1)).double()
    inside_NS *= token_NS < probs_NV.shape[1]
    within_N1 = _passed(inside_NS.cumsum(1), threshold_N1 - below_N1)
    return (span_N1 * size + within_N1)[:, 0]


def _passed(total_NK: Tensor, threshold_N1: Tensor) -> Tensor:
    """The first of the running sums above the threshold, [N, 1].

    u·total can round up to the total itself: then the last that adds something is meant.
    """
    last_N1 = torch.searchsorted(total_NK, total_NK[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(total_NK, threshold_N1, right=True), last_N1)


class SlotCache(Cache):
    """Keys and values [rows, heads, W, d] of each layer, every row at a position of its own.

    Column k of a row holds the token at position k. Which columns are live is the mask's business:
    what lies beyond a row's position is zero or left over, always finite.
    """

    def __init__(self) -> None:
        """Nothing is allocated before a forward pass has shown the shapes."""
        super().__init__(layers=[])
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._rows = self._width = 0
        self._index: tuple[Any, ...] = ()  # where the coming pass writes: rows, heads, columns
        self._source: Tensor | None = None  # row of that pass for each row that it writes
        self._view = (0, 0)  # rows and columns that the coming pass reads

    def reserve(self, rows: int, width: int) -> None:
        """Make room for this many rows and columns; existing ones keep their contents."""
        if width > self._width:  # by half at least, so that copying stays a small share
            width = -(-max(width, self._width * 3 // 2) // BLOCK) * BLOCK
        rows, width = max(rows, self._rows), max(width, self._width)
        if (rows, width) != (self._rows, self._width):
            for layers in (self._keys, self._values):
                for i, old in enumerate(layers):
                    layers[i] = old.new_zeros(rows, old.shape[1], width, old.shape[3])
                    layers[i][: self._rows, :, : self._width] = old
            self._rows, self._width = rows, width

    def move(self, sources: Tensor, targets: Tensor, width: int) -> None:
        """Copy the first `width` columns of rows to other rows, all at once."""
        for layer in (*self._keys, *self._values):
            layer[targets, :, :width] = layer[sources, :, :width]

    def expect_prompts(self, sources: Tensor, targets: Tensor, width: int) -> None:
        """The coming pass has prompts of `width` columns: its rows `sources` go to `targets`."""
        self._index, self._source = (targets, slice(None), slice(width)), sources

    def expect_tokens(self, positions_R: Tensor, width: int) -> None:
        """The coming pass has one token for each of the first R rows, at these positions."""
        rows = torch.arange(len(positions_R), device=positions_R.device)
        self._index, self._source = (rows, slice(None), positions_R), None
        self._view = (len(positions_R), width)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values [R, heads, S, d]; return those that are attended to."""
        del args, kwargs
        result: list[Tensor] = []
        rows, width = self._view
        for layers, new in ((self._keys, key_states), (self._values, value_states)):
            if layer_idx == len(layers):
                shape = (self._rows, new.shape[1], self._width, new.shape[3])
                layers.append(new.new_zeros(shape))
            stored = layers[layer_idx]
            if self._source is not None:  # prompts see nothing but themselves
                stored[self._index] = new[self._source]
                result.append(new)
            else:
                stored[self._index] = new[:, :, 0]
                result.append(stored[:rows, :, :width])
        return result[0], result[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not defined, each row has its own; positions are always given to the model."""
        del layer_idx
        return 0


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
        self._cache = SlotCache()
        # Of each sequence: its tokens, where there is no cache of ours; its policy, the rows of the
        # components, the number of tokens so far.
        self._tokens: list[Tokens] = []
        self._mixtures: list[Components] = []
        self._rows: list[list[int]] = []
        self._lengths: NDArray[np.int64] = np.zeros(0, np.int64)
        self._arrange([], [], [])

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
        first = len(self)
        added = [components(policy) for policy in policies]
        if not self._backbone.slots:
            self._tokens += prompts
            self._mixtures += added
            return self._recompute(first)
        self._arrange(
            [*self._mixtures, *added],
            [*self._rows, *([-1] * len(mixture) for mixture in added)],
            [*self._lengths.tolist(), *map(len, prompts)],
        )
        rows: dict[tuple[str | None, bytes], list[int]] = {}  # that hold the same prompt
        prompt_of: dict[tuple[str | None, bytes], Tokens] = {}
        asked: list[list[tuple[str | None, bytes]]] = []
        for prompt, mixture, mine in zip(prompts, added, self._rows[first:], strict=True):
            asked.append([(name, prompt.tobytes()) for name, _ in mixture])
            for key, row in zip(asked[-1], mine, strict=True):
                rows.setdefault(key, []).append(row)
                prompt_of[key] = prompt
        hidden: list[Tensor] = []
        number: dict[tuple[str | None, bytes], int] = {}
        for part in _parts(sorted(rows, key=lambda key: len(key[1])), prompt_of):
            part.sort(key=lambda key: key[0] or "")
            number |= {key: len(number) + u for u, key in enumerate(part)}
            hidden.append(
                self._prompts(
                    [key[0] for key in part],
                    [prompt_of[key] for key in part],
                    [rows[key] for key in part],
                )
            )
        local = [[number[key] for key in keys] for keys in asked]
        return self._ahead(torch.cat(hidden), *self._mixing(local, added))

    def _prompts(
        self, names: list[str | None], prompts: list[Tokens], rows: list[list[int]]
    ) -> Tensor:
        """The last hidden state of each prompt, [U, H]; keys and values go to its rows."""
        device = self._backbone.device
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        ids = np.zeros((len(prompts), width), np.int64)
        for u, prompt in enumerate(prompts):
            ids[u, : len(prompt)] = prompt
        order_P = torch.arange(width, device=device)
        apart_PP = order_P[:, None] - order_P[None, :]

        def seen(window: int | None) -> Tensor:
            mask_PP = apart_PP >= 0
            if window is not None:
                mask_PP = mask_PP & (apart_PP < window)
            return mask_PP.expand(len(prompts), 1, -1, -1)

        sources = [u for u, mine in enumerate(rows) for _ in mine]
        targets = [row for mine in rows for row in mine]
        self._cache.expect_prompts(
            torch.tensor(sources, device=device), torch.tensor(targets, device=device), width
        )
        hidden_UPH = self._forward(
            _segments(names), torch.from_numpy(ids).to(device), order_P.expand(ids.shape), seen
        )
        last_U = torch.tensor(lengths, device=device) - 1
        return hidden_UPH[torch.arange(len(prompts), device=device), last_U]

    @torch.no_grad()
    def step(self, tokens_N: Tensor) -> Ahead:
        """Append one token to each sequence; returns what comes next.

        Args:
            tokens_N: [N] integers, on any device.
        """
        if not self._backbone.slots:
            new = tokens_N.cpu().numpy().astype(np.int32)
            self._tokens = [
                np.append(old, token) for old, token in zip(self._tokens, new, strict=True)
            ]
            return self._recompute(0)
        width = int(self._lengths.max()) + 1
        self._cache.reserve(0, width)
        device = self._backbone.device
        position_N = torch.from_numpy(self._lengths).to(device)
        position_R = position_N[self._sequence_R]
        columns_W = torch.arange(width, device=device)

        def seen(window: int | None) -> Tensor:
            mask_RW = columns_W <= position_R[:, None]
            if window is not None:
                mask_RW &= position_R[:, None] - columns_W < window
            return mask_RW[:, None, None]

        self._cache.expect_tokens(position_R, width)
        ids_R1 = tokens_N.to(device, torch.int64)[self._sequence_R][:, None]
        hidden_R1H = self._forward(self._segments, ids_R1, position_R[:, None], seen)
        self._lengths = self._lengths + 1
        return self._ahead(hidden_R1H[:, 0], self._row_NC, self._weight_NC)

    @torch.no_grad()
    def select(self, indices: Sequence[int]) -> None:
        """Sequence i becomes what sequence `indices[i]` was: drops, duplicates and reorders."""
        if not self._backbone.slots:
            self._mixtures = [self._mixtures[i] for i in indices]
            self._tokens = [self._tokens[i] for i in indices]
            return
        self._arrange(
            [self._mixtures[i] for i in indices],
            [self._rows[i] for i in indices],
            self._lengths[list(indices)].tolist(),
        )

    def _arrange(
        self, mixtures: list[Components], origins: list[list[int]], lengths: Sequence[int]
    ) -> None:
        """Give each component of each sequence a row: those of an adapter together, moving few.

        `origins` are the rows that hold them now, -1 for none.
        """
        members: dict[str | None, list[tuple[int, int]]] = {}
        for i, mixture in enumerate(mixtures):
            for c, (name, _) in enumerate(mixture):
                members.setdefault(name, []).append((i, c))
        rows = [[0] * len(mixture) for mixture in mixtures]
        sources: list[int] = []
        targets: list[int] = []
        segments: list[Segment] = []
        start = 0
        for name in sorted(members, key=lambda name: name or ""):
            segments.append(Segment(name, start, start + len(members[name])))
            free = dict.fromkeys(range(start, start + len(members[name])))
            start += len(members[name])
            movers: list[tuple[int, int]] = []
            for i, c in members[name]:
                if origins[i][c] in free:
                    rows[i][c] = origins[i][c]
                    del free[origins[i][c]]
                else:
                    movers.append((i, c))
            for (i, c), row in zip(movers, free, strict=True):
                rows[i][c] = row
                if origins[i][c] >= 0:
                    sources.append(origins[i][c])
                    targets.append(row)
        device = self._backbone.device
        self._cache.reserve(start, max(lengths, default=0) + 1)
        if sources:
            self._cache.move(
                torch.tensor(sources, device=device),
                torch.tensor(targets, device=device),
                int(max(lengths)),
            )
        self._mixtures, self._rows, self._segments = mixtures, rows, segments
        self._lengths = np.array(lengths, np.int64)
        sequence = np.zeros(start, np.int64)
        for i, mine in enumerate(rows):
            sequence[mine] = i
        self._sequence_R = torch.from_numpy(sequence).to(device)
        self._row_NC, self._weight_NC = self._mixing(rows, mixtures)

    def _mixing(
        self, rows: Sequence[Sequence[int]], mixtures: Sequence[Components]
    ) -> tuple[Tensor, Tensor]:
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

    def _recompute(self, first: int) -> Ahead:
        """What comes next in the sequences from `first` on, from all their tokens.

        For families whose layers keep more, or other things, than the keys and values of each
        position: one sequence a row, as the padded layout has it, which is slow and exact.
        """
        asked = [
            (name or "", i, c)
            for i, mixture in enumerate(self._mixtures[first:])
            for c, (name, _) in enumerate(mixture)
        ]
        hidden: list[Tensor] = []
        rows = [[0] * len(mixture) for mixture in self._mixtures[first:]]
        order = sorted(asked)
        for row, (_, i, c) in enumerate(order):
            rows[i][c] = row
        most = max(1, PREFILL_TOKENS // max(map(len, self._tokens), default=1))
        for start in range(0, len(order), most):
            part = order[start : start + most]
            texts = [self._tokens[first + i] for _, i, _ in part]
            names = [self._mixtures[first + i][c][0] for _, i, c in part]
            ids = np.zeros((len(part), max(map(len, texts))), np.int64)
            for line, text in zip(ids, texts, strict=True):
                line[: len(text)] = text
            last = [len(text) - 1 for text in texts]
            ids_RS = torch.from_numpy(ids).to(self._backbone.device)
            hidden.append(
                self._backbone.plain_rows(_segments(names), ids_RS)[range(len(part)), last]
            )
        return self._ahead(torch.cat(hidden), *self._mixing(rows, self._mixtures[first:]))

    def _forward(
        self,
        segments: Sequence[Segment],
        ids_RS: Tensor,
        position_RS: Tensor,
        seen: Callable[[int | None], Tensor],
    ) -> Tensor:
        """Hidden states [R, S, H]."""
        return self._backbone.routed(segments)(
            input_ids=ids_RS,
            attention_mask=self._backbone.masks(seen),
            position_ids=position_RS,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state

    def _ahead(self, hidden_RH: Tensor, row_NC: Tensor, weight_NC: Tensor) -> Ahead:
        """Mix hidden states before one head product, or logits where that is not enough.

        A soft-capped head is not linear. log Z = logsumexp_v(Σ_i w_i z_i) - Σ_i w_i logsumexp_v z_i
        needs the components' own logits.
        """
        logits = self._backbone.logits
        if row_NC.shape[1] == 1:
            logits_NV = logits(hidden_RH[row_NC[:, 0]])
            zero_N = logits_NV.new_zeros(len(logits_NV))
            return Ahead(logits_NV, zero_N if self._log_normalisers else None)
        if not self._backbone.softcap and not self._log_normalisers:
            mixed_NH = _mixed(hidden_RH, row_NC, weight_NC)
            return Ahead(logits(mixed_NH.to(hidden_RH.dtype)), None)
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


def _segments(names: Sequence[str | None]) -> list[Segment]:
    """Runs of equal names."""
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    ends = [*starts[1:], len(names)]
    return [Segment(names[start], start, stop) for start, stop in zip(starts, ends, strict=True)]


def _parts(
    keys: list[tuple[str | None, bytes]], prompts: Mapping[tuple[str | None, bytes], Tokens]
) -> list[list[tuple[str | None, bytes]]]:
    """Consecutive prompts, ordered by length, cut where a pass would have too many tokens."""
    parts: list[list[tuple[str | None, bytes]]] = []
    for key in keys:
        if not parts or (len(parts[-1]) + 1) * len(prompts[key]) > PREFILL_TOKENS:
            parts.append([])
        parts[-1].append(key)
    return parts


@torch.no_grad()
def decode(
    backbone: Backbone,
    requests: Sequence[Request],
    *,
    stop_ids: frozenset[int],
    config: SamplingConfig,
    record: bool = False,
    progress: Callable[[int, int], None] = lambda answers, tokens: None,
) -> list[Answer]:
    """One answer per request, `config.batch_size` of them in progress at any time.

    Args:
        backbone: holds the adapters.
        requests: their policies may differ; those of one policy are decoded together.
        stop_ids: tokens that end an answer (and belong to it).
        config: temperature, filters, batch size.
        record: also return log-probs and log Z (see `Answer`).
        progress: called at each step with the answers finished and the tokens decoded.

    Raises:
        ValueError: weights that are not those of a mixture.
    """
    return _Decoding(backbone, requests, stop_ids, config, record, progress).run()


class _Decoding:
    """The state of one call of `decode`."""

    def __init__(
        self,
        backbone: Backbone,
        requests: Sequence[Request],
        stop_ids: frozenset[int],
        config: SamplingConfig,
        record: bool,
        progress: Callable[[int, int], None],
    ):
        self.stepper = Stepper(backbone, log_normalisers=record)
        self.requests, self.config, self.progress = requests, config, progress
        self.record, self.stops = record, np.array(sorted(stop_ids), np.int32)
        self.device = backbone.device
        rank: dict[Components, int] = {}
        ranks = [rank.setdefault(components(r.policy), len(rank)) for r in requests]
        self.queue = sorted(
            range(len(requests)), key=lambda i: (ranks[i], len(requests[i].prompt), i), reverse=True
        )
        shape = (len(requests), max((r.max_tokens for r in requests), default=0))
        self.cap = np.array([r.max_tokens for r in requests], np.int64)
        self.uniform = np.zeros(shape)
        self.tokens = np.zeros(shape, np.int32)
        self.logps, self.log_z = np.zeros((2, *(shape if record else (0, 0))), np.float32)
        self.count = np.zeros(len(requests), np.int64)
        self.ended = np.zeros(len(requests), np.bool_)  # with a stop token

    def run(self) -> list[Answer]:
        live = np.zeros(0, np.int64)  # the requests of the stepper's sequences
        token_N = torch.zeros(0, dtype=torch.int64, device=self.device)  # that it has not seen yet
        size = self.config.batch_size
        while self.queue or len(live):
            room = size - len(live)
            if self.queue and (room * REFILL >= size or not len(live)):
                new = np.array([self.queue.pop() for _ in range(min(room, len(self.queue)))])
                token_N = torch.cat([token_N, self.admit(new)])
                live = np.concatenate([live, new])
            else:
                token_N = self.choose(live, self.stepper.step(token_N))
            going = ~self.ended[live] & (self.count[live] < self.cap[live])
            if not going.all():
                keep = going.nonzero()[0]
                self.stepper.select(keep.tolist())
                live, token_N = live[keep], token_N[torch.from_numpy(keep).to(self.device)]
        return [self.answer(i) for i in range(len(self.requests))]

    def admit(self, new: NDArray[np.int64]) -> Tensor:
        """Prefill requests; returns their first tokens."""
        asked = [self.requests[i] for i in new]
        for i, request in zip(new, asked, strict=True):
            if request.draw:
                length = request.max_tokens
                self.uniform[i, :length] = uniforms(*request.draw, length=length)
        ahead = self.stepper.prefill([r.prompt for r in asked], [r.policy for r in asked])
        return self.choose(new, ahead)

    def choose(self, who: NDArray[np.int64], ahead: Ahead) -> Tensor:
        """The next token of these requests, by their numbers; recorded."""
        asked = [self.requests[i] for i in who]
        greedy = np.array([request.draw is None for request in asked])
        temperature_N = None
        if any(request.temperature is not None for request in asked):
            own = [r.temperature or self.config.temperature for r in asked]
            temperature_N = torch.tensor(own, dtype=ahead.logits.dtype, device=self.device)
        at = self.count[who]
        token_N = ahead.logits.argmax(-1) if greedy.any() else None
        if self.record or not greedy.all():
            probs_NV = filtered(ahead.logits, self.config, temperature_N)
            if not greedy.all():
                uniform_N = torch.from_numpy(self.uniform[who, at]).to(self.device)
                drawn_N = invert(probs_NV, uniform_N)
                greedy_N = torch.from_numpy(greedy).to(self.device)
                token_N = drawn_N if token_N is None else torch.where(greedy_N, token_N, drawn_N)
            if self.record:
                assert token_N is not None and ahead.log_normaliser is not None
                chosen_N = probs_NV.gather(1, token_N[:, None])[:, 0].double()
                total_N = probs_NV.sum(-1, dtype=torch.float64)
                self.logps[who, at] = (chosen_N / total_N).log().cpu().numpy()
                self.log_z[who, at] = ahead.log_normaliser.cpu().numpy()
        assert token_N is not None
        tokens = token_N.cpu().numpy()
        self.tokens[who, at] = tokens
        self.count[who] += 1
        self.ended[who] = np.isin(tokens, self.stops)
        finished = self.ended[who] | (self.count[who] == self.cap[who])
        self.progress(int(finished.sum()), len(who))
        return token_N

    def answer(self, i: int) -> Answer:
        length = self.count[i]
        tokens, truncated = self.tokens[i, :length].copy(), not self.ended[i]
        if not self.record:
            return Answer(tokens, truncated)
        logps, log_z = self.logps[i, :length].copy(), self.log_z[i, :length].copy()
        return Answer(tokens, truncated, logps, log_z)
