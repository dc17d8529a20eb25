"""segmented_lora against its definition in float64, portable and in Triton."""

import importlib
import math
import sys
from contextlib import contextmanager

import pytest
import torch
from alphaspin_kernels import reference, segmented_lora
from alphaspin_kernels.checks import dropout_mask
from alphaspin_kernels.numerics import segment_pairs
from alphaspin_kernels.segmented_lora import (
    _segmented_lora,
    _segmented_lora_backward,
    multiplies_natively,
    rounds,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from implementations import TORCH, TRITON, generator, poisoned
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

MODULE = sys.modules["alphaspin_kernels.segmented_lora"]
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
LEAVES = ("x", "a", "b")


def use(implementation: str, force, monkeypatch: pytest.MonkeyPatch) -> None:
    # "native": as on processors that multiply 16-bit numbers; this one may not.
    force("torch" if implementation == "native" else implementation)
    if implementation == "native":
        monkeypatch.setattr(MODULE, "multiplies_natively", lambda x: True)
    if implementation == "torch":
        monkeypatch.setattr(MODULE, "multiplies_natively", lambda x: x.dtype in (FP32, FP64))
    monkeypatch.setattr(MODULE, "TILE", 16)  # so that small inputs have several, the last partial


@pytest.fixture(params=[TORCH, TRITON])
def implementation(request, force, monkeypatch) -> str:
    use(request.param, force, monkeypatch)
    return request.param


@pytest.fixture(params=[TORCH, "native", TRITON])
def three(request, force, monkeypatch) -> str:
    use(request.param, force, monkeypatch)
    return request.param


def problem(
    segments=(7, 5, 6),
    ranks=(4, 3, None),
    inputs=37,
    outputs=41,
    dtype=FP32,
    adapter_dtype=None,
    bias=True,
    seed=0,
) -> dict:
    """Inputs of one case; a rank of None for a segment without an adapter."""
    random = generator(seed)

    def normal(*shape, to=dtype):
        return torch.randn(*shape, generator=random).to(to)

    low = adapter_dtype or dtype
    return {
        "x": normal(sum(segments), inputs),
        "weight": normal(outputs, inputs) / math.sqrt(inputs),
        "adapters": [
            None if r is None else (normal(r, inputs, to=low), normal(outputs, r, to=low))
            for r in ranks
        ],
        "segments": list(segments),
        "scaling": [0.5 / (s + 1) for s in range(len(segments))],
        "bias": normal(outputs) if bias else None,
        "grad": normal(sum(segments), outputs),
    }


def differentiate(function, case: dict, **options) -> dict[str, torch.Tensor]:
    """y, and the gradients of x and of the policy's A and B."""
    a, b = case["adapters"][0] or (None, None)
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in zip(LEAVES, (case["x"], a, b), strict=True)
        if value is not None
    }
    policy = (leaves["a"], leaves["b"]) if a is not None else None
    y = function(
        leaves["x"],
        case["weight"],
        [policy, *case["adapters"][1:]],
        case["segments"],
        case["scaling"],
        bias=case["bias"],
        **options,
    )
    y.backward(case["grad"].to(y.dtype))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def plain(x, weight, adapters, segments, scaling, *, bias=None, dropout=0.0, seed=0):
    """What a user writes: products in the dtypes of their factors, each rounded."""
    outputs = []
    for s, x_S in enumerate(x.split(segments)):
        x_S = x_S if s == 0 else x_S.detach()
        y_S = linear(x_S, weight, bias)
        if adapters[s] is not None:
            a, b = adapters[s]
            if s == 0 and dropout:
                mask_S = dropout_mask(len(x_S), range(x.shape[1]), dropout, seed, x.device)
                x_S = x_S * mask_S / (1 - dropout)
            y_S = y_S + (linear(linear(x_S.to(a.dtype), a), b) * scaling[s]).to(y_S.dtype)
        outputs.append(y_S)
    return torch.cat(outputs)


def convert(case: dict, dtype: torch.dtype, function=torch.clone) -> dict:
    def to(value):
        if isinstance(value, torch.Tensor):
            return function(value.to(dtype))
        return tuple(map(to, value)) if isinstance(value, tuple) else value

    return {
        name: [to(v) for v in value] if name == "adapters" else to(value)
        for name, value in case.items()
    }


