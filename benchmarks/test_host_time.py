"""What a linear with an adapter costs the processor before anything is computed.

`pytest benchmarks/test_host_time.py --benchmark`: products so small that bookkeeping is all there
is, minima of interleaved repeats (other work on the machine only adds). On a GPU that is what has
to be launched ahead of it: 224 linears in a pass of a 7B model. Triton's own launches come on top.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from alphaspin_kernels import linear_logprob, segmented_lora
from measure import Goal
from torch import Tensor
from torch.nn.functional import linear

CALLS = 20


def cases() -> dict[str, Callable[[], Tensor]]:
    """A linear layer with LoRA as PEFT writes it, ours, and ours through torch.library."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight = normal(4, 16).requires_grad_(), normal(16, 16)
    a, b = normal(2, 16).requires_grad_(), normal(16, 2).requires_grad_()
    other, targets = (normal(2, 16), normal(16, 2)), torch.zeros(4, dtype=torch.int64)
    module = sys.modules[segmented_lora.__module__]
    direct = module._segmented_lora

    def registered() -> Tensor:
        module._segmented_lora = direct.registered
        try:
            return segmented_lora(x, weight, [(a, b)], [4], 2.0)
        finally:
            module._segmented_lora = direct

    return {
        "plain LoRA": lambda: linear(x, weight) + linear(linear(x, a), b) * 2.0,
        "segmented_lora": lambda: segmented_lora(x, weight, [(a, b)], [4], 2.0),
        "the same through torch.library": registered,
        "segmented_lora, 3 segments": lambda: segmented_lora(
            x, weight, [(a, b), other, None], [2, 1, 1], 2.0
        ),
        "linear_logprob": lambda: linear_logprob(x, weight, targets),
    }


def measured(rounds: int) -> dict[str, list[float]]:
    """µs of a call without gradients, with a graph, and of both passes."""

    def both(run: Callable[[], Tensor]) -> None:
        run().sum().backward()

    def frozen(run: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            run()

    ways: list[Callable[[Any], Any]] = [frozen, lambda run: run(), both]
    functions = cases()
    best = {name: [float("inf")] * len(ways) for name in functions}
    for _ in range(rounds):
        for name, run in functions.items():
            for number, way in enumerate(ways):
                start = time.perf_counter()
                for _ in range(CALLS):
                    way(run)
                spent = (time.perf_counter() - start) / CALLS * 1e6
                best[name][number] = min(best[name][number], spent)
    return best


def test_host_time(measuring: bool, record: Callable[..., Path]) -> None:
    found = measured(200 if measuring else 2)
    plain, ours = found["plain LoRA"], found["segmented_lora"]
    header = ["", "no gradient, µs", "forward, µs", "forward + backward, µs", "× plain"]
    rows = [
        [name, *(f"{value:.0f}" for value in values), f"{values[2] / plain[2]:.2f}"]
        for name, values in found.items()
    ]
    goals = [
        Goal("a linear above plain LoRA, no gradient", ours[0] - plain[0], 60, " µs"),
        Goal("forward", ours[1] - plain[1], 60, " µs"),
        Goal("forward + backward", ours[2] - plain[2], 60, " µs"),
    ]
    lines = ["| " + " | ".join(goal.row()) + " |" for goal in goals]
    text = "4 rows, 16 columns, rank 2, fp32.\n\n"
    text += "\n".join(["| measure | goal | measured | |", "|---|---|---|---|", *lines])
    print(record("host-time", header, rows, text, found).read_text())


if __name__ == "__main__":
    pytest.main([__file__, "--benchmark", "-s"])
