"""One attention call for all sequences of a row, on a GPU: flash-attn's kernels, or PyTorch's own.

They take queries and keys of sequences one after another, of unlike number and without padding,
and let the last query of a sequence see its last key. So the tokens of the row are the queries as
they stand; keys and values are gathered once, so that what a sequence shares with one before it
stands again before its own:

    queries     p0 p1 p2 w0 w1 | l0 l1 l2
    keys        p0 p1 p2 w0 w1 | p0 p1 p2 l0 l1 l2

Which kernel there is for a layer is found by trying: the first of `KERNELS` that is installed,
takes its form, and is right in a small case, forward and backward.

Shapes: T tokens of the row, P of them with a query, K places of keys, B sequences, C copies of a
token at most; A heads (G for keys), D width of a head.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module, metadata
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from alphaspin.model.repeatable import refusing


@dataclass(frozen=True, slots=True)
class Row:
    """Where the tokens of a row stand among the keys.

    keys: [K] int64, the token at each place. home: [T] int64, the place that is a token's own.
    again: [C, T] int64, where it stands again, K for nowhere. cu_q, cu_k: [B + 1] int32, queries
    and keys before each sequence. max_q, max_k: most of them in one.
    """

    keys: Tensor
    home: Tensor
    again: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @staticmethod
    def of(sequences: Sequence[tuple[NDArray[np.int64], int]]) -> "Row":
        """Of (tokens, how many at their start are copies); the others are the row's, in order."""
        keys = np.concatenate([ids for ids, _ in sequences])
        copy = np.concatenate([np.arange(len(ids)) < copies for ids, copies in sequences])
        home, copies = np.flatnonzero(~copy), np.flatnonzero(copy)
        assert np.array_equal(keys[home], np.arange(len(home))), "each token once, in order"
        copies = copies[np.argsort(keys[copies], kind="stable")]
        tokens = keys[copies]
        number = np.arange(len(tokens)) - np.searchsorted(tokens, tokens)
        again = np.full((number.max(initial=-1) + 1, len(home)), len(keys))
        again[number, tokens] = copies
        cu_k = np.cumsum([0, *(len(ids) for ids, _ in sequences)])
        cu_q = cu_k - np.cumsum([0, *(copies for _, copies in sequences)])
        return Row(
            *(torch.from_numpy(x) for x in (keys, home, again)),
            *(torch.from_numpy(x.astype(np.int32)) for x in (cu_q, cu_k)),
            max_q=int(np.diff(cu_q).max()),
            max_k=int(np.diff(cu_k).max()),
        )

    def asking(self, silent: Tensor, asking: Tensor) -> "Row":
        """The same of tokens in another order: those [T - P] without a query come first.

        They are the first of their sequences, so that the last query still sees the last key.
        """
        order = torch.cat([silent, asking])
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        cu_q = torch.searchsorted(asking, self.cu_q.long(), out_int32=True)
        skipped = (self.cu_q - cu_q)[1:].repeat_interleave(cu_q.diff())
        assert torch.equal(asking, skipped + torch.arange(len(asking))), "the last of each sequence"
        return replace(
            self,
            keys=place[self.keys],
            home=self.home[order],
            again=self.again[:, order],
            cu_q=cu_q,
            max_q=int(cu_q.diff().max()),
        )

    def to(self, device: torch.device) -> "Row":
        """The same on `device`."""
        names = ("keys", "home", "again", "cu_q", "cu_k")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


class _Spread(torch.autograd.Function):
    """Tokens [T, …] to places of keys [K, …]; the backward pass gathers, and adds in one order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Row) -> Tensor:
        ctx.row = row
        return x.index_select(0, row.keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        row = cast(Row, ctx.row)
        grad = grads[0].index_select(0, row.home)
        if len(row.again):
            padded = pad(grads[0], (0, 0) * (grads[0].ndim - 1) + (0, 1))
            for places in row.again:
                grad += padded.index_select(0, places)
        return grad, None


class Limits(NamedTuple):
    """What a layer does to scores: 1/√D, all before it and no cap where they are None."""

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None


Kernel = Callable[[Tensor, Tensor, Tensor, Row, Limits], Tensor]
"""Causal attention [P, A, D] of q [P, A, D], k and v [K, G, D], aligned at each sequence's end."""