def assert_no_worse(case: dict, **options) -> None:
    """Elementwise, an error of at most plain PyTorch's in the same dtype plus a few roundings.

    Adapters that are rounded to the dtype of x are compared with such adapters of PyTorch's.
    """
    exact = differentiate(reference.segmented_lora, convert(case, FP64), **options)
    terms = differentiate(reference.segmented_lora, convert(case, FP64, torch.abs), **options)
    near = rounds(case["x"])
    usual = differentiate(plain, convert(case, BF16) if near else case, **options)
    ours = differentiate(segmented_lora, case, **options)
    policy = case["adapters"][0]
    dtypes = dict.fromkeys(("y", "x"), case["x"].dtype)
    if policy is not None:
        dtypes |= dict.fromkeys(("a", "b"), policy[0].dtype)
    assert {name: value.dtype for name, value in ours.items()} == dtypes
    assert ours["x"][case["segments"][0] :].eq(0).all()
    for name, value in ours.items():
        assert value.isfinite().all(), name
        if not value.numel():
            continue
        error = (value.double() - exact[name]).abs()
        allowed = (usual[name].double() - exact[name]).abs()
        dtype = BF16 if near else value.dtype
        eps = torch.finfo(dtype).eps
        # Sums in fp32 of terms that may be larger than their sum, and one rounding of the result;
        # in 16 bits factors are rounded too, like PyTorch's, but by luck in another direction.
        tolerance = eps * exact[name].abs() + 4 * torch.finfo(FP32).eps * terms[name]
        if dtype != FP32:
            tolerance += 0.5 * eps * exact[name].abs().amax()
        worst = (error - allowed - tolerance).max()
        assert worst <= 0, f"{name}: {error.max():.3g} against {allowed.max():.3g} of PyTorch"


CASES = {
    "ragged": {},
    "one row each": {"segments": (1, 1, 1), "ranks": (1, 1, None)},
    "several blocks": {"segments": (131, 67, 70), "inputs": 67, "outputs": 149},
    "even": {"segments": (33, 64, 5), "inputs": 64, "outputs": 48, "ranks": (16, 16, None)},
    "policy alone": {"segments": (19,), "ranks": (4,)},
    "base alone": {"segments": (19,), "ranks": (None,)},
    "base first": {"segments": (5, 6), "ranks": (None, 4)},
    "no policy rows": {"segments": (0, 6, 5), "ranks": (4, 3, None)},
    "nothing between": {"segments": (6, 0, 5), "ranks": (4, 3, None)},
    "large ranks": {"ranks": (37, 64, 1)},
    "nine segments": {"segments": (3, 2, 1, 4, 2, 2, 3, 1, 5), "ranks": (2,) * 9},
    "no bias": {"bias": False},
}
DTYPES = [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16)]


@pytest.mark.parametrize(
    ("dtypes", "dropout"), list(zip(DTYPES, [0.0, 0.0, 0.3, 0.3], strict=True)), ids=str
)
@pytest.mark.parametrize("name", CASES)
def test_no_worse_than_pytorch(name, dtypes, dropout, three):
    dtype, adapter_dtype = dtypes
    case = problem(dtype=dtype, adapter_dtype=adapter_dtype, **CASES[name])
    assert_no_worse(case, dropout=dropout, seed=5)


