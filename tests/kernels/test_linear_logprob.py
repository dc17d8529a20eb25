"""linear_logprob against its definition in float64, for every implementation.

Implementations: "torch" (portable), "csrc" (C++, what this processor gets), "packed" (C++ in the
layout of the 16-bit matrix units, which processors without them emulate).
"""

import importlib
import math
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from alphaspin_kernels import _dispatch, kernel_status, linear_logprob, reference
from alphaspin_kernels.linear_logprob import ROWS, TILE, _linear_logprob, _portable
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import (
    BUILT,
    CSRC,
    TORCH,
    TRITON,
    LargestTensor,
    generator,
    needs_csrc,
    needs_triton,
    poisoned,
    there,
)

ROOT = Path(__file__).parents[2]
# The package's attribute of this name is the function.
MODULE = sys.modules["alphaspin_kernels.linear_logprob"]
CSRC_TILE = 256


def use(implementation: str, force, monkeypatch: pytest.MonkeyPatch) -> None:
    force("csrc" if implementation == "packed" else implementation)
    # Small chunks, so that small inputs have several of them and a partial last one.
    if implementation == "torch":
        monkeypatch.setattr(MODULE, "TILE", CSRC_TILE)
        monkeypatch.setattr(MODULE, "ROWS", 16)
    if implementation == "triton":
        kernels = importlib.import_module("alphaspin_kernels._triton.linear_logprob")
        monkeypatch.setattr(kernels, "ROWS", 16)
        monkeypatch.setattr(kernels, "_chunks", lambda *_, frozen: (CSRC_TILE,))
    if implementation == "packed":
        packed = torch.ops.alphaspin.linear_logprob_cpu_packed
        monkeypatch.setattr(torch.ops.alphaspin, "linear_logprob_cpu", packed)


PACKED = pytest.param("packed", marks=needs_csrc)


@pytest.fixture(params=[TORCH, CSRC, PACKED, TRITON])
def implementation(request, force, monkeypatch) -> str:
    use(request.param, force, monkeypatch)
    return request.param


@pytest.fixture(params=[TORCH, CSRC, TRITON])
def unpacked(request, force, monkeypatch) -> str:
    use(request.param, force, monkeypatch)
    return request.param


