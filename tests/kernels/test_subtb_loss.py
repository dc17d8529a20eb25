"""subtb_loss in O(L) against all pairs in float64, for every implementation."""

import math
from fractions import Fraction

import pytest
import torch
from alphaspin_kernels import reference, subtb_loss
from alphaspin_kernels.subtb_loss import _subtb_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import CSRC, TORCH, TRITON, generator, poisoned, there

NAMES = ("log_pf", "log_pterm", "log_reward")
LAMBDAS = [0.0, 0.5, 0.9, 1.0, 1.3, 100.0]


@pytest.fixture(params=[TORCH, CSRC, TRITON])
def implementation(request, force) -> str:
    force(request.param)
    return request.param


def problem(lengths, longest=None, dtype=torch.float32, offset=0.0, seed=0) -> dict:
    """Inputs of one case, with NaN, infinities and huge numbers in the padding."""
    source = generator(seed)
    batch, tokens = len(lengths), max([*lengths, 0]) if longest is None else longest
    case = {"lengths": torch.tensor(lengths, dtype=torch.int64)}
    for name, width in zip(NAMES, (tokens, tokens + 1, tokens + 1), strict=True):
        values = torch.randn(batch, width, generator=source) - 1.0
        values += offset * (name == "log_reward")
        last = case["lengths"][:, None] + (name != "log_pf")
        padding = torch.arange(width) >= last
        garbage = torch.tensor([torch.nan, -torch.inf, torch.inf, 3e38])
        garbage = garbage[torch.randint(0, 4, (batch, width), generator=source)]
        case[name] = torch.where(padding, garbage, values).to(dtype)
    return case


def differentiate(function, case: dict, lam: float, dtype=None, scale=1.0) -> tuple:
    """Loss and gradients of the loss times ``scale``."""
    leaves = [case[name].detach().to(dtype or case[name].dtype).requires_grad_() for name in NAMES]
    loss = function(*leaves, case["lengths"], lam)
    return loss.detach(), *torch.autograd.grad(loss * scale, leaves)


def assert_equal_to_all_pairs(case: dict, lam: float, scale: float = -1.7) -> None:
    """To the rounding of the results: the sums are in float64 whatever the inputs."""
    exact = differentiate(reference.subtb_loss, case, lam, torch.float64, scale)
    ours = differentiate(subtb_loss, case, lam, scale=scale)
    dtype = case["log_pf"].dtype
    double = dtype == torch.float64
    assert ours[0].dtype == (torch.float64 if double else torch.float32)
    torch.testing.assert_close(
        ours[0].double(), exact[0], rtol=1e-10 if double else 1.3e-7, atol=1e-13
    )
    for value, want in zip(ours[1:], exact[1:], strict=True):
        assert value.dtype == dtype
        rtol = 1e-10 if double else 2.5 * torch.finfo(dtype).eps
        atol = (1e-10 if double else 1e-9) * want.abs().amax().item() if want.numel() else 0.0
        atol += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(value.double(), want, rtol=rtol, atol=atol)