@pytest.mark.parametrize("implementation", [TRITON], indirect=True)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("segments", "ranks"), [((70,), (16,)), ((40, 30), (5, 16))])
def test_rounded_adapters(segments, ranks, dropout, implementation):
    """In bf16 A and B are rounded once, by the caller or here; their gradients are in fp32."""
    case = problem(segments, ranks, 64, 48, BF16, FP32)
    here = differentiate(segmented_lora, case, dropout=dropout, seed=2)
    rounded = [(a.bfloat16(), b.bfloat16()) for a, b in case["adapters"]]
    given = differentiate(segmented_lora, case, dropout=dropout, seed=2, rounded=rounded)
    wide = convert(case | {"adapters": rounded}, FP64)
    exact = differentiate(reference.segmented_lora, wide, dropout=dropout, seed=2)
    for name, value in here.items():
        assert torch.equal(value, given[name])
        assert value.dtype == (FP32 if name in ("a", "b") else BF16)
        # One rounding of what has r columns, and one of the result where that has 16 bits; the
        # interpreter cuts digits off, where a GPU rounds.
        assert (value.double() - exact[name]).norm() < 2**-7 * exact[name].norm(), name
    for wrong in (None, (rounded[0][0].float(), rounded[0][1]), (rounded[0][0][:1], rounded[0][1])):
        with pytest.raises(ValueError, match=r"rounded\[0\] must be adapter 0 in torch.bfloat16"):
            differentiate(segmented_lora, case, rounded=[wrong, *rounded[1:]])


def test_adapters_of_several_dtypes(three):
    case = problem(dtype=BF16)
    a, b = case["adapters"][1]
    case["adapters"][1] = (a.float(), b.float())
    assert_no_worse(case)


def test_no_rows(implementation):
    case = problem(segments=(0, 0), ranks=(4, None))
    results = differentiate(segmented_lora, case, dropout=0.1)
    assert results["y"].shape == (0, 41) and results["x"].shape == (0, 37)
    assert results["a"].eq(0).all() and results["b"].eq(0).all()


def test_one_scaling_for_all(implementation):
    case = problem()
    case["scaling"] = 0.25
    one = differentiate(segmented_lora, case)
    case["scaling"] = [0.25] * 3
    assert all(torch.equal(one[k], v) for k, v in differentiate(segmented_lora, case).items())


@pytest.mark.parametrize("wanted", ["x", "a", "b", "ab"])
def test_only_what_is_asked_for_gets_a_gradient(wanted, implementation):
    case = problem()
    full = differentiate(segmented_lora, case, dropout=0.2)
    leaves = dict(zip(LEAVES, (case["x"], *case["adapters"][0]), strict=True))
    for name in wanted:
        leaves[name].requires_grad_()
    adapters = [(leaves["a"], leaves["b"]), *case["adapters"][1:]]
    rest = (case["weight"], adapters, case["segments"], case["scaling"])
    y = segmented_lora(leaves["x"], *rest, bias=case["bias"], dropout=0.2)
    y.backward(case["grad"])
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(wanted)
    assert all(torch.equal(leaves[name].grad, full[name]) for name in wanted)


def test_the_result_needs_no_gradient_where_nothing_does(implementation):
    case = problem()
    arguments = [case[name] for name in ("x", "weight", "adapters", "segments", "scaling")]
    assert not segmented_lora(*arguments).requires_grad


@contextmanager
def saved_storages():
    """Storages kept for the backward pass, by address."""
    found: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_policy_rows_are_kept(dropout, implementation):
    """Beside parameters, which are there anyway: exactly the policy's rows of x."""
    case = problem(segments=(3, 40, 50), ranks=(2, 2, None), bias=False)
    a, b = (matrix.requires_grad_() for matrix in case["adapters"][0])
    x = case["x"].requires_grad_()
    frozen = case["weight"], [(a, b), *case["adapters"][1:]], case["segments"], case["scaling"]
    with saved_storages() as found:
        y = segmented_lora(x, *frozen, dropout=dropout)
    parameters = {t.untyped_storage().data_ptr() for t in (case["weight"], a, b)}
    kept = sum(size for address, size in found.items() if address not in parameters)
    assert kept == 3 * 37 * 4
    # With the adapter frozen, nothing of x is kept.
    with saved_storages() as found:
        segmented_lora(x, frozen[0], [(a.detach(), b.detach()), *frozen[1][1:]], *frozen[2:])
    assert sum(size for address, size in found.items() if address not in parameters) == 0
    y.sum().backward()
    assert x.grad[:3].ne(0).any() and x.grad[3:].eq(0).all()


def test_policy_alone_is_kept_without_a_copy(implementation):
    case = problem(segments=(9,), ranks=(2,))
    a, b = (matrix.requires_grad_() for matrix in case["adapters"][0])
    with saved_storages() as found:
        segmented_lora(case["x"], case["weight"], [(a, b)], [9], 1.0)
    tensors = (case["x"], case["weight"], a, b)
    assert set(found) == {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("segments", "ranks"), [((9,), (2,)), ((7, 5), (2, None))])
