"""sequence_logprob against its definition in float64."""

import pytest
import torch
import torch._dynamo.testing
from alphaspin_kernels import reference, sequence_logprob
from alphaspin_kernels.sequence_logprob import _segment_sum
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import CSRC, TORCH, TRITON, generator, poisoned


@pytest.fixture(params=[TORCH, CSRC, TRITON])
def implementation(request, force) -> str:
    force(request.param)
    return request.param


def problem(lengths=(5, 0, 13, 1), h=24, v=101, k=None, dtype=torch.float32, seed=0) -> dict:
    random = generator(seed)
    n = sum(lengths)
    shape = (n,) if k is None else (n, k)
    targets = torch.randint(0, v, shape, generator=random)
    targets[torch.rand(shape, generator=random) < 0.2] = -100
    return {
        "hidden": torch.randn(n, h, generator=random).to(dtype),
        "weight": (torch.randn(v, h, generator=random) / h**0.5).to(dtype),
        "targets": targets,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "grad": torch.randn(len(lengths), *shape[1:], generator=random),
    }


def differentiate(function, case: dict, **options):
    hidden = case["hidden"].clone().requires_grad_()
    sums = function(hidden, case["weight"], case["targets"], case["cu_seqlens"], **options)
    (grad,) = torch.autograd.grad(sums, hidden, case["grad"].to(sums.dtype))
    return sums.detach(), grad


def assert_close(case: dict, **options) -> None:
    double = case | {k: case[k].double() for k in ("hidden", "weight")}
    exact, exact_grad = differentiate(reference.sequence_logprob, double, **options)
    ours, grad = differentiate(sequence_logprob, case, **options)
    assert ours.dtype == torch.float32
    assert ours.shape == exact.shape
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=2e-6)
    eps = torch.finfo(case["hidden"].dtype).eps
    torch.testing.assert_close(grad.double(), exact_grad, rtol=eps, atol=0.5 * eps + 1e-6)


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_and_gradients(dtype, k, implementation):
    assert_close(problem(k=k, dtype=dtype))


def test_long_sequence(implementation):
    assert_close(problem(lengths=(1500, 3), h=4, v=7))


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_boundaries_of_either_dtype(integer, implementation):
    case = problem()
    case["cu_seqlens"] = case["cu_seqlens"].to(integer)
    assert_close(case, softcap=2.0, temperature=0.8)


@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=str)
def test_no_rows(lengths, implementation):
    sums, grad = differentiate(sequence_logprob, problem(lengths=lengths))
    assert sums.shape == (len(lengths),)
    assert sums.eq(0).all()
    assert grad.shape == (0, 24)


def test_unwritten_memory_is_not_read_and_bits_repeat(implementation):
    case = problem()
    clean = differentiate(sequence_logprob, case)
    with poisoned():
        again = differentiate(sequence_logprob, case)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


def test_skipped_mass_is_handed_through():
    case = problem()
    mass = torch.full((19,), torch.nan)
    sequence_logprob(
        case["hidden"], case["weight"], case["targets"], case["cu_seqlens"], skipped_mass=mass
    )
    assert mass.eq(0).all()


def test_gradcheck():
    case = problem(lengths=(2, 0, 3), h=4, v=7)
    for function in (sequence_logprob, reference.sequence_logprob):
        hidden = case["hidden"].double().requires_grad_()
        rest = (case["weight"].double(), case["targets"], case["cu_seqlens"])
        assert torch.autograd.gradcheck(lambda h, f=function, r=rest: f(h, *r), (hidden,))


def test_opcheck(implementation):
    values = torch.randn(7, 2, generator=generator(0)).requires_grad_()
    torch.library.opcheck(_segment_sum.registered, (values, torch.tensor([0, 3, 3, 7])))


@pytest.mark.parametrize("implementation", [TORCH], indirect=True)
def test_compiles_once_for_any_number_of_rows(implementation):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sequence_logprob, fullgraph=True, backend=counter)
    for length in (5, 6, 7, 9):
        case = problem(lengths=(length, 4))
        for a, b in zip(
            differentiate(compiled, case), differentiate(sequence_logprob, case), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2  # the second size makes it dynamic


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 3]), r"0 to N = 4, got \[0, 3\]"),
        (torch.tensor([0, 5]), r"0 to N = 4, got \[0, 5\]"),
        (torch.tensor([0, 3, 2, 4]), "rise"),
        (torch.tensor([1, 4]), r"got \[1, 4\]"),
        (torch.tensor([0.0, 4.0]), "float32"),
        (torch.tensor([[0, 4]]), r"\[1, 2\]"),
        (torch.tensor([], dtype=torch.int64), r"\[0\]"),
    ],
)
def test_bad_boundaries(cu_seqlens, message):
    arguments = (torch.zeros(4, 8), torch.zeros(11, 8), torch.zeros(4, dtype=torch.int64))
    for function in (sequence_logprob, reference.sequence_logprob):
        with pytest.raises(ValueError, match=message):
            function(*arguments, cu_seqlens)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    k=st.sampled_from([None, 1, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 1000),
)
def test_any_lengths(lengths, k, dtype, softcap, seed):
    assert_close(problem(tuple(lengths), k=k, dtype=dtype, seed=seed), softcap=softcap)
