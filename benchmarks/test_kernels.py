"""The kernels beside what a user would take instead, on the same inputs in one run.

`pytest benchmarks/test_kernels.py --benchmark` measures (about six minutes on two old cores) and
writes tables, numbers and plots; without the flag every case runs once, small, and writes nothing.
A case whose results are wrong stops before anything is timed. A new operator is a function in
CASES that returns a Case.
"""

import functools
import importlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import alphaspin_kernels
import measure
import pytest
import torch
from alphaspin_kernels import reference
from alphaspin_kernels.segmented_lora import multiplies_natively
from measure import Case, Goal, Row, Variant
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS_CHECKED = 64  # rows compared with float64, spread over all of them


def random(device: str) -> tuple[Callable[..., Tensor], torch.Generator]:
    """A source of normal numbers, made in place: nothing is left over in memory."""
    generator = torch.Generator(device).manual_seed(0)
    return partial(torch.randn, generator=generator, device=device), generator


def head_problem(device: str, dtype: torch.dtype, n: int, h: int, v: int) -> dict[str, Tensor]:
    """Hidden rows, head and targets with probabilities from e^-20 to nearly 1."""
    normal, generator = random(device)
    weight = normal(v, h, dtype=dtype).mul_(h**-0.5)
    targets = torch.randint(v, (n,), generator=generator, device=device)
    sure = 25 * torch.rand(n, 1, generator=generator, device=device)
    hidden = (3 * normal(n, h) + sure * weight[targets].float()).to(dtype)
    return {"hidden": hidden, "weight": weight, "targets": targets, "grad": normal(n)}


def with_gradient(function: Callable[..., Tensor], x: Tensor, *rest: Any, grad: Tensor) -> Any:
    """Values, and the gradient of x alone: everything else is frozen."""
    leaf = x.detach().requires_grad_()
    values = function(leaf, *rest)
    (d_x,) = torch.autograd.grad(values, leaf, grad.to(values.dtype))
    return values.detach(), d_x


@torch.no_grad()
def without_gradient(function: Callable[..., Tensor], *arguments: Any) -> Any:
    return function(*arguments), None


def pick(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return pick(linear(hidden, weight), targets)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """An eighth of the rows at a time, logits recomputed in the backward pass."""
    rows = math.ceil(len(hidden) / 8)
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(plain, x, weight, y, use_reentrant=False) for x, y in parts])


def liger() -> Callable[..., Tensor]:
    function = importlib.import_module(
        "liger_kernel.transformers.functional"
    ).liger_fused_linear_cross_entropy
    return lambda x, weight, y: -function(x, weight, y, reduction="none")


def cut_cross_entropy() -> Callable[..., Tensor]:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda x, weight, y: -function(x, weight, y, reduction="none")


def selective_log_softmax() -> Callable[..., Tensor]:
    return importlib.import_module("trl.trainer.utils").selective_log_softmax


def imported(peers: dict[str, Callable[[], Any]], device: str, cuda: set[str]) -> Any:
    """The peers that import, and why the others do not."""
    found, absent = {}, {}
    for name, load in peers.items():
        if name in cuda and device != "cuda":
            absent[name] = "needs a GPU"
            continue
        try:
            found[name] = load()
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {error}"
    return found, absent


