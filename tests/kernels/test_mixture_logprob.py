"""mixture_logprob and its log-normaliser against their definition in float64."""

import math
import sys

import pytest
import torch
import torch._dynamo.testing
from alphaspin_kernels import mixture_logprob, reference
from alphaspin_kernels.mixture_logprob import _mixture_logprob, _portable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from implementations import CSRC, TORCH, TRITON, LargestTensor, generator, poisoned

# The package's attribute of this name is the function.
MODULE = sys.modules["alphaspin_kernels.mixture_logprob"]
FLOATS = ("prev", "base", "weight", "bias")


@pytest.fixture(params=[TORCH, CSRC, TRITON])
def implementation(request, force, monkeypatch) -> str:
    # C++ serves the product of the mixed rows; the two products have no version of their own there.
    force(request.param)
    # Small chunks, so that small inputs have several of them and a partial last one.
    monkeypatch.setattr(MODULE, "TILE", 64)
    monkeypatch.setattr(MODULE, "ROWS", 8)
    return request.param


def problem(n=21, h=29, v=307, k=None, dtype=torch.float32, scale=1.0, bias=False, seed=0) -> dict:
    random = generator(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    shape = (n,) if k is None else (n, k)
    targets = torch.randint(0, v, shape, generator=random)
    targets[torch.rand(shape, generator=random) < 0.2] = -100
    base = scale * normal(n, h)
    return {
        "prev": (base + 0.5 * normal(n, h)).to(dtype),
        "base": base.to(dtype),
        "weight": (normal(v, h) / math.sqrt(h)).to(dtype),
        "bias": normal(v).to(dtype) if bias else None,
        "targets": targets,
    }


def run(function, case: dict, alpha: float, log_z: bool, **options):
    buffer = None
    if log_z:
        dtype = torch.promote_types(case["prev"].dtype, torch.float32)
        buffer = torch.full((len(case["prev"]),), torch.nan, dtype=dtype)
    arguments = (case["prev"], case["base"], case["weight"], case["targets"], alpha)
    logp = function(*arguments, bias=case["bias"], log_normaliser=buffer, **options)
    return logp, buffer


def double(case: dict) -> dict:
    return case | {k: case[k] if case[k] is None else case[k].double() for k in FLOATS}


def plain(case: dict, alpha: float, softcap=None, temperature=1.0) -> torch.Tensor:
    """What a user writes: two logits in the dtype of the model, softmaxes in fp32."""

    def log_softmax(hidden):
        z = torch.nn.functional.linear(hidden, case["weight"], case["bias"])
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return torch.log_softmax(z.float() / temperature, -1)

    mixed = alpha * log_softmax(case["prev"]) + (1 - alpha) * log_softmax(case["base"])
    logp = torch.log_softmax(mixed, -1)
    targets = case["targets"].reshape(len(case["prev"]), -1)
    picked = logp.gather(1, targets.clamp(0)).masked_fill(targets == -100, 0.0)
    return picked.reshape(case["targets"].shape)


def assert_no_worse(case: dict, alpha: float, log_z: bool, **options) -> None:
    exact, exact_z = run(reference.mixture_logprob, double(case), alpha, log_z, **options)
    ours, ours_z = run(mixture_logprob, case, alpha, log_z, **options)
    assert ours.shape == case["targets"].shape
    assert ours.dtype == torch.float32
    allowed = (plain(case, alpha, **options).double() - exact).abs()
    size = exact.abs().amax().nan_to_num() if exact.numel() else 0.0
    logits = case["base"].double() @ case["weight"].double().T
    tolerance = 2e-6 + 4e-7 * size
    if case["prev"].dtype != torch.float32:
        # One rounding of the mixed row, for logits of this size; PyTorch rounds each of the logits.
        row = (case["prev"].double().abs() @ case["weight"].double().abs().T).amax(1)
        allowed = allowed + (torch.finfo(case["prev"].dtype).eps * row).view(
            -1, *[1] * (exact.dim() - 1)
        )
    assert (((ours.double() - exact).abs() - allowed) <= tolerance).all()
    if log_z:
        bound = 4e-6 * (1 + logits.abs().amax() / options.get("temperature", 1.0))
        assert ((ours_z.double() - exact_z).abs() <= bound).all()


OPTIONS = [{}, {"softcap": 2.0, "temperature": 0.7}]


@pytest.mark.parametrize("options", OPTIONS, ids=["", "capped"])
@pytest.mark.parametrize("log_z", [False, True], ids=["", "log Z"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [None, 3])
def test_no_worse_than_pytorch(k, dtype, log_z, options, implementation):
    assert_no_worse(problem(k=k, dtype=dtype, bias=True), 0.7, log_z, **options)


@pytest.mark.parametrize("h", [64, 128])
def test_whole_blocks(h, implementation):
    assert_no_worse(problem(n=65, h=h, v=384, dtype=torch.bfloat16), 0.25, log_z=True)


def test_one_row_and_nothing_to_score(implementation):
    case = problem(n=1)
    case["targets"][:] = 3
    assert_no_worse(case, 0.3, log_z=True)
    for n, targets in ((0, []), (2, [-100, -100])):
        case = problem(n=n) | {"targets": torch.tensor(targets, dtype=torch.int64)}
        for function in (mixture_logprob, reference.mixture_logprob):
            for value in run(function, case, 0.5, True):
                assert value.shape == (n,)
                assert value.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_and_peaked_logits(dtype, implementation):
    case = problem(n=12, h=64, scale=2000.0, dtype=dtype)
    assert (case["base"].double() @ case["weight"].double().T).abs().max() > 5e3
    exact, exact_z = run(reference.mixture_logprob, double(case), 0.5, True)
    ours, ours_z = run(mixture_logprob, case, 0.5, True)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=4e-3)
    torch.testing.assert_close(ours_z.double(), exact_z, rtol=1e-6, atol=4e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("log_z", [False, True], ids=["", "log Z"])
def test_extreme_alphas_are_one_policy_even_where_the_other_is_not_finite(
    log_z, bad, implementation
):
    for alpha, name, other in ((1.0, "prev", "base"), (0.0, "base", "prev")):
        case = problem(bias=True)
        case[other][::2] = bad
        expected = reference.linear_logprob(
            case[name], case["weight"], case["targets"], bias=case["bias"]
        )
        logp, buffer = run(mixture_logprob, case, alpha, log_z)
        torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-5)
        assert buffer is None or buffer.abs().max() < 1e-5


@pytest.mark.parametrize("log_z", [False, True], ids=["", "log Z"])
def test_masked_vocabulary(log_z, implementation):
    """Entries masked with -inf, whole first tiles of them, count for nothing."""
    case = problem(n=9, v=307, bias=True)
    case["bias"][:150] = -torch.inf
    case["targets"] = torch.arange(9) + 150
    exact, _ = run(reference.mixture_logprob, double(case), 0.5, False)
    ours, ours_z = run(mixture_logprob, case, 0.5, log_z)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=2e-6)
    if log_z:
        kept = {name: case[name][150:] for name in ("weight", "bias")}
        _, exact_z = run(
            reference.mixture_logprob,
            double(case | kept | {"targets": torch.arange(9)}),
            0.5,
            True,
        )
        torch.testing.assert_close(ours_z.double(), exact_z, rtol=1e-6, atol=4e-6)


