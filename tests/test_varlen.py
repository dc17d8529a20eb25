"""One attention call a layer against one for each length: values, gradients, the choice."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import helpers
import numpy as np
import plain_varlen
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batching import forests

from alphaspin.model import attention, varlen
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import collate
from alphaspin.model.settings import LoraConfig
from alphaspin.model.tree import Tree

PLAIN = plain_varlen.flash_attn_varlen_func


def differentiated(way: Callable[..., Any], *given: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in given]
    y = way(*leaves)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y.detach(), *(x.grad for x in leaves)]


@settings(max_examples=40, deadline=None)
@given(forests(), st.sampled_from([None, 1, 4]), st.sampled_from([None, 0.5]))
def test_every_query_once(trees: list[Tree], window: int | None, softcap: float | None) -> None:
    """Whole rows, and the last layer's queries, in float64."""
    batch = collate([(None, trees)], layout="packed")
    assert batch.places is not None
    kernel = varlen._flash(PLAIN, -1)
    limits = varlen.Limits(0.7, window, softcap)
    tokens = batch.input_ids.numel()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(tokens, heads, width, generator=generator, dtype=torch.float64)
        for heads, width in ((4, 6), (2, 6), (2, 5))
    )
    for places in (batch.places, batch.last and batch.last.places):
        if places is None:
            continue
        row = places.row()
        asked = q[: int(row.cu_q[-1])]
        one = partial(varlen.attention, kernel, row=row, limits=limits)
        other = partial(attention._by_length, places=places, limits=limits, sinks=None)
        near = 2e-6 if softcap else 1e-12  # there softmax is in fp32
        pairs = zip(
            differentiated(one, asked, k, v), differentiated(other, asked, k, v), strict=True
        )
        for found, expected in pairs:
            assert torch.allclose(found, expected, rtol=near, atol=near)


MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "gemma2": {"attn_logit_softcapping": 2.0},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("family", MODELS)
def test_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states and the adapter's gradients of several trees, and a call a layer."""
    backbone = Backbone(helpers.make_model(family, **MODELS[family]), "a model", "its hash")
    config = LoraConfig(r=2, alpha=2, targets=("all-linear",))
    backbone.add_adapter("policy", config, seed=0, iteration=0)
    backbone.random_adapter("check-1", "policy", 1)
    backbone.set_adapter_state("policy", backbone.adapter_state("check-1"))
    random = np.random.default_rng(0)
    trees = []
    for _ in range(5):
        prompt, one, other = (helpers.tokens(random, 2, 15) for _ in range(3))
        trees.append(Tree(prompt, (one, np.append(one[:2], other))))
    batch = collate([("policy", trees), (None, trees[:2])], layout="packed")
    calls: list[tuple[int, int]] = []
    right = varlen._flash(PLAIN, -1)

    def kernel(q: Any, k: Any, v: Any, row: Any, limits: Any) -> Any:
        calls.append((len(q), len(k)))
        return right(q, k, v, row, limits)

    def run() -> list[torch.Tensor]:
        backbone.zero_grad()
        hidden = backbone(batch)
        (hidden.sin() * torch.linspace(-1, 1, len(hidden))[:, None]).sum().backward()
        grads = [p.grad.flatten() for p in backbone.policy_parameters().values()]
        return [hidden.detach(), torch.cat(grads)]

    expected = run()
    assert not calls
    monkeypatch.setattr(varlen, "choose", lambda *_: kernel)
    found = run()
    tokens, asking = batch.input_ids.numel(), len(batch.last.asking.tokens)
    keys = sum(len(t.prompt) + len(y) - 1 for t in trees + trees[:2] for y in t.responses)
    assert calls == [(tokens, keys), (asking, keys)] and asking < tokens < keys
    for mine, its in zip(found, expected, strict=True):
        assert (mine - its).norm() < 3e-6 * its.norm()


FORM = varlen.Form(
    torch.device("cpu"), torch.bfloat16, (4, 2), (16, 16), True, True, False, ordered=True
)


def top_left(*args: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **kwargs: Any) -> Any:
    """As flash-attn before 2.1 and SDPA have it: the first query sees the first key."""
    q, k, v = args
    sizes = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    found = []
    for q_, k_, v_ in zip(q.split(sizes[0]), k.split(sizes[1]), v.split(sizes[1]), strict=True):
        count = torch.tensor([0, len(q_)], dtype=torch.int32)
        given = q_, k_[: len(q_)], v_[: len(q_)]
        found.append(PLAIN(*given, cu_seqlens_q=count, cu_seqlens_k=count, **kwargs))
    return torch.cat(found)