def linear_case(device: str, small: bool, dtype: torch.dtype, size: tuple[int, int, int]) -> Case:
    n, h, v = (16, 32, 500) if small else size
    problem = head_problem(device, dtype, n, h, v)
    grad, x = problem.pop("grad"), tuple(problem.values())
    hidden, weight, targets = x
    name = f"kernel-linear_logprob-{str(dtype).removeprefix('torch.')}"
    product = 2.0 * n * v * h
    normal, _ = random(device)
    # Where 16-bit products are emulated, ATen's p @ weight, on which plain backward passes rest,
    # takes some ten minutes on one thread.
    backward = multiplies_natively(hidden)

    def both(label: str, function: Callable[..., Tensor], products: int = 2) -> None:
        flops = products * product
        variants[f"{label}: forward"] = Variant(
            lambda: without_gradient(function, *x), flops=product, compiles="compile" in label
        )
        if not backward:
            return
        variants[f"{label}: forward + backward"] = Variant(
            lambda: with_gradient(function, *x, grad=grad),
            flops=flops,
            compiles="compile" in label,
        )

    variants = {"hidden @ weight.T": Variant(lambda: discard(hidden @ weight.T), flops=product)}
    if backward:
        probabilities = normal(1 if small else n, v, dtype=dtype)
        variants["p @ weight"] = Variant(lambda: discard(probabilities @ weight), flops=product)
    both("F.linear, log_softmax, gather", plain)
    if device == "cuda":
        # On the CPU these take minutes, and say nothing new.
        both("the same, torch.compile", torch.compile(plain))
        both("the same, chunks of rows", chunked, 3)
    # In bf16, as they are used: each compiles and tunes itself anew for another dtype.
    peers = {"liger-kernel": liger, "cut-cross-entropy": cut_cross_entropy}
    peers = peers if dtype == torch.bfloat16 else {}
    found, absent = imported(peers, device, set(peers))
    for peer, function in found.items():
        both(peer, function, 3)
    if not backward:
        absent["p @ weight and plain backward passes"] = "emulated in 16 bits: minutes each"
    ours = alphaspin_kernels.linear_logprob
    variants["alphaspin: forward"] = Variant(
        lambda: without_gradient(ours, *x), "linear_logprob forward", product
    )
    variants["alphaspin: forward + backward"] = Variant(
        lambda: with_gradient(ours, *x, grad=grad), "linear_logprob forward + backward", 2 * product
    )
    variants["alphaspin: forward + backward, skip_below=1e-5"] = Variant(
        # Its gradient is not exact by design: the error column says by how much.
        lambda: with_gradient(partial(ours, skip_below=1e-5), *x, grad=grad),
    )

    @functools.cache
    def defined(dtype: torch.dtype) -> Any:
        part = rows(n)
        selected = (hidden[part].to(dtype), weight.to(dtype), targets[part])
        return with_gradient(reference.linear_logprob, *selected, grad=grad[part])

    def tolerance() -> tuple[float, float]:
        exact, summed = defined(torch.float64)[0], defined(torch.float32)[0]
        bound = float((summed - exact).abs().max()) + 1e-5
        # Tensor cores cut off digits when they add.
        return bound + 1e-4 * (device == "cuda"), 1e-5 if dtype == torch.float32 else 1e-2

    def expected() -> Any:
        return lambda y: y[rows(n)], *defined(torch.float64)

    def goals(rows_: dict[str, Row]) -> list[Goal]:
        bare = rows_["hidden @ weight.T"].median
        second = rows_["p @ weight"].median if backward else bare
        forward, both_ = rows_["alphaspin: forward"], rows_["alphaspin: forward + backward"]
        plainly = rows_["F.linear, log_softmax, gather: forward"].median
        found: list[Goal] = []
        if device == "cuda":
            if "H100" in torch.cuda.get_device_name():
                found += [
                    Goal("forward", 1e3 * forward.median, 6.1, " ms"),
                    Goal("forward + backward", 1e3 * both_.median, 12.6, " ms"),
                ]
        else:
            bound, _ = tolerance()
            memory = [math.nan if r.memory is None else r.memory / 2**20 for r in (forward, both_)]
            found += [
                Goal("forward / hidden @ weight.T", forward.median / bare, 1.10, " ×"),
                Goal("plain forward / forward", plainly / forward.median, 1.6, " ×", True),
                Goal(
                    "forward + backward / two products", both_.median / (bare + second), 1.15, " ×"
                ),
                Goal("extra memory, forward", memory[0], 64, " MiB"),
                Goal("extra memory, forward + backward", memory[1], 64, " MiB"),
                Goal("max error (fp32 accumulation + 1e-5)", forward.error or 0, bound, " nats"),
            ]
        return found

    shape = {"tokens": n, "hidden": h, "vocabulary": v}
    return Case(name, device, dtype, shape, variants, expected, tolerance, goals, absent)


def discard(_: Tensor) -> None:
    """A bare product has nothing to compare."""