def test_a_row_that_is_not_finite_leaves_the_others_alone(implementation):
    case = problem()
    expected = run(mixture_logprob, case, 0.5, True)
    case["base"][4] = torch.nan
    others = torch.arange(21) != 4
    for value, before in zip(run(mixture_logprob, case, 0.5, True), expected, strict=True):
        assert torch.equal(value[others], before[others])


def test_equal_policies_need_no_normaliser(implementation):
    case = problem()
    case["prev"] = case["base"].clone()
    assert run(mixture_logprob, case, 0.4, True)[1].abs().max() < 2e-6


def test_the_markov_chain_of_the_notes(implementation):
    """Normalisers of the rows a, b and the start: the check values of section 4 at alpha = .5."""
    prev = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.7, 0.1, 0.2]])
    base = torch.tensor([[0.3, 0.3, 0.4], [0.4, 0.4, 0.2], [0.1, 0.3, 0.6]])
    log_z = torch.empty(3)
    targets = torch.tensor([2, 2, 2])
    arguments = (prev.log(), base.log(), torch.eye(3), targets, 0.5)
    logp = mixture_logprob(*arguments, log_normaliser=log_z)
    torch.testing.assert_close(log_z.exp(), (prev * base).sqrt().sum(1))
    # p(end at once) of the token-level mixture, from the table.
    assert round(logp[0].exp().item(), 6) == 0.216388


def test_ignored_rows_and_unwritten_memory_are_not_read(implementation):
    case = problem(n=20, h=64, bias=True)
    case["targets"][::3] = -100
    skipped = case["targets"] == -100
    clean = run(mixture_logprob, case, 0.5, True)
    case["prev"][skipped] = torch.nan
    with poisoned():
        dirty = run(mixture_logprob, case, 0.5, True)
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before, after)
        assert after[skipped].eq(0).all()