def attention(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, row: Row, limits: Limits) -> Tensor:
    """Attention [P, A, D] of the queries [P, A, D] of a row, and keys and values [T, G, D]."""
    k, v = (cast(Tensor, _Spread.apply(x, row)) for x in (k, v))
    return kernel(q, k, v, row, limits)


def _flash(function: Callable[..., Any], all_before: int | None) -> Kernel:
    """`flash_attn_varlen_func`; `all_before` is how it says that there is no window."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, row: Row, limits: Limits) -> Tensor:
        found = function(
            q,
            k,
            v,
            cu_seqlens_q=row.cu_q,
            cu_seqlens_k=row.cu_k,
            max_seqlen_q=row.max_q,
            max_seqlen_k=row.max_k,
            softmax_scale=limits.scaling,
            causal=True,
            window_size=(all_before if limits.window is None else limits.window - 1, 0),
            softcap=limits.softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return found if isinstance(found, Tensor) else found[0]  # some give lse as well

    return kernel


def _torch(function: Callable[..., Any], expanded: bool) -> Kernel | None:
    """`varlen_attn`; its gradients have an order where torch is to refuse what has none.

    Torch 2.10 has `is_causal` alone, 2.11 `scale` and `window_size` in its place, 2.12
    `enable_gqa` too. Before, keys with fewer heads are neither promised nor refused: they are
    tried as they are, then `expanded` to one for each head of the queries.
    """
    takes = inspect.signature(function).parameters
    if expanded and "enable_gqa" in takes:
        return None

    def kernel(q: Tensor, k: Tensor, v: Tensor, row: Row, limits: Limits) -> Tensor:
        if limits.softcap:
            raise NotImplementedError("varlen_attn has no soft cap")
        options: dict[str, Any] = {}
        share = q.shape[1] // k.shape[1]
        if "enable_gqa" in takes:
            options["enable_gqa"] = share > 1
        elif expanded:
            k, v = (x.repeat_interleave(share, 1) for x in (k, v))
        if "scale" in takes:
            options["scale"] = limits.scaling
        elif limits.scaling is not None:
            factor = limits.scaling * q.shape[2] ** 0.5
            q = q if math.isclose(factor, 1.0) else q * factor
        if "window_size" in takes:
            options["window_size"] = (-1 if limits.window is None else limits.window - 1, 0)
        elif limits.window is None:
            options["is_causal"] = True
        else:
            raise NotImplementedError(f"varlen_attn of torch {torch.__version__} has no window")
        return function(q, k, v, row.cu_q, row.cu_k, row.max_q, row.max_k, **options)

    return kernel


KERNELS: dict[str, tuple[str, str, Callable[[Any], Kernel | None]]] = {
    "flash-attn-4": ("flash_attn.cute", "flash_attn_varlen_func", partial(_flash, all_before=None)),
    "flash-attn-3": (
        "flash_attn_interface",
        "flash_attn_varlen_func",
        partial(_flash, all_before=-1),
    ),
    "flash-attn": ("flash_attn", "flash_attn_varlen_func", partial(_flash, all_before=-1)),
    "torch": ("torch.nn.attention.varlen", "varlen_attn", partial(_torch, expanded=False)),
    "torch, keys for each head": (
        "torch.nn.attention.varlen",
        "varlen_attn",
        partial(_torch, expanded=True),
    ),
}
"""By the distribution, best first: module, function, and how it is called, if that is a way."""


class Form(NamedTuple):
    """What decides which kernel a layer gets. ordered: its gradients are to be the same again."""

    device: torch.device
    dtype: torch.dtype
    heads: tuple[int, int]
    widths: tuple[int, int]
    windowed: bool
    capped: bool
    sinks: bool
    ordered: bool


class Choice(NamedTuple):
    """A kernel and its name, None where there is none, and why not those before it."""

    kernel: Kernel | None
    name: str
    refused: tuple[str, ...]

    def __str__(self) -> str:
        way = f"one call a layer, by {self.name}" if self.kernel else "SDPA, a call for each length"
        return "; ".join([way, *(f"not {reason}" for reason in self.refused)])


CHOSEN: dict[Form, Choice] = {}
"""What was found in this process."""


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    limits: Limits,
    sinks: Tensor | None,
    exact: Callable[..., Tensor],
) -> Kernel | None:
    """The kernel for a layer with such q [P, A, D], k and v [T, G, D], or None, as on CPUs.

    Args:
        sinks: of the heads, or None.
        exact: attention by plain products, of q, k, v [1, A, S, D] and limits.
    """
    if not q.is_cuda:
        return None
    form = Form(
        q.device,
        q.dtype,
        (q.shape[1], k.shape[1]),
        (q.shape[2], v.shape[2]),
        limits.window is not None,
        bool(limits.softcap),
        sinks is not None,
        torch.are_deterministic_algorithms_enabled(),
    )
    if form not in CHOSEN:
        CHOSEN[form] = find(form, exact)
    return CHOSEN[form].kernel


def on(device: torch.device) -> list[str]:
    """Which ways the layers of this process have taken on such a device, and why."""
    # By its type: what Accelerate calls the only GPU may have no number.
    return sorted({str(way) for form, way in CHOSEN.items() if form.device.type == device.type})


def find(form: Form, exact: Callable[..., Tensor]) -> Choice:
    """The first of `KERNELS` that serves a form."""
    if form.sinks or form.dtype not in (torch.bfloat16, torch.float16):
        what = "its heads have sinks" if form.sinks else f"they have no {form.dtype}"
        return Choice(None, "", (f"flash-attn or varlen_attn: {what}",))
    refused: list[str] = []
    for name, (module, function, adapt) in KERNELS.items():
        kernel = None
        try:
            kernel = adapt(getattr(import_module(module), function))
            if kernel is None:
                continue
            reason = _wrong(kernel, form, exact)
        except torch.OutOfMemoryError:
            raise  # which says nothing of the kernel
        except Exception as error:  # whatever a compiler or a kernel raises
            missing = isinstance(error, ModuleNotFoundError) and module.startswith(
                error.name or "-"
            )
            reason = next(iter(str(error).splitlines()), repr(error))[:100]
            reason = "not installed" if missing else reason
        if not reason:
            with suppress(metadata.PackageNotFoundError):
                package = name.partition(",")[0]
                name = name.replace(package, f"{package} {metadata.version(package)}", 1)
            return Choice(kernel, name, tuple(refused))
        refused.append(f"{name}: {reason}")
    return Choice(None, "", tuple(refused))


OFF = 0.03
"""At most, of the norm: 16 bits round weights and results by .4 % each."""


@torch.enable_grad()
def _wrong(kernel: Kernel, form: Form, exact: Callable[..., Tensor]) -> str:
    """By how much values or gradients of a kernel are off in a small case, or nothing.

    Its sequences: more than a tile, a copy alone, copies and more than a tile, one more token.
    """
    one, other = np.arange(150), np.arange(151, 340)
    sequences = [(one, 0), (one[:30], 30), (np.append(one[:9], 150), 9), (other, 0)]
    sequences.append((np.concatenate([other[:140], np.arange(340, 410)]), 140))
    row = Row.of(sequences)
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int, width: int) -> Tensor:
        return torch.randn(len(row.home), heads, width, generator=generator).to(form.dtype)

    share, (width, out) = form.heads[0] // form.heads[1], form.widths
    groups = min(form.heads[1], 2)  # all are alike
    heads = share * groups
    given = [normal(heads, width), normal(groups, width), normal(groups, out)]
    dy = normal(heads, out)
    limits = Limits(2 * width**-0.5, 5 if form.windowed else None, 2.0 if form.capped else None)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: list[Tensor] = []
        for ids, copies in sequences:
            q_, k_, v_ = (x[torch.from_numpy(ids)].transpose(0, 1)[None] for x in (q, k, v))
            found.append(exact(q_, k_, v_, limits)[0].transpose(0, 1)[copies:])
        return torch.cat(found)

    def both(function: Callable[..., Tensor], move: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [move(x).detach().requires_grad_() for x in given]
        y = function(*leaves)
        with warnings.catch_warnings(), refusing(form.ordered):
            warnings.simplefilter("ignore")
            y.backward(move(dy))
        return [x.detach().cpu().float() for x in (y, *(cast(Tensor, x.grad) for x in leaves))]

    there = row.to(form.device)

    def trial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(kernel, q, k, v, there, limits)

    found = both(trial, lambda x: x.to(form.device))
    right = both(plain, lambda x: x.float())
    for what, mine, its in zip(("values", "dq", "dk", "dv"), found, right, strict=True):
        error = float((mine - its).norm() / its.norm())
        if not error < OFF:
            return f"its {what} are off by {error:.2g} in a small case"
    return ""
