"""Answers from adapters, the base, and their geometric mixtures: batched decoding.

A sequence that ends makes room for the next prompt, whatever its neighbours are doing.

Each position of each example consumes one uniform number that depends on (seed, iteration, purpose,
example, position) and on nothing else, by inversion of the distribution function: batch composition
and the speed of neighbours do not change what is drawn. (transformers' own continuous batching
draws a whole batch from one global stream, and has no adapters: it cannot serve here.)

Shapes: N sequences, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphaspin.foundation import rng
from alphaspin.model.backbone import Backbone
from alphaspin.model.stepper import Ahead, Components, Policy, Stepper, components
from alphaspin.model.tree import Tokens
from alphaspin.sampling.answer import Answer, Draw
from alphaspin.sampling.settings import SamplingConfig

SPAN = 256  # tokens summed at once
REFILL = 8  # newcomers wait until 1/REFILL of the batch is free, so that their passes are few


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
        before = running(ordered) - ordered
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
    total_NB = running(torch.cat(sums, 1))
    threshold_N1 = uniform_N[:, None] * total_NB[:, -1:]
    span_N1 = _passed(total_NB, threshold_N1)
    below_N1 = torch.nn.functional.pad(total_NB, (1, 0)).gather(1, span_N1)
    token_NS = span_N1 * size + torch.arange(size, device=probs_NV.device)
    inside_NS = probs_NV.gather(1, token_NS.clamp(max=probs_NV.shape[1] - 1)).double()
    inside_NS *= token_NS < probs_NV.shape[1]
    within_N1 = _passed(running(inside_NS), threshold_N1 - below_N1)
    return (span_N1 * size + within_N1)[:, 0]


def running(share_NK: Tensor) -> Tensor:
    """Running sums along rows of numbers that are not negative and add up to less than 2.

    A GPU's own depend on how its blocks are timed (pytorch 75240): there in whole 2^-62, float64.
    """
    if not share_NK.is_cuda:
        return share_NK.cumsum(1)
    return (share_NK.double() * 2.0**62).round_().long().cumsum(1).double() * 2.0**-62


def _passed(total_NK: Tensor, threshold_N1: Tensor) -> Tensor:
    """The first of the running sums above the threshold, [N, 1].

    u·total can round up to the total itself: then the last that adds something is meant.
    """
    last_N1 = torch.searchsorted(total_NK, total_NK[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(total_NK, threshold_N1, right=True), last_N1)


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
    decoding = _Decoding(backbone, requests, stop_ids, config, record, progress)
    alone = {name for request in requests for name, _ in components(request.policy)}
    with backbone.merged(*alone) if len(alone) == 1 else nullcontext():
        return decoding.run()


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