def problem(
    n=37, h=64, v=701, k=None, dtype=torch.float32, scale=1.0, bias=False, ignored=0.2, seed=0
) -> dict:
    """Inputs of one case; targets [n] or [n, k], about a fifth of them ignored."""
    random = generator(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    shape = (n,) if k is None else (n, k)
    targets = torch.randint(0, max(v, 1), shape, generator=random)
    targets[torch.rand(shape, generator=random) < ignored] = -100
    return {
        "hidden": (scale * normal(n, h)).to(dtype),
        "weight": (normal(v, h) / math.sqrt(h)).to(dtype),
        "targets": targets,
        "bias": normal(v).to(dtype) if bias else None,
        "grad": normal(*shape),
    }


def differentiate(function, case: dict, trainable: bool, **options) -> dict[str, torch.Tensor]:
    """Log-probs and gradients under a non-uniform upstream gradient."""
    leaves = {
        name: None if case[name] is None else case[name].detach().clone()
        for name in ("hidden", "weight", "bias")
    }
    wanted = ("hidden", "weight", "bias") if trainable else ("hidden",)
    for name in wanted:
        if leaves[name] is not None:
            leaves[name].requires_grad_()
    logp = function(
        leaves["hidden"], leaves["weight"], case["targets"], bias=leaves["bias"], **options
    )
    logp.backward(case["grad"].to(logp.dtype))
    results = {"logp": logp.detach()}
    for name in wanted:
        if leaves[name] is not None:
            results[name] = leaves[name].grad
    return results


def plain(hidden, weight, targets, *, bias=None, softcap=None, temperature=1.0, ignore_index=-100):
    """What a user writes: logits in the dtype of the model, log_softmax in fp32."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    flat = targets.reshape(len(targets), -1)
    ignored = flat == ignore_index
    picked = logp.gather(1, flat.masked_fill(ignored, 0)).masked_fill(ignored, 0.0)
    return picked.reshape(targets.shape)


def double(case: dict) -> dict:
    return {
        name: value.double() if value is not None and value.is_floating_point() else value
        for name, value in case.items()
    }


def assert_no_worse(case: dict, trainable: bool, **options) -> None:
    """Elementwise, an error of at most plain PyTorch's in the same dtype plus a few roundings."""
    exact = differentiate(reference.linear_logprob, double(case), trainable, **options)
    usual = differentiate(plain, case, trainable, **options)
    ours = differentiate(linear_logprob, case, trainable, **options)
    assert ours["logp"].dtype == torch.float32
    assert ours["logp"].shape == case["targets"].shape
    eps = torch.finfo(case["hidden"].dtype).eps
    fp32 = torch.finfo(torch.float32).eps
    logits = torch.nn.functional.linear(*(case[name].float() for name in ("hidden", "weight")))
    logit = (logits.abs().amax() + (0 if case["bias"] is None else 4)).double()
    # Gradients are differences of terms of this size ...
    term = {"hidden": case["weight"].abs().amax(), "weight": case["hidden"].abs().amax(), "bias": 1}
    # ... whose factor p is as good as the logits: recomputed ones differ by their rounding.
    rounding = 4 * fp32 * (1 + logit * trainable / options.get("temperature", 1.0))
    rounding *= case["grad"].abs().amax() / options.get("temperature", 1.0)
    for name, value in ours.items():
        assert value.isfinite().all(), name
        error = (value.double() - exact[name]).abs()
        allowed = (usual[name].double() - exact[name]).abs()
        if name == "logp":
            # Sums of H products in fp32, whatever the inputs: logits of size |lp| at the most.
            tolerance = 2e-6 + 4e-7 * exact[name].abs().amax()
        else:
            # Results are rounded to the dtype of the leaf, and p to the dtype of its tile.
            tolerance = eps * exact[name].abs() + 0.5 * eps * exact[name].abs().amax()
            tolerance += rounding * term[name]
        worst = (error - allowed - tolerance).max()
        assert worst <= 0, f"{name}: {error.max():.3g} against {allowed.max():.3g} of PyTorch"


CASES = {
    "ragged": {"n": 37, "h": 61, "v": 3 * CSRC_TILE + 3},
    "one row": {"n": 1, "h": 64, "v": 701},
    "whole tiles": {"n": 16, "h": 32, "v": 2 * CSRC_TILE},
    "tiny vocabulary": {"n": 5, "h": 3, "v": 2},
    "nothing ignored": {"n": 33, "h": 64, "v": 523, "ignored": 0.0},
    "bias": {"n": 19, "h": 64, "v": 523, "bias": True},
    "K targets": {"n": 19, "h": 64, "v": 523, "k": 3, "bias": True},
}


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=["", "capped"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_no_worse_than_pytorch(name, dtype, trainable, options, unpacked):
    assert_no_worse(problem(dtype=dtype, **CASES[name]), trainable, **options)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=["", "capped"])
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_worse_in_16_bits(dtype, k, options, implementation):
    case = problem(n=37, h=64, v=523, k=k, bias=True, dtype=dtype)
    assert_no_worse(case, trainable=False, **options)


@pytest.mark.parametrize(
    ("dtype", "softcap", "k"),
    [
        (torch.float32, None, None),
        (torch.bfloat16, None, 2),
        (torch.bfloat16, 30.0, None),
        (torch.bfloat16, 30.0, 2),
        (torch.float16, 30.0, None),
    ],
    ids=str,
)
def test_peaked_rows(dtype, softcap, k, implementation):
    """p up to .9999 at the target: lp and the gradient are small differences, row by row."""
    case = problem(n=12, h=64, v=523, k=k, ignored=0.0, dtype=dtype)
    weight, first = case["weight"].double(), case["targets"].reshape(12, -1)[:, 0]
    if k is not None:
        case["grad"][:, 1] = 0  # of an improbable target, beside which the first one's is nothing
    # Moving a row along W[y] / |W[y]|^2 raises the target's logit by the step.
    direction = weight[first] / weight[first].square().sum(1, keepdim=True)
    steps = torch.linspace(6, 36, 12, dtype=torch.float64)[:, None]
    case["hidden"] = (case["hidden"].double() + steps * direction).to(dtype)
    p = reference.linear_logprob(case["hidden"].double(), weight, first, softcap=softcap).exp()
    assert 0.9 < p.median() < p.max()
    assert p.max() > 0.9999
    assert_no_worse(case, trainable=False, softcap=softcap)
    assert_no_worse(case, trainable=True, softcap=softcap)
    options = {"trainable": False, "softcap": softcap}
    exact = differentiate(reference.linear_logprob, double(case), **options)["hidden"]
    usual = differentiate(plain, case, **options)["hidden"]
    ours = differentiate(linear_logprob, case, **options)["hidden"]
    allowed = (usual.double() - exact).norm(dim=1) + torch.finfo(dtype).eps * exact.norm(dim=1)
    # W[y] - E_p[W] in fp32, from terms of this size and logits of some tens.
    noise = 1e-5 * case["grad"].reshape(12, -1)[:, 0].abs() * weight.norm(dim=1).max()
    assert ((ours.double() - exact).norm(dim=1) <= allowed + noise).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_logits(dtype, implementation):
    """Logits of +-1e4 neither overflow nor lose the normaliser."""
    case = problem(n=16, h=64, v=1031, dtype=dtype, scale=2500.0)
    logits = case["hidden"].double() @ case["weight"].double().T
    assert logits.abs().max() > 9e3
    assert_no_worse(case, trainable=False)


def test_masked_vocabulary(implementation):
    """Entries masked with -inf, a whole first tile of them, count for nothing."""
    case = problem(n=9, h=64, v=CSRC_TILE + 301, bias=True, ignored=0.0, dtype=torch.bfloat16)
    case["bias"][: CSRC_TILE + 1] = -torch.inf
    case["targets"] = torch.arange(9) + CSRC_TILE + 1
    exact = differentiate(reference.linear_logprob, double(case), False)
    ours = differentiate(linear_logprob, case, False)
    torch.testing.assert_close(ours["logp"].double(), exact["logp"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours["hidden"].double(), exact["hidden"], rtol=1e-2, atol=1e-2)


@needs_triton
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "chunk", "gigabytes"),
    [
        # 8 times: fp32 mean 4 + 4, hidden states 2 bytes; logits and p 12 bytes an entry.
        (4096, 4096, 128_256, 16384, 8 * 0.16777 + 6.30402),
        (1024, 4096, 128_256, 4096, 32 * 0.04194),  # 25 MB a chunk stay in the cache
        (300, 4096, 128_256, 16384, 8 * 0.01229),
        (4096, 4096, 50_257, 8192, 7 * 0.16777 + 2.47023),
    ],
)
def test_chunks_that_move_the_fewest_bytes(rows, width, vocabulary, chunk, gigabytes):
    linear = importlib.import_module("alphaspin_kernels._triton.linear_logprob")
    common = importlib.import_module("alphaspin_kernels._triton.common")
    sizes = linear._chunks(width, vocabulary, frozen=True)
    assert common.chunk_entries(rows, width, vocabulary, sizes) == chunk
    moved = common.chunk_bytes(rows, width, vocabulary, chunk) / 1e9
    assert moved == pytest.approx(gigabytes, rel=1e-3)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("h", "before", "after", "copied"),
    [(72, 0, 0, True), (72, 8, 16, True), (72, 0, 1, False), (72, 1, 7, False), (65, 0, 0, False)],
    ids=str,
)
@pytest.mark.parametrize("implementation", [TRITON], indirect=True)
def test_the_copy_engine_gets_what_it_takes(
    h, before, after, copied, softcap, implementation, monkeypatch
):
    """Rows of 16 bytes one after another, as tensor descriptors; others go by pointers."""
    head = importlib.import_module("alphaspin_kernels._triton.head")
    taken, blocks = [], head.blocks
    monkeypatch.setattr(
        head, "blocks", lambda *args, **kw: taken.append(kw["tma"]) or blocks(*args, **kw)
    )
    case = problem(n=150, h=h, v=301, k=2, dtype=torch.bfloat16, bias=True)
    columns = (before, after)
    case["weight"] = torch.nn.functional.pad(case["weight"], columns)[:, before : before + h]
    exact = reference.linear_logprob(
        *(double(case)[name] for name in ("hidden", "weight", "targets")),
        bias=case["bias"].double(),
        softcap=softcap,
        temperature=0.7,
    )
    ours = linear_logprob(
        *(case[name] for name in ("hidden", "weight", "targets")),
        bias=case["bias"],
        softcap=softcap,
        temperature=0.7,
    )
    torch.testing.assert_close(ours.double(), exact, rtol=4e-7, atol=3e-6)
    assert taken[0] is copied


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("k", [None, 3])
def test_ignored_rows_are_not_read(k, trainable, implementation):
    """NaN in an ignored row, and in memory nobody wrote, reaches nothing."""
    case = problem(n=40, h=64, v=523, k=k, dtype=torch.bfloat16, bias=True)
    case["targets"][::4] = -100
    skipped = (case["targets"].reshape(40, -1) == -100).all(1)
    clean = differentiate(linear_logprob, case, trainable)
    case["hidden"][skipped] = torch.nan
    with poisoned():
        dirty = differentiate(linear_logprob, case, trainable)
    assert (dirty["logp"][case["targets"] == -100] == 0).all()
    assert (dirty["hidden"][skipped] == 0).all()
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("k", [None, 2])
def test_what_arrives_at_an_ignored_target_counts_for_nothing(k, trainable, implementation):
    case = problem(n=9, h=32, v=101, k=k, bias=True)
    expected = differentiate(linear_logprob, case, trainable)
    case["grad"][case["targets"] == -100] = torch.nan
    for name, value in differentiate(linear_logprob, case, trainable).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("skip_below", [0.0, 1e-3])