def wide(*args: Any, window_size: Any, **kwargs: Any) -> Any:
    """A window that has one token more."""
    return PLAIN(*args, window_size=(window_size[0] + 1, 0), **kwargs)


def refuses(*args: Any, deterministic: bool, **kwargs: Any) -> Any:
    if deterministic:
        raise AssertionError("deterministic backward not supported")
    return PLAIN(*args, **kwargs)


def half_the_gradient(*args: Any, **kwargs: Any) -> Any:
    """Of keys."""
    return PLAIN(args[0], (args[1] + args[1].detach()) / 2, args[2], **kwargs)


@pytest.fixture
def offers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., varlen.Choice]:
    """What is chosen where these are installed, by module."""

    def find(form: varlen.Form = FORM, **modules: Callable[..., Any]) -> varlen.Choice:
        for _, (module, function, _) in varlen.KERNELS.items():
            name = module.replace(".", "_")
            offered = SimpleNamespace(**{function: modules[name]}) if name in modules else None
            monkeypatch.setitem(sys.modules, module, offered)  # pyright: ignore
        ordered = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return varlen.find(form, attention.causal)
        finally:
            torch.use_deterministic_algorithms(ordered)

    return find


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (top_left, "its values are off by"),
        (wide, "its values are off by"),
        (lambda *x, softcap, **kwargs: PLAIN(*x, **kwargs), "its values are off by"),
        (half_the_gradient, "its dk are off by"),
        (refuses, "deterministic backward not supported"),
        (lambda *x, **kwargs: PLAIN(*x, **kwargs) * torch.nan, "its values are off by nan"),
    ],
)
def test_what_is_wrong_is_passed_over(fault: Any, reason: str, offers: Any) -> None:
    found = offers(flash_attn=PLAIN, flash_attn_interface=fault)
    assert found.name.startswith("flash-attn") and found.kernel is not None
    assert found.refused[0] == "flash-attn-4: not installed"
    assert found.refused[1].startswith(f"flash-attn-3: {reason}"), found.refused
    assert "one call a layer, by flash-attn" in str(found)


def torch_2_10(q: Any, k: Any, v: Any, *sizes: Any, is_causal: bool = False) -> Any:
    return PLAIN(q, k, v, *sizes, causal=is_causal)


def torch_2_11(
    q: Any, k: Any, v: Any, *sizes: Any, scale: Any = None, window_size: Any = (-1, -1)
) -> Any:
    return PLAIN(q, k, v, *sizes, softmax_scale=scale, window_size=window_size)


def torch_2_12(q: Any, k: Any, v: Any, *sizes: Any, enable_gqa: bool = False, **rest: Any) -> Any:
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return torch_2_11(q, k, v, *sizes, **rest)


def as_many_heads(q: Any, k: Any, v: Any, *sizes: Any, **rest: Any) -> Any:
    assert q.shape[1] == k.shape[1] == v.shape[1], "as many heads"
    return torch_2_11(q, k, v, *sizes, **rest)


as_many_heads.__signature__ = inspect.signature(torch_2_11)
torch_2_12.__signature__ = inspect.signature(lambda q, *, scale, window_size, enable_gqa: q)


@pytest.mark.parametrize(
    ("function", "expanded"),
    [(torch_2_10, False), (torch_2_11, False), (torch_2_12, False), (as_many_heads, True)],
)
def test_every_varlen_attn_of_torch(function: Any, expanded: bool, offers: Any) -> None:
    """It gets what its signature takes; each head keys of its own only where it wants them."""
    for form in (FORM._replace(windowed=False), FORM, FORM._replace(heads=(4, 4))):
        found = offers(form._replace(capped=False), torch_nn_attention_varlen=function)
        if function is torch_2_10 and form.windowed:
            assert found.kernel is None and found.refused[-1].endswith("has no window")
            continue
        assert found.kernel is not None, found.refused
        assert found.name.startswith("torch 2")
        assert found.name.endswith(", keys for each head") == (expanded and form.heads == (4, 2))


def test_what_none_serves(offers: Any) -> None:
    with_cap = offers(torch_nn_attention_varlen=lambda *x, scale, window_size, enable_gqa: x[0])
    assert with_cap.kernel is None and with_cap.refused[-1] == "torch: varlen_attn has no soft cap"
    old = offers(torch_nn_attention_varlen=lambda q, k, v: q)
    assert "a call for each length; not flash-attn-4: not installed" in str(old)
    for changed, reason in (
        ({"dtype": torch.float32}, "torch.float32"),
        ({"sinks": True}, "sinks"),
    ):
        none = offers(FORM._replace(**changed), flash_attn=PLAIN)
        assert none.kernel is None and reason in str(none)