def test_strides_do_not_matter(implementation):
    case = problem(k=2, bias=True)
    expected = run(mixture_logprob, case, 0.6, True)
    strided = case | {k: case[k].T.contiguous().T for k in ("prev", "weight", "targets")}
    strided["bias"] = case["bias"].repeat_interleave(2)[::2]
    for a, b in zip(run(mixture_logprob, strided, 0.6, True), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


def test_autocast_changes_nothing(implementation):
    case = problem()
    expected = run(mixture_logprob, case, 0.6, True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(mixture_logprob, case, 0.6, True)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_opcheck(implementation):
    case = problem(n=5, h=8, v=11, k=2, bias=True)
    arguments = [case[k] for k in ("prev", "base", "weight", "targets", "bias")]
    torch.library.opcheck(_mixture_logprob.registered, (*arguments, 0.5, 2.0, 0.8, -100))


@pytest.mark.parametrize("implementation", [TORCH], indirect=True)
def test_compiles_once_for_any_number_of_rows(implementation):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def score(prev, base, weight, targets, log_z):
        return mixture_logprob(prev, base, weight, targets, 0.5, log_normaliser=log_z)

    for n in (5, 6, 7, 9):
        case = problem(n=n)
        log_z = torch.empty(n)
        logp = score(case["prev"], case["base"], case["weight"], case["targets"], log_z)
        expected = run(mixture_logprob, case, 0.5, True)
        torch.testing.assert_close((logp, log_z), expected)
    assert counter.frame_count <= 2  # the second size makes it dynamic


@pytest.mark.parametrize("name", FLOATS)
def test_gradients_are_refused_not_dropped(name):
    case = problem(n=3, bias=True)
    case[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires a gradient, .* not differentiable"):
        run(mixture_logprob, case, 0.5, False)
    with torch.no_grad():
        run(mixture_logprob, case, 0.5, False)


def test_reference_gradcheck():
    case = double(problem(n=3, h=4, v=7))
    inputs = (case["prev"].requires_grad_(), case["base"].requires_grad_())

    def function(prev, base):
        return reference.mixture_logprob(
            prev, base, case["weight"], case["targets"], 0.7, softcap=2.0, temperature=0.8
        )

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, "alpha .* 1.5"),
        ({"alpha": math.nan}, "alpha .* nan"),
        ({"hidden_base": torch.zeros(3, 8)}, r"\[4, 8\].*\[3, 8\]"),
        ({"hidden_base": torch.zeros(4, 8, dtype=torch.float64)}, "float32 .* torch.float64"),
        ({"weight": torch.zeros(11, 7)}, "H = 8 .* H = 7"),
        ({"targets": torch.tensor([0, 11, 0, 0])}, r"target 11 .* \[0, 11\)"),
        ({"log_normaliser": torch.zeros(5)}, r"N = 4, got \[5\]"),
        ({"softcap": -1.0}, "softcap .* -1.0"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {
        "hidden_prev": torch.zeros(4, 8),
        "hidden_base": torch.zeros(4, 8),
        "weight": torch.zeros(11, 8),
        "targets": torch.tensor([0, 10, -100, 3]),
        "alpha": 0.5,
        "log_normaliser": torch.zeros(4),
    }
    mixture_logprob(**arguments)
    for function in (mixture_logprob, reference.mixture_logprob):
        with pytest.raises(ValueError, match=message):
            function(**(arguments | changes))


def test_builds_no_logit_matrix():
    case = problem(n=64, h=4, v=256_000, k=1)
    arguments = [case[k] for k in ("prev", "base", "weight", "targets", "bias")]
    with LargestTensor() as largest:
        _portable(*arguments, 0.5, None, 1.0, -100)
    assert 0 < largest.numel < 64 * 256_000 / 50


CASES = {
    "n": st.integers(1, 40),
    "h": st.integers(1, 40),
    "v": st.integers(1, 600),
    "k": st.sampled_from([None, 1, 2]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "alpha": st.sampled_from([0.0, 0.25, 0.5, 0.95, 1.0]),
    "softcap": st.sampled_from([None, 0.5, 30.0]),
    "temperature": st.sampled_from([0.3, 1.0, 2.0]),
    "seed": st.integers(0, 1000),
}


def check(n, h, v, k, dtype, alpha, softcap, temperature, seed):
    case = problem(n=n, h=h, v=v, k=k, dtype=dtype, seed=seed, bias=bool(seed % 2))
    options = {"softcap": softcap, "temperature": temperature}
    assert_no_worse(case, alpha, log_z=bool(seed % 3), **options)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(**CASES)
def test_any_shape(**case):
    check(**case)


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(**CASES)
@pytest.mark.parametrize("implementation", [TRITON], indirect=True)
def test_any_shape_triton(implementation, **case):
    check(**case)
