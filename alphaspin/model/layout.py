"""What a family of models can be served with, found by trying: packed trees, one joint pass.

A family that derives positions or masks in a way of its own, or whose layers mix tokens otherwise
than by attention, would be computed wrongly and silently. (What depends on adapters, or shows in
longer sequences only, is `verify`'s to find.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alphaspin.errors import InputError
from alphaspin.model.batching import Batch, collate
from alphaspin.model.routing import NOT_JOINT
from alphaspin.model.tree import Tree

FAILS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a family's code raises where it is given what it does not expect."""


def pin_positions(
    model: nn.Module, longest: int | None, max_positions: int | None, path: str
) -> tuple[int | None, int | None]:
    """Let no position embedding depend on what else is in the batch.

    transformers takes the frequencies of `longrope` and `dynamic` ones from the largest position of
    a call, so that a sequence would have those of its longest neighbour. Here each call is told of
    the longest sequence as well, and one policy has one set of frequencies: as vLLM has it, where
    the limit is `--max-model-len`.

    Returns:
        The number of tokens, where there is such an embedding, and `max_positions`, larger where
        `dynamic` scaling extends it.
    """
    pinned = None
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            kinds = list(cast(dict[str, str], kinds).values())
        kinds = [kinds] if isinstance(kinds, str) else kinds or []
        if not any("dynamic" in kind or kind == "longrope" for kind in kinds):
            continue
        if any("dynamic" in kind for kind in kinds) and max_positions is not None:
            config: Any = getattr(module, "config", None)
            ropes = getattr(config, "rope_parameters", None) or {}
            trained = ropes.get("original_max_position_embeddings") or 0
            max_positions = max(max_positions, int((ropes.get("factor") or 1.0) * trained))
        longest = longest or max_positions
        if longest is None:
            raise InputError(
                f"{path}: its position embeddings depend on the longest sequence, and its "
                "configuration has no max_position_embeddings"
            )
        module.forward = partial(_pinned, module.forward, longest)
        pinned = longest
    return pinned, max_positions


def _pinned(
    forward: Callable[..., Any],
    longest: int,
    x: Tensor,
    position_ids: Tensor,
    *args: Any,
    **kw: Any,
) -> Any:
    """A rotary embedding's cosines and sines, with frequencies for `longest` tokens."""
    if int(position_ids.max()) >= longest:
        raise InputError(
            f"a sequence of {int(position_ids.max()) + 1} tokens, where position embeddings were "
            f"fixed for {longest}: raise text.max_prompt_tokens or text.max_response_tokens"
        )
    last = torch.full_like(position_ids[..., :1], longest - 1)
    found = forward(x, torch.cat([position_ids, last], -1), *args, **kw)
    return tuple(part[..., :-1, :] for part in found)


class Served(Protocol):
    """What is asked of a `Backbone` here, which has the docstrings."""

    path: str
    layer_types: set[str]
    whole_reason: str

    @property
    def family(self) -> str: ...  # noqa: D102

    @property
    def head(self) -> nn.Linear: ...  # noqa: D102

    @property
    def ordinary_tokens(self) -> NDArray[np.int32]: ...  # noqa: D102

    def plain_hidden(self, ids: Tensor) -> Tensor: ...  # noqa: D102

    def __call__(self, batch: Batch, beside: Batch | None = None) -> Any: ...  # noqa: D102