CASES = {
    "ragged": [13, 0, 5, 1, 12, 13, 2],
    "one row": [17],
    "one token": [1],
    "more rows than a block": [3, 2, 4] * 12,
    "padded beyond the longest": [4, 2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("name", CASES)
def test_equal_to_all_pairs(name, lam, dtype, implementation):
    longest = 9 if name == "padded beyond the longest" else None
    assert_equal_to_all_pairs(problem(CASES[name], longest, dtype), lam)


@pytest.mark.parametrize("lam", [0.9, 1.0, 1.1])
def test_long_sequences(lam, implementation):
    """... stay equal to 1e-10, and a weight of 1.1^9000 does not overflow."""
    case = problem([200, 131], dtype=torch.float64)
    assert_equal_to_all_pairs(case, lam)
    if implementation != "triton":  # thousands of steps are slow in the interpreter
        case = problem([9000, 40])
        loss, *gradients = differentiate(subtb_loss, case, lam)
        for value in (loss, *gradients):
            assert value.isfinite().all()
        assert loss > 0


def fractions(case: dict, lam: Fraction) -> tuple[Fraction, list[list[Fraction]]]:
    """The definition in exact arithmetic: loss, and d loss / d r of each row."""
    total = weights = Fraction(0)
    slopes = []
    for pf, pterm, reward, length in zip(
        *(case[name].tolist() for name in (*NAMES, "lengths")), strict=True
    ):
        r = [
            Fraction(reward[i]) - Fraction(pterm[i]) - sum(map(Fraction, pf[:i]))
            for i in range(length + 1)
        ]
        slopes.append([Fraction(0)] * len(r))
        for j in range(length + 1):
            for i in range(j):
                weight = lam ** (j - i - 1)
                weights += weight
                total += weight * (r[i] - r[j]) ** 2
                slopes[-1][i] += 2 * weight * (r[i] - r[j])
                slopes[-1][j] -= 2 * weight * (r[i] - r[j])
    return total / weights, [[slope / weights for slope in row] for row in slopes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lam", [0.875, 1.0])
def test_a_large_constant_in_r_costs_no_digits(lam, dtype, implementation):
    """r about -1e4 with differences of about 1e-3, against exact arithmetic."""
    case = problem([15, 9], dtype=torch.float64)
    for name in NAMES:
        # Multiples of the distance between fp32 numbers at 1e4.
        case[name] = (case[name] + 1.0).round() * 2.0**-10
    case["log_reward"] -= 1e4
    case["log_pterm"] += 5e3
    case = {name: case[name].to(dtype) if name in NAMES else case[name] for name in case}
    loss, slopes = fractions(case, Fraction(lam))
    assert 0 < loss < 1e-4
    ours = differentiate(subtb_loss, case, lam)
    eps = torch.finfo(dtype).eps
    assert abs(Fraction(ours[0].item()) - loss) < 8 * Fraction(eps) * loss
    largest = max(abs(slope) for row in slopes for slope in row)
    for row, exact in zip(ours[3].tolist(), slopes, strict=True):
        for value, slope in zip(row, exact, strict=False):
            assert abs(Fraction(value) - slope) < 8 * Fraction(eps) * largest


def test_limits_of_lam(implementation):
    """0: neighbours. Very large: the longest pair, which is trajectory balance."""
    case = problem([4, 2], dtype=torch.float64)
    pf, pterm, reward = (case[name][0] for name in NAMES)
    r = reward - pterm - torch.nn.functional.pad(pf.cumsum(0), (1, 0))
    balance, *gradients = differentiate(subtb_loss, case, 1e300)
    torch.testing.assert_close(balance, (r[0] - r[4]).square())
    torch.testing.assert_close(gradients[2][0, 0], 2 * (r[0] - r[4]))
    pf, pterm, reward = (case[name][1, :3] for name in NAMES)
    other = reward - pterm - torch.nn.functional.pad(pf[:2].cumsum(0), (1, 0))
    neighbours = torch.cat((r.diff(), other.diff())).square().mean()
    torch.testing.assert_close(
        subtb_loss(*(case[n] for n in NAMES), case["lengths"], 0), neighbours
    )


def test_padding_and_unwritten_memory_reach_nothing(implementation):
    case = problem(CASES["ragged"], longest=20)
    clean = differentiate(subtb_loss, case, 0.9)
    for name in NAMES:
        end = case["lengths"][:, None] + (name != "log_pf")
        padding = torch.arange(case[name].shape[1]) >= end
        case[name] = case[name].masked_fill(padding, torch.nan)
        assert (clean[1 + NAMES.index(name)][padding] == 0).all()
    with poisoned():
        again = differentiate(subtb_loss, case, 0.9)
    for first, second in zip(clean, again, strict=True):
        assert torch.equal(first, second)  # also: the same bits on a second run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("longest", [0, 5])
def test_no_pairs(longest, lengths, dtype, implementation):
    case = problem(lengths, longest, dtype)
    for function in (subtb_loss, reference.subtb_loss):
        for value in differentiate(function, case, 0.9):
            assert torch.equal(value, torch.zeros_like(value))


def test_strides_do_not_matter(implementation):
    case = problem(CASES["ragged"])
    expected = differentiate(subtb_loss, case, 0.9)
    case = {name: value.T.contiguous().T for name, value in case.items() if name in NAMES} | {
        "lengths": case["lengths"].repeat_interleave(2)[::2]
    }
    for value, want in zip(differentiate(subtb_loss, case, 0.9), expected, strict=True):
        assert torch.equal(value, want)


def test_nothing_is_read_outside(implementation):
    """Inputs inside larger tensors of NaN, at an odd address."""
    case = problem([6, 6, 6])
    expected = differentiate(subtb_loss, case, 0.9)
    for name in NAMES:
        guarded = torch.full((5, case[name].shape[1] + 4), torch.nan)
        guarded[1:-1, 1:-3] = case[name]
        case[name] = guarded[1:-1, 1:-3]
    for value, want in zip(differentiate(subtb_loss, case, 0.9), expected, strict=True):
        assert torch.equal(value, want)


@pytest.mark.parametrize("wanted", NAMES)
def test_each_gradient_alone(wanted, implementation):
    case = problem(CASES["ragged"])
    expected = differentiate(subtb_loss, case, 0.9)[1 + NAMES.index(wanted)]
    leaf = case[wanted].requires_grad_()
    loss = subtb_loss(*(case[name] for name in NAMES), case["lengths"], 0.9)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)
    with torch.no_grad():
        assert torch.equal(subtb_loss(*(case[n] for n in NAMES), case["lengths"], 0.9), loss)


@pytest.mark.parametrize("function", [subtb_loss, reference.subtb_loss])
@pytest.mark.parametrize("lam", [0.0, 0.8, 1.2])
def test_gradcheck(lam, function):
    case = problem([3, 0, 4], dtype=torch.float64)
    inputs = [case[name].nan_to_num(0, 0, 0).requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(lambda *x: function(*x, case["lengths"], lam), inputs)


def test_a_second_derivative_is_an_error_not_a_number():
    case = problem([3, 4], dtype=torch.float64)
    leaf = case["log_pf"].requires_grad_()
    loss = subtb_loss(*(case[name] for name in NAMES), case["lengths"], 0.9)
    (grad,) = torch.autograd.grad(loss.square(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("with_gradient", [False, True])
def test_opcheck(with_gradient, implementation):
    case = problem([3, 0, 4])
    inputs = [case[name].nan_to_num(0, 0, 0).requires_grad_(with_gradient) for name in NAMES]
    torch.library.opcheck(_subtb_loss.registered, (*inputs, case["lengths"], 0.9, with_gradient))


def test_autocast_changes_nothing(implementation):
    case = problem(CASES["ragged"])
    expected = differentiate(subtb_loss, case, 0.9)
    with torch.autocast(case["log_pf"].device.type, torch.bfloat16):
        ours = differentiate(subtb_loss, case, 0.9)
    for value, want in zip(ours, expected, strict=True):
        assert torch.equal(value, want)


def test_compile_without_graph_break_or_recompilation(implementation):
    def step(log_pf, log_pterm, log_reward, lengths):
        return 3 * subtb_loss(log_pf * 2, log_pterm, log_reward, lengths, 0.9)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for lengths in ([3, 5], [3, 5, 2], [4, 4, 1, 5]):
        case = problem(lengths, longest=5)
        leaves = [case[name].requires_grad_() for name in NAMES]
        values = [function(*leaves, case["lengths"]) for function in (step, compiled)]
        gradients = [torch.autograd.grad(value, leaves) for value in values]
        torch.testing.assert_close(values[0], values[1])
        torch.testing.assert_close(gradients[0], gradients[1])
    # The second number of rows makes it dynamic.
    assert counter.frame_count == 2


@pytest.mark.parametrize(("name", "examples"), [("torch", 120), ("csrc", 150), ("triton", 10)])
def test_any_shape(name, examples, force):
    for mark in {"csrc": CSRC, "triton": TRITON}.get(name, TORCH).marks:
        if mark.args[0]:
            pytest.skip(mark.kwargs["reason"])
    force(name)

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(
        lengths=st.lists(st.integers(0, 24), min_size=1, max_size=40),
        padding=st.integers(0, 3),
        lam=st.sampled_from([0.0, 0.3, 1.0, 1.5, 1e6]) | st.floats(0.0, 3.0),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
        offset=st.sampled_from([0.0, -300.0]),
        seed=st.integers(0, 1000),
    )
    def check(lengths, padding, lam, dtype, offset, seed):
        case = problem(lengths, max(lengths) + padding, dtype, offset, seed)
        assert_equal_to_all_pairs(case, lam)

    check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_pf": torch.zeros(2)}, r"\[B, L\], got \[2\]"),
        ({"log_pf": torch.zeros(2, 3, dtype=torch.int64)}, "got torch.int64"),
        ({"log_pterm": torch.zeros(2, 3)}, r"log_pterm .* \[2, 4\] .* got \[2, 3\]"),
        ({"log_reward": torch.zeros(3, 4)}, r"log_reward .* \[2, 4\] .* got \[3, 4\]"),
        ({"log_reward": torch.zeros(2, 4).double()}, "torch.float32 but .* torch.float64"),
        ({"log_reward": torch.zeros(2, 4, device="meta")}, "on cpu but log_reward is on meta"),
        ({"lengths": torch.tensor([1])}, r"B = 2, got \[1\]"),
        ({"lengths": torch.tensor([1, 2], dtype=torch.int32)}, "got .* torch.int32"),
        ({"lengths": torch.tensor([1, 4])}, r"length 4 is outside \[0, L = 3\]"),
        ({"lengths": torch.tensor([-1, 3])}, r"length -1 is outside \[0, L = 3\]"),
        ({"lam": -0.5}, "lam .* -0.5"),
        ({"lam": math.inf}, "lam .* inf"),
        ({"lam": math.nan}, "lam .* nan"),
    ],
)
@pytest.mark.parametrize("name", [TORCH, CSRC, TRITON])
def test_bad_arguments(changes, message, name, force):
    force(name)
    device = torch.get_default_device()
    changes = there(changes)
    arguments = {
        "log_pf": torch.zeros(2, 3),
        "log_pterm": torch.zeros(2, 4),
        "log_reward": torch.zeros(2, 4),
        "lengths": torch.tensor([3, 1]),
        "lam": 0.9,
    }
    subtb_loss(**arguments)
    for function in (subtb_loss, reference.subtb_loss):
        with pytest.raises(ValueError, match=message.replace("cpu", str(device))):
            function(**(arguments | changes))