def test_a_weight_that_can_be_made_again_is_not_kept(segments, ranks, dropout, implementation):
    case = problem(segments, ranks)
    calls = []

    def again():
        calls.append(1)
        return case["weight"]

    expected = differentiate(segmented_lora, case, dropout=dropout, seed=3)
    with saved_storages() as kept:
        found = differentiate(segmented_lora, case, dropout=dropout, seed=3, again=again)
    assert len(calls) == 1 and kept and case["weight"].data_ptr() not in kept
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    segmented_lora(*(case[name] for name in list(case)[:5]), again=again)
    assert len(calls) == 1, "without a gradient there is no backward pass"


def python_mask(row: int, column: int, dropout: float, seed: int) -> bool:
    """The definition in integers of any size."""

    def mix(h):
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    low, high = seed % 2**64 % 2**32, seed % 2**64 // 2**32
    key = mix(high ^ mix(low))
    bits = mix(mix(mix(row) ^ key) ^ mix(column))
    signed = bits - 2**32 if bits >= 2**31 else bits
    return signed >= int(dropout * 2**32) - 2**31


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789123456789])
def test_mask_is_the_one_of_its_definition(seed):
    mask = dropout_mask(70, range(5, 70), 0.3, seed, torch.device("cpu"))
    assert mask.tolist() == [
        [python_mask(row, column, 0.3, seed) for column in range(5, 70)] for row in range(70)
    ]


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.999])
def test_mask_is_random(dropout):
    """Mean, variance of row and column means, and neighbours: all within 4 sigma."""
    rows, columns = 1000, 1500
    masks = [
        dropout_mask(rows, range(columns), dropout, seed, torch.device("cpu")).double()
        for seed in (0, 1, 1 << 32)
    ]
    mean, variance = 1 - dropout, dropout * (1 - dropout)
    mask = masks[0]
    assert abs(mask.mean() - mean) < 4 * math.sqrt(variance / mask.numel())
    for axis in (0, 1):
        means = mask.mean(axis)
        spread = (means - mean).square().mean() / (variance / mask.shape[axis])
        kurtosis = (1 - 6 * variance) / variance / mask.shape[axis]
        assert abs(spread - 1) < 4 * math.sqrt((2 + kurtosis) / len(means))
    noise = [(m - mean) / math.sqrt(variance) for m in masks]
    pairs = [(noise[0], other) for other in noise[1:]]  # seeds
    for down, right in ((0, 1), (1, 0), (1, 1), (0, 2), (0, 64), (64, 0), (256, 256)):
        pairs.append((noise[0][down:, right:], noise[0][: rows - down, : columns - right]))
    square = noise[0][:rows, :rows]
    pairs.append((square.triu(1), square.T.triu(1)))
    for one, other in pairs:
        correlation = (one * other).sum() / math.sqrt((one != 0).sum())
        assert abs(correlation) < 4


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_forward_and_backward_use_this_mask(dropout, implementation):
    """With x = 1, W = 0 and B A = 1: y counts the mask's entries, dx is the mask."""
    rows, columns, seed = 70, 75, 9
    one = torch.ones
    x, a, b = one(rows + 8, columns), one(1, columns), one(2, 1)
    leaf = x.clone().requires_grad_()
    weight = torch.zeros(2, columns)
    y = segmented_lora(
        leaf, weight, [(a, b), (a, b)], [rows, 8], 1 - dropout, dropout=dropout, seed=seed
    )
    mask = dropout_mask(rows, range(columns), dropout, seed, x.device)
    assert torch.equal(y[:rows].round(), mask.sum(1, keepdim=True).expand(-1, 2).float())
    assert torch.allclose(y[rows:], torch.tensor(columns * (1 - dropout)))  # no noise here
    y[:, 0].sum().backward()
    assert torch.equal(leaf.grad[:rows].round(), mask.float())
    rest = ([rows, 8], [-1, -1], [1.0, 1.0], dropout, seed, True)
    found = _segmented_lora(x, weight, None, a, b, [], [], [], *rest)
    assert torch.equal(found[1], mask.float())


