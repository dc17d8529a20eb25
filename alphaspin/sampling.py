"""Answers from the base or an adapter: batched decoding with a KV cache.

Each position of each example consumes one uniform number that depends on (seed, iteration, purpose,
example, position) and on nothing else, by inversion of the distribution function: batch composition
and the speed of neighbours do not change what is drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from alphaspin import rng
from alphaspin.backbone import Backbone
from alphaspin.batching import Tokens
from alphaspin.config import SamplingConfig


@dataclass(frozen=True, slots=True)
class Answer:
    """Sampled tokens (int32), ending with a stop token unless cut at the cap."""

    tokens: Tokens
    truncated: bool


def uniforms(seed: int, iteration: int, purpose: str, example: int, length: int) -> Tensor:
    """The uniform numbers in [0, 1) of one example's positions, [length] float64."""
    return torch.from_numpy(rng.generator(seed, iteration, purpose, example).random(length))


def filtered(logits_BV: Tensor, config: SamplingConfig) -> Tensor:
    """Token probabilities [B, V] float32 after temperature, top-k and top-p (nucleus) filtering."""
    probs_BV = torch.softmax(logits_BV / config.temperature, dim=-1)
    if config.top_k:
        kth = probs_BV.topk(min(config.top_k, probs_BV.shape[-1])).values[:, -1:]
        probs_BV = probs_BV.masked_fill(probs_BV < kth, 0)
    if config.top_p < 1:
        ordered, order = probs_BV.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        keep = before < config.top_p * ordered.sum(-1, keepdim=True)
        probs_BV = torch.zeros_like(probs_BV).scatter(1, order, ordered * keep)
    return probs_BV


def invert(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the distribution function passes u: exact sampling from unnormalised rows.

    float64, because a running fp32 sum over 256k tokens is off by more than small probabilities.
    """
    total_BV = probs_BV.double().cumsum(-1)
    threshold = uniform_B[:, None] * total_BV[:, -1:]
    token_B = torch.searchsorted(total_BV, threshold, right=True)[:, 0]
    # u·total can round up to the total itself; the last token with mass is then meant.
    last_B = total_BV.shape[1] - 1 - (probs_BV > 0).flip(1).int().argmax(1)
    return torch.minimum(token_B, last_B)


@torch.no_grad()
def decode(
    backbone: Backbone,
    adapter: str | None,
    prompts: Sequence[Tokens],
    *,
    max_tokens: int,
    stop_ids: frozenset[int],
    config: SamplingConfig,
    draws: Sequence[Tensor] | None,
    progress: Callable[[int, int], None] = lambda answers, tokens: None,
    base_weight: float = 0.0,
) -> list[Answer]:
    """One answer per prompt, decoded in batches of similar prompt length.

    Args:
        backbone: holds the adapter.
        adapter: its name, None for the base.
        prompts: token ids, [P_i] int32 each.
        max_tokens: cap on the answer's length.
        stop_ids: tokens that end an answer (and belong to it).
        config: temperature, filters, batch size.
        draws: uniforms [max_tokens] per prompt, or None for greedy decoding.
        progress: called at each step with the answers finished and the tokens decoded.
        base_weight: m of the token-level mixture softmax((1-m) logits_adapter + m logits_base)
            (Nash-MD, arXiv 2312.00886, section 7); both policies' rows are in one forward pass.
    """
    backbone.eval()
    answers: list[Answer | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    stop = torch.tensor(sorted(stop_ids), device=backbone.device)
    for start in range(0, len(order), config.batch_size):
        part = order[start : start + config.batch_size]
        tokens, lengths = _decode_batch(
            backbone,
            adapter,
            [prompts[i] for i in part],
            max_tokens,
            stop,
            config,
            None if draws is None else torch.stack([draws[i] for i in part]),
            progress,
            base_weight,
        )
        for row, i in enumerate(part):
            answer = tokens[row, : lengths[row]]
            answers[i] = Answer(answer, int(answer[-1]) not in stop_ids)
    return [answer for answer in answers if answer is not None]


def _decode_batch(
    backbone: Backbone,
    adapter: str | None,
    prompts: list[Tokens],
    max_tokens: int,
    stop: Tensor,
    config: SamplingConfig,
    draws_BL: Tensor | None,
    progress: Callable[[int, int], None],
    base_weight: float,
) -> tuple[Tokens, Tokens]:
    """Tokens [B, max_tokens] int32 and their number [B]; finished rows leave the batch early."""
    device = backbone.device
    width = max(map(len, prompts))
    ids = np.zeros((len(prompts), width), np.int64)
    seen = np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):  # left padding: all rows decode at the same column
        ids[row, width - len(prompt) :] = prompt
        seen[row, width - len(prompt) :] = 1
    input_BP = torch.from_numpy(ids).to(device)
    seen_BP = torch.from_numpy(seen).to(device)
    position_BP = (seen_BP.cumsum(1) - 1).clamp(min=0)
    out = torch.zeros(len(prompts), max_tokens, dtype=torch.int32)
    length = torch.full((len(prompts),), max_tokens, dtype=torch.int32)
    live = torch.arange(len(prompts))  # original row of each row still in the batch
    done_B = torch.zeros(len(prompts), dtype=torch.bool)
    draws_BL = None if draws_BL is None else draws_BL.to(device)
    cache: Any = DynamicCache(config=cast(Any, backbone.decoder).config)
    mixed = adapter is not None and base_weight > 0
    copies = (1 + mixed, 1)  # the same rows again, for the base
    for step in range(max_tokens):
        with backbone.routed(adapter, len(live), *([None] * mixed)) as decoder:
            hidden_BPH = decoder(
                input_ids=input_BP.repeat(copies),
                attention_mask=seen_BP.repeat(copies),
                position_ids=position_BP.repeat(copies),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        logits_BV = backbone.logits(hidden_BPH[:, -1])
        if mixed:
            policy_BV, base_BV = logits_BV.chunk(2)
            logits_BV = torch.lerp(policy_BV, base_BV, base_weight)
        if draws_BL is None:
            token_B = logits_BV.argmax(-1)
        else:
            token_B = invert(filtered(logits_BV, config), draws_BL[:, step])
        out[live, step] = torch.where(done_B, 0, token_B.cpu()).int()
        decoded = int((~done_B).sum())
        ended = torch.isin(token_B, stop).cpu() & ~done_B
        length[live[ended]] = step + 1
        done_B |= ended
        last = step + 1 == max_tokens
        progress(decoded if last else int(ended.sum()), decoded)
        if done_B.all() or last:
            break
        input_BP = token_B[:, None]
        position_BP = position_BP[:, -1:] + 1
        seen_BP = torch.cat([seen_BP, torch.ones_like(seen_BP[:, :1])], 1)
        if done_B.sum() * 2 >= len(done_B):
            keep = (~done_B).nonzero()[:, 0]
            live, done_B = live[keep], done_B[keep]
            keep = keep.to(device)
            input_BP, position_BP, seen_BP = input_BP[keep], position_BP[keep], seen_BP[keep]
            draws_BL = None if draws_BL is None else draws_BL[keep]
            cache.batch_select_indices(torch.cat([keep, keep + len(ended)]) if mixed else keep)
    return out.numpy(), length.numpy()
