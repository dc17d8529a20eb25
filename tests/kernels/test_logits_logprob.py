"""logits_logprob against its definition in float64, for every implementation."""

import math
import sys

import pytest
import torch
from alphaspin_kernels import logits_logprob, reference
from alphaspin_kernels.logits_logprob import (
    _logits_logprob,
    _logits_logprob_backward,
    _logits_logprob_backward_inplace,
    _portable,
    _portable_gradient,
    _write_gradient,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import CSRC, TORCH, TRITON, LargestTensor, generator, poisoned, there

# The package's attribute of this name is the function.
MODULE = sys.modules["alphaspin_kernels.logits_logprob"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[TORCH, CSRC, TRITON])
def implementation(request, force, monkeypatch) -> str:
    force(request.param)
    # Small chunks, so that small inputs have several of them and a partial last one.
    monkeypatch.setattr(MODULE, "CHUNK", 5000)
    return request.param


def problem(n=7, v=701, k=None, dtype=torch.float32, scale=3.0, ignored=0.2, seed=0) -> dict:
    """Inputs of one case; targets [n] or [n, k], about a fifth of them ignored."""
    source = generator(seed)
    shape = (n,) if k is None else (n, k)
    targets = torch.randint(0, v, shape, generator=source)
    targets[torch.rand(shape, generator=source) < ignored] = -100
    return {
        "logits": (scale * torch.randn(n, v, generator=source)).to(dtype),
        "targets": targets,
        "grad": torch.randn(shape, generator=source),
    }


def differentiate(function, case: dict, dtype=None, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and the gradient of the logits under a non-uniform upstream gradient."""
    leaf = case["logits"].detach().to(dtype or case["logits"].dtype).requires_grad_()
    logp = function(leaf.clone(), case["targets"], **options)
    (gradient,) = torch.autograd.grad(logp, leaf, case["grad"].to(logp.dtype))
    return logp.detach(), gradient


def plain(logits, targets, *, softcap=None, temperature=1.0, ignore_index=-100):
    """What a user writes: log_softmax in fp32."""
    logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits / temperature, dim=-1)
    flat = targets.reshape(len(targets), -1)
    ignored = flat == ignore_index
    picked = logp.gather(1, flat.masked_fill(ignored, 0)).masked_fill(ignored, 0.0)
    return picked.reshape(targets.shape)


def assert_no_worse(case: dict, inplace_backward=False, **options) -> None:
    """Elementwise, an error of at most plain PyTorch's in the same dtype plus a few roundings."""
    exact = differentiate(reference.logits_logprob, case, torch.float64, **options)
    usual = differentiate(plain, case, **options)
    ours = differentiate(logits_logprob, case, inplace_backward=inplace_backward, **options)
    dtype, fp32 = case["logits"].dtype, torch.finfo(torch.float32).eps
    assert ours[0].dtype == torch.float32
    assert ours[0].shape == case["targets"].shape
    assert ours[1].dtype == dtype
    # z' is rounded to fp32, and so is p then, relatively.
    temperature = options.get("temperature", 1.0)
    logit = case["logits"].abs().amax().double() / temperature if temperature != 1.0 else 0.0
    if "softcap" in options and options["softcap"] is not None:
        logit = options["softcap"] / temperature
    logp_tolerance = 2e-6 + 4 * fp32 * (exact[0].abs().amax() + logit)
    # Gradients are rounded to the dtype of the logits.
    eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    grad_tolerance = eps * exact[1].abs() + eps * smallest
    grad_tolerance += 4 * fp32 * (1 + logit) * case["grad"].abs().amax() / temperature
    tolerances = {"logp": logp_tolerance, "gradient": grad_tolerance}
    for (name, tolerance), value, want, other in zip(
        tolerances.items(), ours, exact, usual, strict=True
    ):
        assert value.isfinite().all(), name
        error, allowed = (value.double() - want).abs(), (other.double() - want).abs()
        worst = (error - allowed - tolerance).max()
        assert worst <= 0, f"{name}: {error.max():.3g} against {allowed.max():.3g} of PyTorch"


CASES = {
    "ragged": {"n": 5, "v": 4099},  # a vocabulary of several tiles, the last one not full
    "whole tiles": {"n": 3, "v": 8192},
    "one row": {"n": 1, "v": 701},
    "one token": {"n": 5, "v": 1},
    "tiny vocabulary": {"n": 13, "v": 2},
    "nothing ignored": {"n": 11, "v": 523, "ignored": 0.0},
    "K targets": {"n": 11, "v": 1031, "k": 3},
    "a target twice": {"n": 11, "v": 3, "k": 5},
}
OPTIONS = [{}, {"softcap": 3.0, "temperature": 0.7}, {"temperature": 2.0, "inplace_backward": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=["", "capped", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_no_worse_than_pytorch(name, dtype, options, implementation):
    assert_no_worse(problem(dtype=dtype, **CASES[name]), **options)


@pytest.mark.parametrize("shift", [0.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peaked_rows(dtype, shift, implementation):
    """p from .9 to .9999 at the target: lp and the gradient are small differences."""
    case = problem(n=8, v=1031, ignored=0.0, scale=1.0)
    logits, targets = case["logits"].double(), case["targets"][:, None]
    probabilities = 1 - torch.logspace(-1, -4, 8, dtype=torch.float64)[:, None]
    reached = torch.log_softmax(logits, 1).gather(1, targets).exp()
    logits.scatter_add_(1, targets, torch.logit(probabilities) - torch.logit(reached))
    case["logits"] = (logits + shift).to(dtype)
    assert_no_worse(case)
    if dtype == torch.float32:
        # The distance to the exact gradient is that of p, not that of the logits.
        _, exact = differentiate(reference.logits_logprob, case, torch.float64)
        _, ours = differentiate(logits_logprob, case)
        assert (ours.double() - exact).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(dtype, implementation):
    """Logits of +-1e4 neither overflow nor lose the normaliser."""
    case = problem(dtype=dtype, scale=3000.0)
    assert case["logits"].abs().max() > 9e3
    assert_no_worse(case)
    assert_no_worse(case, softcap=30.0)


def test_masked_vocabulary(implementation):
    """Entries masked with -inf, a whole first tile of them, count for nothing."""
    case = problem(n=3, v=4600, ignored=0.0)
    case["logits"][:, :4200] = -torch.inf
    case["targets"] = torch.arange(3) + 4201
    exact = differentiate(reference.logits_logprob, case, torch.float64)
    ours = differentiate(logits_logprob, case)
    for value, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_are_not_read(dtype, k, inplace, implementation):
    """NaN in an ignored row, in ignored gradients, and in memory nobody wrote, reaches nothing."""
    case = problem(n=12, k=k, dtype=dtype)
    case["targets"][::4] = -100
    skipped = (case["targets"].reshape(12, -1) == -100).all(1)
    clean = differentiate(logits_logprob, case, inplace_backward=inplace)
    case["logits"][skipped] = torch.nan
    case["grad"][case["targets"] == -100] = torch.nan
    with poisoned():
        logp, gradient = differentiate(logits_logprob, case, inplace_backward=inplace)
    assert (logp[case["targets"] == -100] == 0).all()
    assert (gradient[skipped] == 0).all()
    assert torch.equal(logp, clean[0])
    assert torch.equal(gradient, clean[1])
    _, exact = differentiate(reference.logits_logprob, case | {"grad": case["grad"].nan_to_num()})
    assert exact.isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (0, 2), (7,), (7, 2), (7, 0)], ids=str)
def test_nothing_to_score(shape, implementation):
    targets = torch.full(shape, -1)
    logits = torch.randn(shape[0], 8, requires_grad=True)
    for inplace in (False, True):
        logp = logits_logprob(logits * 1, targets, ignore_index=-1, inplace_backward=inplace)
        assert logp.shape == shape
        assert torch.equal(logp, torch.zeros(shape))
        assert torch.equal(torch.autograd.grad(logp.sum(), logits)[0], torch.zeros(shape[0], 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype, implementation):
    case = problem(n=6, k=2, dtype=dtype)
    expected = differentiate(logits_logprob, case)
    targets = case["targets"].T.contiguous().T
    grad = case["grad"].T.contiguous().T
    for logits in (
        case["logits"].T.contiguous().T,
        case["logits"].repeat_interleave(2, 0)[::2],
        torch.nn.functional.pad(case["logits"], (3, 2), value=torch.nan)[:, 3:-2],
    ):
        assert not logits.is_contiguous()
        logits.requires_grad_()
        logp = logits_logprob(logits, targets)
        assert torch.equal(logp, expected[0])
        assert torch.equal(torch.autograd.grad(logp, logits, grad)[0], expected[1])


@pytest.mark.parametrize("v", [701, 4096, 4099])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_or_written_outside(dtype, v, implementation):
    """Inside matrices of NaN, at an address off every alignment: the bits that it has among zeros.

    Not those of aligned logits, which a GPU sums in another order.
    """
    case = problem(n=3, v=v, k=2, dtype=dtype, ignored=0.0)
    inside, arguments = (slice(1, -1), slice(3, -2)), (None, 1.0, -100)

    def among(fill):
        out, guarded = (torch.full((5, v + 5), fill, dtype=dtype) for _ in range(2))
        guarded[inside] = case["logits"]
        logits = guarded[inside]
        logp, normaliser = _logits_logprob(logits, case["targets"], *arguments, False)
        rest = (case["grad"], logits, case["targets"], normaliser, *arguments)
        for target in (out, guarded):
            _write_gradient(target[inside], *rest)
        return logp, out, guarded

    usual = differentiate(logits_logprob, case)
    logp, *written = among(torch.nan)
    expected = among(0.0)
    assert torch.equal(logp, expected[0])
    torch.testing.assert_close(logp, usual[0])
    for target, clean in zip(written, expected[1:], strict=True):
        assert torch.equal(target[inside], clean[inside])
        torch.testing.assert_close(clean[inside], usual[1])
        assert target.isnan().sum() == 5 * (v + 5) - 3 * v


def test_same_bits_again(implementation):
    case = problem(n=9, v=1031, k=2, dtype=torch.bfloat16)
    first, second = (differentiate(logits_logprob, case, softcap=9.0) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_autocast_changes_nothing(implementation):
    case = problem()
    expected = differentiate(logits_logprob, case)
    with torch.autocast(case["logits"].device.type, torch.bfloat16):
        ours = differentiate(logits_logprob, case)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


def linear(dtype=torch.float32, n=6, v=523) -> tuple[torch.nn.Linear, torch.Tensor]:
    source = generator(1)
    head = torch.nn.Linear(8, v, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(v, 8, generator=source))
    return head, torch.randn(n, 8, generator=source).to(dtype).requires_grad_()


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_gradient_is_the_logits_memory(dtype, view, implementation):
    """... and what flows on to the layer below is the same number."""
    case = problem(n=6, v=523, dtype=dtype)
    head, hidden = linear(dtype, n=6 + view)
    results = []
    for inplace in (False, True):
        logits = head(hidden)[int(view) :]
        gradients: list[torch.Tensor] = []
        logits.register_hook(gradients.append)
        logp = logits_logprob(logits, case["targets"], inplace_backward=inplace)
        flowing = torch.autograd.grad(logp, (hidden, *head.parameters()), case["grad"])
        assert (gradients[0].data_ptr() == logits.data_ptr()) == inplace
        assert not gradients[0].requires_grad
        assert torch.equal(gradients[0], logits) == inplace
        results.append((logp, *flowing))
    for usual, ours in zip(*results, strict=True):
        assert torch.equal(usual, ours)


@pytest.mark.parametrize("inplace", [False, True])
def test_changed_logits_are_an_error(inplace, implementation):
    case, (head, hidden) = problem(n=6, v=523), linear()
    logits = head(hidden)
    logp = logits_logprob(logits, case["targets"], inplace_backward=inplace)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def test_a_second_inplace_backward_is_an_error(implementation):
    case, (head, hidden) = problem(n=6, v=523), linear()
    for inplace in (False, True):
        logp = logits_logprob(head(hidden), case["targets"], inplace_backward=inplace)
        logp.sum().backward(retain_graph=True)
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                logp.sum().backward()
        else:
            logp.sum().backward()


def test_other_uses_of_the_logits_get_the_right_gradient_or_an_error(implementation):
    case, (head, hidden) = problem(n=6, v=523), linear()

    def gradient(inplace: bool, extra) -> torch.Tensor:
        logits = head(hidden)
        terms = extra(
            logits, lambda z: logits_logprob(z, case["targets"], inplace_backward=inplace)
        )
        return torch.autograd.grad(terms.sum(), hidden)[0]

    def linear_use(logits, logprob):
        return (2 * logits).sum() + logprob(logits).sum() + (3 * logits).sum()

    def used_later(logits, logprob):  # its backward runs first
        return logprob(logits).sum() + logits.square().sum()

    def used_before(logits, logprob):  # its backward runs when the logits are gone
        return logits.square().sum() + logprob(logits).sum()

    for extra in (linear_use, used_later):
        torch.testing.assert_close(gradient(True, extra), gradient(False, extra))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(True, used_before)


def test_inplace_logits_must_be_dense_and_no_leaf():
    targets = torch.tensor([1, 2])
    leaf = torch.zeros(2, 3, requires_grad=True)
    strided = torch.zeros(3, 2, requires_grad=True).T * 1
    overlapping = (torch.zeros(1, 3, requires_grad=True) * 1).expand(2, 3)
    for logits, message in (
        (leaf, "is_leaf = True"),
        (strided, r"\[2, 3\] and strides \(1, 2\)"),
        (overlapping, r"\[2, 3\] and strides \(0, 1\)"),
    ):
        for function in (logits_logprob, reference.logits_logprob):
            with pytest.raises(ValueError, match=message):
                function(logits, targets, inplace_backward=True)
            function(logits, targets)
            function(logits.detach(), targets, inplace_backward=True)


@pytest.mark.parametrize("function", [logits_logprob, reference.logits_logprob])
@pytest.mark.parametrize("k", [None, 2])
def test_gradcheck(k, function):
    case = problem(n=5, v=7, k=k)
    logits = case["logits"].double().requires_grad_()
    options = {"softcap": 2.0, "temperature": 0.8}
    assert torch.autograd.gradcheck(lambda z: function(z, case["targets"], **options), logits)
    if function is logits_logprob:
        ours = differentiate(function, case, torch.float64, inplace_backward=True, **options)
        exact = differentiate(reference.logits_logprob, case, torch.float64, **options)
        torch.testing.assert_close(ours, exact)


def test_a_second_derivative_is_an_error_not_a_number():
    case = problem(n=3, v=7, ignored=0.0)
    logits = case["logits"].double().requires_grad_()
    logp = logits_logprob(logits, case["targets"])
    (grad,) = torch.autograd.grad(logp.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("k", [1, 2])
def test_opcheck(k, implementation):
    case = problem(n=5, v=11, k=k)
    logits, options = case["logits"], (2.0, 0.8, -100)
    _, normaliser = _logits_logprob(logits, case["targets"], *options, False)
    forward = (logits.clone().requires_grad_(), case["targets"], *options, False)
    torch.library.opcheck(_logits_logprob.registered, forward)
    backward = (case["grad"], logits, case["targets"], normaliser, *options)
    torch.library.opcheck(_logits_logprob_backward.registered, backward)
    torch.library.opcheck(_logits_logprob_backward_inplace.registered, backward)


@pytest.mark.parametrize("inplace", [False, True])
def test_compile_without_graph_break_or_recompilation(inplace, implementation):
    head, _ = linear(v=11)

    def step(hidden, targets):
        options = {"softcap": 4.0, "inplace_backward": inplace}
        return logits_logprob(head(hidden), targets, **options).sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for n in (5, 7, 9):
        _, hidden = linear(n=n, v=11)
        targets = problem(n=n, v=11)["targets"]
        values = [function(hidden, targets) for function in (step, compiled)]
        wanted = (hidden, *head.parameters())
        gradients = [torch.autograd.grad(value, wanted) for value in values]
        torch.testing.assert_close(values[0], values[1])
        torch.testing.assert_close(gradients[0], gradients[1])
    # The second number of rows makes it dynamic.
    assert counter.frame_count == 2


@pytest.mark.parametrize(("name", "examples"), [("torch", 120), ("csrc", 150), ("triton", 10)])
def test_any_shape(name, examples, force, request):
    for mark in {"csrc": CSRC, "triton": TRITON}.get(name, TORCH).marks:
        if mark.args[0]:
            pytest.skip(mark.kwargs["reason"])
    force(name)

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(
        n=st.integers(1, 12),
        v=st.integers(1, 2200),
        k=st.sampled_from([None, 1, 2, 4]),
        dtype=st.sampled_from(DTYPES),
        softcap=st.sampled_from([None, 0.5, 30.0]),
        temperature=st.sampled_from([0.3, 1.0, 2.0]),
        scale=st.sampled_from([0.1, 3.0, 20.0]),
        inplace=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def check(n, v, k, dtype, softcap, temperature, scale, inplace, seed):
        case = problem(n=n, v=v, k=k, dtype=dtype, scale=scale, seed=seed)
        assert_no_worse(case, softcap=softcap, temperature=temperature, inplace_backward=inplace)

    check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(1, 4, 8)}, r"\[N, V\], got \[1, 4, 8\]"),
        ({"logits": torch.zeros(4, 8, dtype=torch.int64)}, "torch.float32.* got torch.int64"),
        ({"logits": torch.zeros(4, 8, device="meta")}, "meta .* cpu"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"N = 4, got \[5\]"),
        ({"targets": torch.zeros(4, 1, 1, dtype=torch.int64)}, r"N = 4, got \[4, 1, 1\]"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, "torch.int64, got torch.int32"),
        ({"targets": torch.tensor([0, 8, 0, 0])}, r"target 8 .* \[0, 8\)"),
        ({"targets": torch.tensor([0, 1 << 60, 0, 0])}, r"target 1152921504606846976 .* \[0, 8\)"),
        ({"targets": torch.tensor([0, 1, -1, 0])}, r"target -1 .* ignore_index = -100"),
        ({"softcap": 0.0}, "softcap .* 0.0"),
        ({"softcap": math.inf}, "softcap .* inf"),
        ({"temperature": -1.0}, "temperature .* -1.0"),
        ({"temperature": math.nan}, "temperature .* nan"),
    ],
)
@pytest.mark.parametrize("name", [TORCH, CSRC, TRITON])
def test_bad_arguments(changes, message, name, force):
    force(name)
    device = torch.get_default_device()
    changes = there(changes)
    arguments = {"logits": torch.zeros(4, 8), "targets": torch.tensor([0, 7, -100, 3])}
    logits_logprob(**arguments)
    for function in (logits_logprob, reference.logits_logprob):
        with pytest.raises(ValueError, match=message.replace("cpu", str(device))):
            function(**(arguments | changes))


def test_portable_version_builds_no_fp32_copy():
    case = problem(n=128, v=32_000, k=1, dtype=torch.bfloat16)
    options = (30.0, 1.0, -100)
    out = torch.empty_like(case["logits"])
    with LargestTensor() as largest:
        _, normaliser = _portable(case["logits"], case["targets"], *options)
        rest = (case["grad"], case["logits"], case["targets"], normaliser, *options)
        _portable_gradient(out, *rest)
    assert 0 < largest.numel <= MODULE.CHUNK < 128 * 32_000 / 3