def test_strides_and_surroundings_do_not_matter(implementation):
    """Transposed inputs, and inputs inside of NaN."""
    case = problem(dtype=BF16)
    expected = differentiate(segmented_lora, case, dropout=0.3)

    def transposed(matrix):
        return matrix.T.contiguous().T

    def inside(matrix):
        shape = [size + 6 for size in matrix.shape]
        around = torch.full(shape, torch.nan, dtype=matrix.dtype)
        within = around[tuple(slice(3, 3 + size) for size in matrix.shape)]
        return within.copy_(matrix)

    for arrange in (transposed, inside):
        case_of = {name: arrange(case[name]) for name in ("x", "weight", "grad")}
        case_of["adapters"] = [pair and tuple(map(arrange, pair)) for pair in case["adapters"]]
        leaves = [case_of["x"], *case_of["adapters"][0]]
        for leaf in leaves:
            leaf.requires_grad_()
        y = segmented_lora(
            leaves[0],
            case_of["weight"],
            [tuple(leaves[1:]), *case_of["adapters"][1:]],
            case["segments"],
            case["scaling"],
            bias=inside(case["bias"]),
            dropout=0.3,
        )
        gradients = torch.autograd.grad(y, leaves, case_of["grad"])
        for name, value in zip(("y", *LEAVES), (y, *gradients), strict=True):
            torch.testing.assert_close(value, expected[name], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_unwritten_memory_is_not_read(dtype, three):
    case = problem(dtype=dtype, segments=(7, 0, 5, 6), ranks=(40, 2, None, 3))
    clean = differentiate(segmented_lora, case, dropout=0.3)
    with poisoned():
        again = differentiate(segmented_lora, case, dropout=0.3)
    for name, value in clean.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("implementation", [TRITON], indirect=True)
def test_nothing_is_written_outside(implementation):
    """Guard rows of NaN around every buffer that a kernel writes."""
    kernels = importlib.import_module("alphaspin_kernels._triton.segmented_lora")
    case = problem(segments=(70, 9), ranks=(3, None))
    a, b = case["adapters"][0]
    pairs = segment_pairs(a, b, [], [], [70, 9], [-1, -1])

    def guarded(rows, columns):
        return torch.full((rows + 2, columns), torch.nan)

    low, kept, y, dx = guarded(79, 3), guarded(70, 37), guarded(79, 41), guarded(70, 37)
    kernels._low(case["x"][:70], a, low[1:71], kept[1:-1], 0.5, 0.3, 1)
    kernels._linear(case["x"], case["weight"], case["bias"], low[1:-1], pairs, y[1:-1])
    kernels._input_gradient(
        dx[1:-1], case["grad"][:70], case["weight"], low[1:71].clone(), a, 0.3, 1
    )
    for buffer, written in ((low, 70), (kept, 70), (y, 79), (dx, 70)):
        assert buffer[1 : 1 + written].isfinite().all()
        assert buffer[0].isnan().all() and buffer[1 + written :].isnan().all()


def test_autocast_changes_nothing(implementation):
    case = problem()
    expected = differentiate(segmented_lora, case, dropout=0.2)
    with torch.autocast(torch.get_default_device().type, BF16):
        ours = differentiate(segmented_lora, case, dropout=0.2)
    for name, value in expected.items():
        assert torch.equal(value, ours[name]), name


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("function", [segmented_lora, reference.segmented_lora])
def test_gradcheck(function, dropout):
    """In the policy's rows: the others' derivative is not 0, their gradient is, by contract."""
    case = problem((3, 2, 2), (2, 2, None), inputs=4, outputs=5, dtype=FP64)
    x, rest = case["x"][:3].clone(), case["x"][3:]

    def policy(x, a, b):
        adapters = [(a, b), *case["adapters"][1:]]
        return function(
            torch.cat([x, rest]),
            case["weight"],
            adapters,
            case["segments"],
            case["scaling"],
            bias=case["bias"],
            dropout=dropout,
        )

    leaves = [leaf.requires_grad_() for leaf in (x, *case["adapters"][0])]
    assert torch.autograd.gradcheck(policy, leaves)


def test_a_second_derivative_is_an_error_not_a_number():
    case = problem(dtype=FP64)
    x = case["x"].requires_grad_()
    rest = [case[name] for name in ("weight", "adapters", "segments", "scaling")]
    (gradient,) = torch.autograd.grad(segmented_lora(x, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_opcheck(implementation):
    case = problem()
    a, b = (matrix.requires_grad_() for matrix in case["adapters"][0])
    others = [[matrix] for matrix in case["adapters"][1]]
    x = case["x"].requires_grad_()
    common = (case["weight"], case["bias"])
    options = (case["segments"], [-1, 0, -1], case["scaling"], 0.3, 1, True)
    torch.library.opcheck(_segmented_lora.registered, (x, *common, a, b, [], *others, *options))
    no_adapter = (case["segments"], [-1, -1, -1], case["scaling"], 0.0, 1, False)
    nothing = (None, None, [], [], [])
    torch.library.opcheck(_segmented_lora.registered, (x, *common, *nothing, *no_adapter))
    backward = (case["grad"], case["x"][:7].detach().clone(), case["weight"])
    for needs in ([True] * 3, [False, True, False]):
        arguments = (*backward, a.detach(), b.detach(), 7, 0.5, 0.3, 1, False, False, needs)
        torch.library.opcheck(_segmented_lora_backward.registered, arguments)


class Seen(TorchDispatchMode):
    """The operators that go by."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_two_ways_to_one_operator(implementation):
    """Plain tensors go to it directly; whoever has to see it does, and gets the same bits."""
    case = problem()
    direct = differentiate(segmented_lora, case, dropout=0.2)
    with Seen() as seen:
        registered = differentiate(segmented_lora, case, dropout=0.2)
    expected = {"alphaspin.segmented_lora.default", "alphaspin.segmented_lora_backward.default"}
    assert expected <= seen.names
    assert all(torch.equal(registered[name], value) for name, value in direct.items())
    x = case["x"].requires_grad_()
    rest = [case[name] for name in ("weight", "adapters", "segments", "scaling")]
    assert type(segmented_lora(x, *rest).grad_fn).__name__ == "DirectBackward"
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, case["weight"])]
        y = segmented_lora(*fake, [None], [18], 1.0)
    assert type(y) is FakeTensor and y.shape == (18, 41)


def test_compiles_once_for_all_row_counts(implementation):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(x, weight, a, b, other, segments, seed):
        adapters = [(a, b), other, None]
        return segmented_lora(x * 2, weight, adapters, segments, 0.5, dropout=0.2, seed=seed)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for number, segments in enumerate([(7, 5, 6), (9, 3, 4), (12, 20, 2), (3, 4, 30), (8, 8, 8)]):
        case = problem(segments)
        a, b = case["adapters"][0]
        results = []
        for function in (step, compiled):
            leaves = [leaf.clone().requires_grad_() for leaf in (case["x"], a, b)]
            y = function(
                leaves[0],
                case["weight"],
                *leaves[1:],
                case["adapters"][1],
                case["segments"],
                40 + number,
            )
            results.append((y.detach(), *torch.autograd.grad(y, leaves, case["grad"])))
        torch.testing.assert_close(results[0], results[1])
    # Once for the first row counts, once when torch.compile sees that they vary.
    assert counter.frame_count == 2


def test_sixteen_bits_on_this_processor():
    """Whichever way it takes, the portable version runs; CUDA and 32 bits are always native."""
    assert multiplies_natively(torch.empty(0, dtype=FP32))
    assert_no_worse(problem(dtype=BF16))


shapes = st.lists(
    st.tuples(st.integers(0, 20), st.one_of(st.none(), st.integers(1, 40))), min_size=1, max_size=10
)


def any_case(
    rows, inputs, outputs, dtypes, bias, dropout, seed
) -> tuple[dict, dict[str, float | int]]:
    segments, ranks = zip(*rows, strict=True)
    case = problem(segments, ranks, inputs, outputs, *dtypes, bias=bias, seed=seed)
    return case, {"dropout": dropout, "seed": seed}


CASE = st.builds(
    any_case,
    shapes,
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.9]),
    st.integers(0, 1000),
)
CHECKS = {"deadline": None, "derandomize": True}
CHECKS["suppress_health_check"] = [HealthCheck.function_scoped_fixture]


@pytest.mark.parametrize("name", ["torch", "native"])
@settings(max_examples=100, **CHECKS)
@given(CASE)
def test_any_shape(name, force, monkeypatch, case):
    use(name, force, monkeypatch)
    assert_no_worse(case[0], **case[1])


@pytest.mark.parametrize("implementation", [TRITON], indirect=True)
@settings(max_examples=10, **CHECKS)
@given(CASE)
def test_any_shape_in_triton(implementation, case):
    assert_no_worse(case[0], **case[1])


PAIR = (torch.zeros(2, 8), torch.zeros(6, 2))
FROZEN = torch.zeros(6, 8, requires_grad=True)
BAD = [
    ({"x": torch.zeros(2, 3, 8)}, r"x must be \[N, I\] .* \[2, 3, 8\] and \[6, 8\]"),
    ({"x": torch.zeros(6, 7)}, r"\[6, 7\] and \[6, 8\]"),
    ({"x": torch.zeros(6, 8, dtype=torch.int64)}, "torch.int64"),
    ({"x": torch.zeros(6, 8, device="meta")}, "meta .* cpu"),
    ({"weight": torch.zeros(6, 8, dtype=BF16)}, "x is torch.float32 but weight is torch.bfloat16"),
    ({"weight": FROZEN}, "weight requires grad but is frozen"),
    ({"bias": torch.zeros(5)}, r"bias must be \[O\] with O = 6, got \[5\]"),
    ({"bias": torch.zeros(6, dtype=FP64)}, "torch.float32 but bias is torch.float64"),
    ({"bias": torch.zeros(6, requires_grad=True)}, "bias requires grad but is frozen"),
    ({"adapters": [PAIR, PAIR]}, "2 adapters for 3 segments"),
    ({"adapters": [], "segments": []}, "0 adapters for 0 segments"),
    ({"segments": [3, 2, 2]}, r"\[3, 2, 2\] .* add up to 6"),
    ({"segments": [-1, 5, 2]}, r"\[-1, 5, 2\] .* add up to 6"),
    ({"adapters": [(PAIR[0], PAIR[1].T), None, None]}, r"\[2, 8\] and \[2, 6\]"),
    ({"adapters": [None, (PAIR[0][:, 1:], PAIR[1]), None]}, r"adapter 1 .* \[2, 7\]"),
    ({"adapters": [(PAIR[0][:0], PAIR[1][:, :0]), None, None]}, r"adapter 0 .* \[0, 8\]"),
    (
        {"adapters": [(PAIR[0].half(), PAIR[1].half()), None, None]},
        "torch.float32 .* torch.float16",
    ),
    (
        {"adapters": [(PAIR[0].double(), PAIR[1]), None, None]},
        "got torch.float64 and torch.float32",
    ),
    ({"adapters": [PAIR, (FROZEN[:2], PAIR[1]), None]}, "A of adapter 1 requires grad"),
    ({"scaling": [1.0, 2.0]}, "2 scalings for 3 segments"),
    ({"scaling": math.nan}, "finite, got nan"),
    ({"dropout": 1.0}, r"\[0, 1\), got 1.0"),
    ({"dropout": -0.1}, r"\[0, 1\), got -0.1"),
    ({"seed": 2**63}, "64 bits, got 9223372036854775808"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_arguments(changes, message):
    arguments = {
        "x": torch.zeros(6, 8),
        "weight": torch.zeros(6, 8),
        "adapters": [PAIR, PAIR, None],
        "segments": [1, 2, 3],
        "scaling": 1.0,
    }
    for function in (segmented_lora, reference.segmented_lora):
        function(**arguments)
        with pytest.raises(ValueError, match=message):
            function(**(arguments | changes))
        if "requires" in message:  # without gradients there are none to refuse
            with torch.no_grad():
                function(**(arguments | changes))
