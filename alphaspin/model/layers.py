"""What goes through a decoder layer: in a joint pass batch by batch, in the last layer a part.

A joint pass has the policy's tokens and, beside them, those of frozen policies: each layer takes
the one, then, without a graph, the other, so that its weights are gathered or dequantised once. In
the last layer only tokens that predict have queries and an MLP; of the others it is keys and
values that count (`batching.Last`).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from alphaspin.errors import InputError
from alphaspin.model.attention import KEYS_ONLY, Keys, Places, pick
from alphaspin.model.batching import Batch
from alphaspin.model.routing import NOT_JOINT, Route

SEEN = 2**62  # added to the seed of the noise on tokens that only have keys and values


class Served(Protocol):
    """What is asked of a `Backbone` here, which has the docstrings."""

    route: Route
    whole_reason: str


def run(
    backbone: Served, layer: nn.Module, last: bool, hidden: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """A decoder layer's forward: the policy's tokens, then, without a graph, those beside.

    `last`: whether it is the last layer.
    """
    route, parted = backbone.route, last and not backbone.whole_reason
    if route.beside is None:
        return _one(layer, parted, route, route.batch, hidden, args, kwargs)
    assert route.batch is not None
    results, start = list[Tensor](), 0
    route.dequantised, route.inside = {}, True
    for batch in (route.batch, route.beside):
        span = slice(start, start := start + batch.input_ids.numel())
        route.segments = batch.segments
        try:
            part, mine, given = _divided(hidden, args, kwargs, lambda x, s=span: x[:, s])
        except InputError as error:
            raise InputError(f"{NOT_JOINT}: {error}") from None
        given["places"] = batch.places
        with torch.set_grad_enabled(torch.is_grad_enabled() and batch is route.batch):
            # A clone: the graph would keep a view, and with it the tokens beside.
            output = _one(layer, parted, route, batch, part.clone(), mine, given)
        if not isinstance(output, Tensor):
            raise InputError(f"{NOT_JOINT}: its layers return more than hidden states")
        results.append(output)
    route.dequantised, route.inside = None, False
    return torch.cat(results, 1)


def _one(
    layer: nn.Module,
    parted: bool,
    route: Route,
    batch: Batch | None,
    hidden: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The same for the tokens of one batch: in the last layer, 0 where nothing is predicted."""
    forward = type(layer).forward  # also where FSDP has changed the class
    # Another batch, or none, where the sampler or a plain pass is at work.
    last = batch.last if batch and kwargs.get("places") is batch.places else None
    if last is None or not parted:
        return forward(layer, hidden, *args, **kwargs)

    def part(tokens: Tensor, places: Any) -> Any:
        only = partial(_tokens_of, tokens)
        mine, args_, kwargs_ = _divided(hidden, args, kwargs, only)
        return forward(layer, mine, *args_, **kwargs_ | {"places": places})

    segments, seed, before = route.segments, route.seed, None
    recompute = getattr(layer, "gradient_checkpointing", False)
    try:
        route.segments, route.seed = last.seen.segments, seed + SEEN
        cast(Any, layer).gradient_checkpointing = False  # it would not survive the exception
        try:
            part(last.seen.tokens, KEYS_ONLY)
        except Keys as keys:
            before = cast(tuple[Tensor, Tensor], keys.args)
        cast(Any, layer).gradient_checkpointing = recompute
        route.segments, route.seed = last.asking.segments, seed
        output = part(last.asking.tokens, replace(last.places, before=before))
    finally:
        cast(Any, layer).gradient_checkpointing = recompute
        route.segments, route.seed = segments, seed
    if before is None or not isinstance(output, Tensor):
        raise InputError("its last layer is not attention and what comes after it")
    return output.new_zeros(hidden.shape).index_copy(1, last.asking.tokens, output)


def _divided(
    hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], only: Callable[[Tensor], Tensor]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments for some of the tokens of its one row, which `only` takes.

    Raises:
        InputError: something in them may belong to tokens in a way that is not known here.
    """
    whole = hidden.shape[:2]
    if hidden.ndim != 3 or whole[0] != 1:
        raise InputError(f"its layers pass on hidden states {hidden.ndim}-fold")

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(cut, cast(tuple[Any, ...], value)))
        if isinstance(value, Tensor) and whole[1] in value.shape:
            if value.shape[:2] != whole:
                raise InputError(f"its layers take a tensor {[*value.shape]}")
            return only(value)
        if value is None or isinstance(value, (Tensor, bool, int, float, str, Places)):
            return value
        raise InputError(
            f"its layers share a {type(value).__name__}, which a second pass would overwrite"
        )

    return only(hidden), cut(args), {key: cut(value) for key, value in kwargs.items()}


def _tokens_of(tokens: Tensor, x: Tensor) -> Tensor:
    """Some of the tokens of a row, [1, n, …]."""
    return pick(x[0], tokens)[None]