@torch.no_grad()
def why_not_packed(backbone: Served) -> str:
    """Why trees cannot be packed into one row, or nothing.

    Raises:
        InputError: it is no better in padded rows, or a token sees what comes after it.
    """
    ids_S = torch.from_numpy(np.resize(backbone.ordinary_tokens, 12)).long()
    ids_1S = ids_S.to(backbone.head.weight.device)[None]
    whole_H, part_H = (backbone.plain_hidden(ids)[0, 7] for ids in (ids_1S, ids_1S[:, :8]))
    if unlike(backbone, whole_H.float(), part_H.float(), ""):
        raise InputError(
            f"{backbone.path}: models of type {backbone.family} cannot be served here: a token "
            "sees what comes after it, so that log-probs of tokens do not add up"
        )
    unknown = backbone.layer_types - {"full_attention", "sliding_attention"}
    reason = f"it has layers of type {', '.join(sorted(unknown))}" if unknown else ""
    reason = reason or _differs(backbone, "packed")
    if reason and not unknown:  # perhaps of the last layer's part alone (see `batching`)
        backbone.whole_reason = reason
        reason = _differs(backbone, "packed")
    if reason and (worse := _differs(backbone, "padded")):
        raise InputError(
            f"{backbone.path}: models of type {backbone.family} cannot be served here: {reason}, "
            f"and {worse}"
        )
    return reason


def _differs(backbone: Served, layout: Literal["packed", "padded"]) -> str:
    """What is wrong with a layout, or nothing."""
    # In 16 bits rounding alone can send a token to another expert; not with all tokens.
    tries = 1 if backbone.head.weight.dtype == torch.float32 else 3
    reason = ""
    for seed in range(tries):
        reason = _differs_once(backbone, layout, seed)
        if not reason:
            break
    return reason


def _differs_once(backbone: Served, layout: Literal["packed", "padded"], seed: int) -> str:
    """The same for one draw of tokens."""
    trees = _trees(backbone, np.random.default_rng(seed), (3, 4, 2), (7, 12, 5))
    device = backbone.head.weight.device
    try:
        batch = collate([(None, trees)], layout=layout).to(device)
        found = backbone(batch).float()[batch.entries]
    except InputError as error:
        return str(error)
    except FAILS as error:
        reason = next(iter(str(error).splitlines()), "")
        return f"it cannot attend to {layout} trees ({reason[:100]})"
    expected: list[Tensor] = []
    for tree in trees:
        for answer in tree.responses:
            ids = torch.from_numpy(np.concatenate([tree.prompt, answer])).long()[None]
            start = len(tree.prompt) - 1
            plain = backbone.plain_hidden(ids.to(device))
            expected.append(plain[0, start : start + len(answer)].float())
    return unlike(backbone, found, torch.cat(expected), f"{layout} and single sequences")


def _trees(
    backbone: Served, random: np.random.Generator, *lengths: tuple[int, int, int]
) -> list[Tree]:
    """Trees of a prompt and two responses of these lengths, with random tokens.

    The responses share what they begin with, but for the last tree's.
    """
    tokens = backbone.ordinary_tokens[:64]
    drawn = [[random.choice(tokens, length) for length in each] for each in lengths]
    for _, one, other in drawn[:-1]:
        other[: len(one) // 2] = one[: len(one) // 2]
    return [Tree(prompt, tuple(responses)) for prompt, *responses in drawn]


def unlike(backbone: Served, found: Tensor, expected: Tensor, what: str) -> str:
    """How far hidden states are from others, or nothing where rounding explains it."""
    error = float((found - expected).abs().max() / expected.abs().max())
    if error < (0.1 if backbone.head.weight.dtype == torch.bfloat16 else 1e-3):
        return ""
    return f"{what} differ by {error:.2g} of its hidden states"


@torch.no_grad()
def why_not_joint(backbone: Served, policy: str | None) -> str:
    """Why `policy` and its references cannot go through each layer together, or nothing."""
    random, device = np.random.default_rng(1), backbone.head.weight.device
    mine, theirs = (_trees(backbone, random, (5, 9, 3)) for _ in range(2))
    batch = collate([(policy, mine)], layout="packed").to(device)
    beside = collate([(None, theirs)], layout="packed").to(device)
    try:
        together = backbone(batch, beside)
        apart = backbone(batch), backbone(beside)
    except InputError as error:
        return str(error)
    except FAILS as error:
        return f"{NOT_JOINT}: {str(error).splitlines()[0][:100]}"
    close = all(
        bool((a - b).abs().max() <= 0.05 * b.abs().max())
        for a, b in zip(together, apart, strict=True)
    )
    return "" if close else f"{NOT_JOINT}: it changes the hidden states"