def rows(n: int) -> slice:
    return slice(None, None, max(1, n // ROWS_CHECKED))


def linear_16(device: str, small: bool) -> Case:
    size = (4096, 4096, 128_256) if device == "cuda" else (512, 2048, 256_000)
    return linear_case(device, small, torch.bfloat16, size)


def linear_32(device: str, small: bool) -> Case:
    size = (1024, 4096, 128_256) if device == "cuda" else (512, 2048, 32_000)
    return linear_case(device, small, torch.float32, size)


def mixture(device: str, small: bool) -> Case:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = (4096, 4096, 128_256) if device == "cuda" else (512, 2048, 32_000)
    n, h, v = (16, 32, 500) if small else size
    problem = head_problem(device, dtype, n, h, v)
    base, weight, targets = problem["hidden"], problem["weight"], problem["targets"]
    normal, _ = random(device)
    before = (base + normal(n, h, dtype=dtype)).to(dtype)
    alpha = 0.9

    def two_passes(function: Callable[..., Tensor]) -> Any:
        return function(before, weight, targets), function(base, weight, targets)

    def mixed(x: Tensor, y: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        logits = alpha * linear(x, head) + (1 - alpha) * linear(y, head)
        return pick(logits, labels)

    ours = getattr(alphaspin_kernels, "mixture_logprob", None)
    product = 2.0 * n * v * h
    variants = {
        "hidden @ weight.T": Variant(lambda: discard(base @ weight.T), flops=product),
        "two F.linear, mixed, log_softmax, gather": Variant(
            lambda: without_gradient(mixed, before, base, weight, targets), flops=2 * product
        ),
        "two linear_logprob (another mixture: not normalised)": Variant(
            lambda: without_gradient(lambda: two_passes(alphaspin_kernels.linear_logprob)) and None,
            flops=2 * product,
        ),
    }
    if ours is not None:
        variants["alphaspin"] = Variant(
            lambda: without_gradient(ours, before, base, weight, targets, alpha),
            "mixture_logprob",
            product,
        )

    def expected() -> Any:
        wide = [x[rows(n)].double() for x in (before, base)]
        logits = (alpha * wide[0] + (1 - alpha) * wide[1]) @ weight.double().T
        exact = torch.log_softmax(logits, -1).gather(1, targets[rows(n), None])[:, 0]
        return lambda y: y[rows(n)], exact, None

    shape = {"tokens": n, "hidden": h, "vocabulary": v}
    # Mixing the rows rounds them once more.
    tolerance = (5e-5 if dtype == torch.float32 else 0.1, 0.0)
    name = "kernel-mixture_logprob"
    return Case(name, device, dtype, shape, variants, expected, lambda: tolerance)


def logits_case(device: str, small: bool) -> Case:
    n, v = (16, 500) if small else (4096 if device == "cuda" else 512, 128_256)
    normal, generator = random(device)
    logits = normal(n, v, dtype=torch.bfloat16).mul_(3)
    targets = torch.randint(v, (n,), generator=generator, device=device)
    logits[range(n), targets] += torch.linspace(0, 25, n, device=device).bfloat16()
    grad = normal(n)
    found, absent = imported({"TRL selective_log_softmax": selective_log_softmax}, device, set())
    ours = alphaspin_kernels.logits_logprob
    functions = {"log_softmax, gather": pick, "the same, torch.compile": torch.compile(pick)}
    functions |= found | {"alphaspin": ours}
    variants: dict[str, Variant] = {}
    for label, function in functions.items():
        name = "logits_logprob" if function is ours else None
        variants[f"{label}: forward"] = Variant(
            lambda f=function: without_gradient(f, logits, targets),
            name and f"{name} forward",
            moved=2.0 * n * v,
            compiles="compile" in label,
        )
        variants[f"{label}: forward + backward"] = Variant(
            lambda f=function: with_gradient(f, logits, targets, grad=grad),
            name and f"{name} forward + backward",
            moved=6.0 * n * v,  # read twice, written once
            compiles="compile" in label,
        )

    def expected() -> Any:
        part = rows(n)
        exact = with_gradient(
            reference.logits_logprob, logits[part].double(), targets[part], grad=grad[part]
        )
        return lambda y: y[part], *exact

    return Case(
        "kernel-logits_logprob",
        device,
        torch.bfloat16,
        {"tokens": n, "vocabulary": v},
        variants,
        expected,
        lambda: (2e-5, 1e-2),
        absent=absent,
    )


def lora_case(device: str, small: bool) -> Case:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    segment, width, rank = (8, 32, 4) if small else (4096, 4096, 16)
    if device == "cpu" and not small:
        segment, width = 512, 2048
    normal, _ = random(device)
    x, weight, grad = (normal(3 * segment, width, dtype=dtype) for _ in range(3))
    weight = normal(width, width, dtype=dtype).mul_(width**-0.5)
    # In fp32 beside a base of any dtype, as PEFT keeps them and training runs; rounded once a step.
    adapters = [
        (
            normal(rank, width).mul_(width**-0.5).requires_grad_(trained),
            normal(width, rank).requires_grad_(trained),
        )
        for trained in (True, False)
    ]
    segments, scaling = [segment] * 3, 2.0
    near = [(a.detach().to(dtype), b.detach().to(dtype)) for a, b in adapters]

    def separate(x: Tensor) -> Tensor:
        parts = x.split(segments)
        return torch.cat(
            [
                linear(p, weight) + scaling * (p @ a.to(dtype).T) @ b.to(dtype).T
                for p, (a, b) in zip(parts, adapters)  # noqa: B905
            ]
            + [linear(parts[2], weight)]
        )

    def ours(x: Tensor) -> Tensor:
        return alphaspin_kernels.segmented_lora(
            x, weight, [*adapters, None], segments, scaling, rounded=[*near, None]
        )

    def step(function: Callable[[Tensor], Tensor]) -> Any:
        """Forward for all, and the gradients of the policy's rows and adapter."""
        leaf = x.detach().requires_grad_()
        y = function(leaf)
        trained = (leaf, *adapters[0])
        gradients = torch.autograd.grad(y[:segment], trained, grad[:segment])
        return y.detach(), gradients[0]

    product = 2.0 * 3 * segment * width**2
    variants = {
        "F.linear": Variant(lambda: discard(without_gradient(linear, x, weight)[0]), flops=product)
    }
    for label, function in {"three linears with LoRA": separate, "alphaspin": ours}.items():
        name = "segmented_lora" if function is ours else None
        variants[f"{label}: forward"] = Variant(
            lambda f=function: without_gradient(f, x), name and f"{name} forward", product
        )
        variants[f"{label}: forward + backward"] = Variant(
            lambda f=function: step(f), name and f"{name} forward + backward", 4 / 3 * product
        )

    def expected() -> Any:
        part = rows(3 * segment)
        wide = x.double().requires_grad_()
        frozen = [(a.detach().double(), b.detach().double()) for a, b in adapters]
        y = reference.segmented_lora(wide, weight.double(), [*frozen, None], segments, scaling)
        (d_x,) = torch.autograd.grad(y[:segment], wide, grad[:segment].double())
        return lambda y: y[part], y.detach()[part], d_x[part]

    def goals(measured: dict[str, Row]) -> list[Goal]:
        ratio = measured["alphaspin: forward"].median / measured["F.linear"].median
        return [Goal("three segments, forward / one plain linear", ratio, 1.1, " ×")]

    # Outputs of some tens, rounded to the dtype: 2^-9 of that in bf16.
    tolerance = (1e-3, 1e-4) if dtype == torch.float32 else (0.5, 1e-2)
    shape = {"tokens": 3 * segment, "wide_in": width, "wide_out": width, "rank": rank}
    name = "kernel-segmented_lora"
    return Case(name, device, dtype, shape, variants, expected, lambda: tolerance, goals)


def subtb_case(device: str, small: bool) -> Case:
    batch, tokens = (2, 9) if small else (64 if device == "cuda" else 8, 512)
    normal, _ = random(device)
    log_pf, log_pterm, log_reward = (
        normal(batch, length) - 2 for length in (tokens, tokens + 1, tokens + 1)
    )
    lengths = torch.full((batch,), tokens, device=device)
    x = (log_pf, log_pterm, log_reward, lengths, 0.9)
    one = torch.ones((), device=device)
    functions = {
        "all pairs, PyTorch": reference.subtb_loss,
        "alphaspin": alphaspin_kernels.subtb_loss,
    }
    variants: dict[str, Variant] = {}
    for label, function in functions.items():
        name = "subtb_loss" if label == "alphaspin" else None
        variants[f"{label}: forward"] = Variant(
            lambda f=function: without_gradient(f, *x), name and f"{name} forward"
        )
        variants[f"{label}: forward + backward"] = Variant(
            lambda f=function: with_gradient(f, *x, grad=one), name and f"{name} forward + backward"
        )

    def expected() -> Any:
        wide = [tensor.double() for tensor in x[:3]]
        return lambda y: y, *with_gradient(reference.subtb_loss, *wide, *x[3:], grad=one)

    shape = {"sequences": batch, "tokens": tokens}
    # The loss is some hundred nats squared in fp32.
    tolerance = (1e-2, 1e-4)
    name = "kernel-subtb_loss"
    return Case(name, device, torch.float32, shape, variants, expected, lambda: tolerance)


CASES: dict[str, Callable[[str, bool], Case]] = {
    "linear_logprob-bfloat16": linear_16,
    "linear_logprob-float32": linear_32,
    "logits_logprob": logits_case,
    "segmented_lora": lora_case,
    "subtb_loss": subtb_case,
}
if hasattr(alphaspin_kernels, "mixture_logprob"):
    CASES["mixture_logprob"] = mixture


@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str, measuring: bool, record: Callable[..., Path]) -> None:
    torch.compiler.reset()
    case = CASES[name](DEVICE, small=not measuring)
    rounds = (20 if DEVICE == "cuda" else 3) if measuring else 1
    measured = measure.measure(case, rounds, budget=8.0)
    if measuring and DEVICE == "cpu":
        measure.measure_cpu_memory(measured, [name])
    measure.finish(case, measured, record)


if __name__ == "__main__":
    print(*CASES)