def test_a_row_that_is_not_finite_leaves_the_others_alone(skip_below, bad, implementation):
    """Its tiles cannot be skipped: what other rows need of them would go too."""
    case = problem(n=12, h=64, v=3 * CSRC_TILE, ignored=0.0, dtype=torch.bfloat16)
    expected = differentiate(linear_logprob, case, False)
    case["hidden"][5] = bad
    ours = differentiate(linear_logprob, case, False, skip_below=skip_below)
    assert ours["logp"][5].isnan()
    others = torch.arange(12) != 5
    for name, value in ours.items():
        torch.testing.assert_close(value[others], expected[name][others])


@pytest.mark.parametrize("shape", [(0,), (0, 2), (7,), (7, 2), (7, 0)], ids=str)
def test_nothing_to_score(shape, unpacked):
    targets = torch.full(shape, -1)
    hidden = torch.randn(shape[0], 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    logp = linear_logprob(hidden, weight, targets, ignore_index=-1)
    assert logp.shape == shape
    logp.sum().backward()
    for tensor in (logp, hidden.grad, weight.grad):
        assert tensor.eq(0).all()
    assert hidden.grad.shape == hidden.shape
    frozen = linear_logprob(hidden, weight.detach(), targets, ignore_index=-1)
    assert torch.autograd.grad(frozen.sum(), hidden)[0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(dtype, implementation):
    case = problem(n=21, h=64, v=523, k=2, dtype=dtype, bias=True)
    expected = differentiate(linear_logprob, case, False)
    strided = {
        "hidden": case["hidden"].T.contiguous().T,
        "weight": case["weight"].T.contiguous().T,
        "targets": case["targets"].T.contiguous().T,
        "bias": case["bias"].repeat_interleave(2)[::2],
        "grad": case["grad"],
    }
    assert not any(value.is_contiguous() for name, value in strided.items() if name != "grad")
    hidden = strided["hidden"].requires_grad_()
    logp = linear_logprob(hidden, strided["weight"], strided["targets"], bias=strided["bias"])
    (grad,) = torch.autograd.grad(logp, hidden, case["grad"])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logp, expected["logp"], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(grad, expected["hidden"], rtol=2 * eps, atol=2e-6)


def test_same_bits_again(implementation):
    case = problem(n=150, h=64, v=1031, dtype=torch.bfloat16)
    first, second = (differentiate(linear_logprob, case, False) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_autocast_does_not_round_the_logits(unpacked):
    case = problem()
    expected = differentiate(linear_logprob, case, True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = differentiate(linear_logprob, case, True)
    for name, value in expected.items():
        assert torch.equal(value, ours[name]), name


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_skipped_costs_no_more_than_the_mass_it_reports(
    dtype, k, implementation, monkeypatch
):
    """The mass is in the first and last tiles, and a token of 2 to 9 ε in one between them."""
    chunk = CSRC_TILE
    if implementation == "triton":
        frozen_head = importlib.import_module("alphaspin_kernels._triton.frozen_head")
        monkeypatch.setattr(frozen_head, "_chunk", lambda *_: 1)
        # Chunks of which nothing is needed too.
        linear = importlib.import_module("alphaspin_kernels._triton.linear_logprob")
        monkeypatch.setattr(linear, "_chunks", lambda *_, frozen: (2 * 128,))
    n, last, rare, epsilon = 16, 5 * CSRC_TILE, 2 * CSRC_TILE + 200, 1e-3
    case = problem(n=n, h=64, v=last + 40, k=k, ignored=0.0, dtype=dtype, bias=True)
    case["bias"][:] = 0
    case["bias"][:40] = 8
    case["bias"][rare] = 5
    case["bias"][last:] = 10
    mass = torch.full((n,), torch.nan)
    exact = differentiate(linear_logprob, case, False)
    ours = differentiate(linear_logprob, case, False, skip_below=epsilon, skipped_mass=mass)
    assert torch.equal(ours["logp"], exact["logp"])
    error = (ours["hidden"].double() - exact["hidden"].double()).abs()
    assert error.max() > 0
    grad = case["grad"].reshape(n, -1).abs().sum(1)
    bound = mass * grad * case["weight"].abs().max()
    rounding = 2 * torch.finfo(dtype).eps * exact["hidden"].double().abs() + 1e-6
    assert (error <= bound[:, None].double() + rounding).all()
    z = case["hidden"].double() @ case["weight"].double().T + case["bias"].double()
    share = (z[:, rare] - z[:, : rare + 1].logsumexp(1)).exp().max()  # of the sum so far
    assert 2 * epsilon < share < 9 * epsilon
    tile = 128 if implementation == "triton" else CSRC_TILE
    left_out = torch.arange(last + 40)
    probability = z.softmax(1)
    if implementation == "triton" and dtype == torch.bfloat16 and k is None:
        # Of entries, after the first chunk; the target's own is never one.
        own = case["targets"].reshape(n, 1)
        known = z.gather(1, own)
        probability.scatter_(1, own, 0.0)
        z.scatter_(1, own, -math.inf)
        keep = [left_out[:chunk] >= 0]
        for z_RC, before in zip(z.split(chunk, 1)[1:], range(chunk, last + 40, chunk), strict=True):
            known = torch.cat([known, z[:, before - chunk : before]], 1)
            largest = (z_RC - known.logsumexp(1, keepdim=True)).exp().amax(0)
            assert not ((largest > 0.99 * epsilon) & (largest < 1.01 * epsilon)).any()
            keep.append(largest >= epsilon)
        left_out = ~torch.cat(keep)
        assert left_out.sum() > last / 2 and not left_out[rare] and not left_out[last:].any()
    else:
        left_out = (left_out >= tile) & (left_out < last) & (left_out // tile != rare // tile)
    expected = (probability * left_out).sum(1)
    torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=1e-7)


def test_nothing_is_skipped_by_default(implementation):
    case = problem()
    mass = torch.full((37,), torch.nan)
    differentiate(linear_logprob, case, False, skipped_mass=mass)
    assert mass.eq(0).all()


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("k", [None, 2])
def test_gradcheck(k, trainable):
    case = double(problem(n=5, h=4, v=7, k=k, bias=True))
    inputs = tuple(case[name].requires_grad_(trainable) for name in ("hidden", "weight", "bias"))
    inputs[0].requires_grad_()

    def function(hidden, weight, bias):
        return linear_logprob(
            hidden, weight, case["targets"], bias=bias, softcap=2.0, temperature=0.8
        )

    assert torch.autograd.gradcheck(function, inputs)


def test_only_the_bias_is_trained(unpacked):
    case = problem(bias=True)
    exact = differentiate(reference.linear_logprob, double(case), True)
    bias = case["bias"].clone().requires_grad_()
    logp = linear_logprob(case["hidden"], case["weight"], case["targets"], bias=bias)
    (grad,) = torch.autograd.grad(logp, bias, case["grad"])
    torch.testing.assert_close(grad.double(), exact["bias"], rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_an_error_not_a_number():
    case = double(problem(n=3, h=4, v=7, ignored=0.0))
    hidden = case["hidden"].requires_grad_()
    logp = linear_logprob(hidden, case["weight"], case["targets"])
    (grad,) = torch.autograd.grad(logp.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("with_row", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_opcheck(k, with_row, unpacked):
    case = problem(n=5, h=8, v=11, k=k, bias=True)
    arguments = (case["hidden"].requires_grad_(), case["weight"], case["targets"], case["bias"])
    torch.library.opcheck(_linear_logprob.registered, (*arguments, 2.0, 0.8, -100, with_row, 0.0))


def test_compile_without_graph_break(unpacked):
    case = problem(n=5, h=8, v=11)

    def step(hidden, weight, targets):
        return linear_logprob(hidden * 2, weight, targets, softcap=4.0).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        hidden = case["hidden"].clone().requires_grad_()
        value = function(hidden, case["weight"], case["targets"])
        value.backward()
        results.append((value.detach(), hidden.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_compiles_once_for_any_number_of_rows(trainable, unpacked):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_logprob, fullgraph=True, backend=counter)
    for n in (5, 6, 7, 9):
        case = problem(n=n, h=8, v=11)
        expected = differentiate(linear_logprob, case, trainable)
        for name, value in differentiate(compiled, case, trainable).items():
            torch.testing.assert_close(value, expected[name])
    assert counter.frame_count <= 2  # the second size makes it dynamic


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 70),
    h=st.integers(1, 70),
    v=st.integers(1, 1100),
    k=st.sampled_from([None, 1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(n, h, v, k, dtype, softcap, temperature, seed):
    """What runs on this machine, and the portable version, agree with the definition."""
    case = problem(n=n, h=h, v=v, k=k, dtype=dtype, seed=seed, bias=bool(seed % 2))
    options = {"softcap": softcap, "temperature": temperature}
    assert_no_worse(case, trainable=bool(seed % 3), **options)
    targets = case["targets"].reshape(n, -1)
    logp, *_ = _portable(
        case["hidden"],
        case["weight"],
        targets,
        case["bias"],
        softcap,
        temperature,
        -100,
        False,
        0.0,
    )
    exact = reference.linear_logprob(
        case["hidden"].double(),
        case["weight"].double(),
        targets,
        bias=None if case["bias"] is None else case["bias"].double(),
        **options,
    )
    torch.testing.assert_close(logp.double(), exact, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(4, 7)}, r"H = 7 .* H = 8"),
        ({"hidden": torch.zeros(1, 4, 8)}, r"\[1, 4, 8\] and \[11, 8\]"),
        ({"hidden": torch.zeros(4, 8, dtype=torch.int64)}, "torch.int64"),
        ({"hidden": torch.zeros(4, 8, dtype=torch.bfloat16)}, "torch.bfloat16 .* torch.float32"),
        ({"hidden": torch.zeros(4, 8, device="meta")}, "meta .* cpu"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"N = 4, got \[5\]"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, "torch.int64, got torch.int32"),
        ({"targets": torch.tensor([0, 11, 0, 0])}, r"target 11 .* \[0, 11\)"),
        ({"targets": torch.tensor([0, 1 << 60, 0, 0])}, r"target 1152921504606846976 .* \[0, 11\)"),
        ({"targets": torch.tensor([0, 1, -1, 0])}, r"target -1 .* ignore_index = -100"),
        ({"bias": torch.zeros(10)}, r"V = 11, got \[10\]"),
        ({"bias": torch.zeros(11, dtype=torch.float64)}, "torch.float32 .* torch.float64"),
        ({"softcap": 0.0}, "softcap .* 0.0"),
        ({"temperature": -1.0}, "temperature .* -1.0"),
        ({"temperature": math.nan}, "temperature .* nan"),
    ],
)
def test_bad_arguments(changes, message, unpacked):
    arguments = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(11, 8),
        "targets": torch.tensor([0, 10, -100, 3]),
    }
    linear_logprob(**arguments)
    changes, device = there(changes), torch.get_default_device()
    for function in (linear_logprob, reference.linear_logprob):
        with pytest.raises(ValueError, match=message.replace("cpu", str(device))):
            function(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip_below": 1.0}, "skip_below .* 1.0"),
        ({"skip_below": -0.1}, "skip_below .* -0.1"),
        ({"skip_below": 0.1, "weight": torch.zeros(11, 8).requires_grad_()}, "0.1 needs a frozen"),
        ({"skipped_mass": torch.zeros(3)}, r"N = 4, got \[3\]"),
    ],
)
def test_bad_skipping(changes, message):
    arguments = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(11, 8),
        "targets": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(arguments | changes))


def test_portable_version_builds_no_logit_matrix():
    case = problem(n=64, h=4, v=256_000, k=1)
    arguments = (case["hidden"], case["weight"], case["targets"], None, None, 1.0, -100, True, 0.0)
    with LargestTensor() as largest:
        _portable(*arguments)
    assert 0 < largest.numel <= 64 * TILE < 64 * 256_000 / 100


@pytest.mark.parametrize("unpacked", [TORCH, CSRC], indirect=True)
def test_peak_memory(unpacked, monkeypatch):
    """Forward and both backward passes stay far below the 251 MiB of one [N, V] matrix."""
    monkeypatch.setattr(MODULE, "TILE", TILE)
    monkeypatch.setattr(MODULE, "ROWS", ROWS)
    case = problem(n=257, h=4, v=256_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    differentiate(linear_logprob, case, trainable=False)
    differentiate(linear_logprob, case, trainable=True)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 80 * 1024


def test_status_names_the_implementation():
    status = kernel_status()
    assert {"linear_logprob.cpu", "linear_logprob.cuda"} <= set(status)
    start = "C++ extension" if BUILT else "PyTorch: extension"
    assert status["linear_logprob.cpu"].startswith(start)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "not built"),
        (b"..ALPHASPIN_TORCH=1.0.2..", "built for torch 1.0, this is torch"),
        (b"ALPHASPIN_TORCH=" + torch.__version__.encode(), "does not load"),
    ],
    ids=["missing", "other torch", "damaged"],
)
def test_without_the_extension_it_works_and_says_so_once(content, reason, tmp_path, monkeypatch):
    library = tmp_path / "_C.so"
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setattr(_dispatch, "_LIBRARY", library)
    _dispatch.csrc_problem.cache_clear()
    _dispatch._warn_once.cache_clear()
    try:
        case = problem(n=3)
        arguments = (case["hidden"], case["weight"], case["targets"])
        with pytest.warns(UserWarning, match=f"{reason}.*pip install") as caught:
            logp = [linear_logprob(*arguments) for _ in range(2)]
        assert len(caught) == 1
        assert reason in kernel_status()["linear_logprob.cpu"]
        torch.testing.assert_close(logp[1], reference.linear_logprob(*arguments))
    finally:
        monkeypatch.undo()
        _dispatch.csrc_problem.cache_clear()


def test_extension_is_built_where_it_is_expected():
    if os.environ.get("ALPHASPIN_EXPECT_CSRC") != "1":
        pytest.skip("ALPHASPIN_EXPECT_CSRC is not 1: the C++ operators are optional here")
    assert BUILT, _dispatch.csrc_problem()


def test_kernels_folder_is_no_package():
    """A top-level package `kernels` would hide the one that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
