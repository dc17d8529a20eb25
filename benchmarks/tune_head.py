"""Variants of the head's kernels on a GPU: python benchmarks/tune_head.py [--compile] [NAME ...].

Each is timed from a flushed cache (median of 12 calls after 2), and compared with float64 on every
64th row.
Forms that were never compiled take seconds each: `--compile` compiles all of them first, a process
each, into Triton's cache.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import measure
import torch
from alphaspin_kernels import linear_logprob
from alphaspin_kernels._triton import frozen_head, head
from alphaspin_kernels._triton import linear_logprob as launches
from test_kernels import head_problem, with_gradient, without_gradient

SIZE = (4096, 4096, 128_256)  # tokens, hidden, vocabulary
VARIANTS: dict[str, dict[str, Any]] = {
    "both": {},
    "both, 2048 rows": {"rows": 2048},
    "both, groups of 8": {"group": 8},
    "both, groups of 32": {"group": 32},
    "both, chunks of 32 tiles": {"chunk": 32},
    "both, chunks of 128 tiles": {"chunk": 128},
    "both, 4 stages": {"num_stages": 4},
    "both, a loop in a loop": {"FLAT": False},
    "both, skip_below=1e-5": {"skip_below": 1e-5},
    "forward": {},
    "forward, 1024 rows": {"rows": 1024},
    "forward, 4096 rows": {"rows": 4096},
    "forward, 4 stages": {"num_stages": 4},
    "forward, a loop in a loop": {"FLAT": False},
    "forward, in one piece": {"TWO": False},
}
PUBLISHED = head.blocks


def use(rows: int = 0, group: int = 16, chunk: int = 64, **blocks: Any) -> None:
    """Set what the launches read."""
    launches.ROWS, head.ROWS = rows or 4096, rows or 2048
    frozen_head.GROUP, frozen_head.CHUNK = group, chunk

    def changed(*args: Any, **options: Any) -> dict[str, Any]:
        found = PUBLISHED(*args, **options)
        return found if options["targets"] else found | blocks

    head.blocks = changed


def timed(run: Callable[[], Any]) -> float:
    """Milliseconds, as test_kernels.py measures them."""
    found = [measure._timed(run, "cuda")[0] for _ in range(14)]
    return 1e3 * statistics.median(found[2:])


def main(names: list[str]) -> None:
    problem = head_problem("cuda", torch.bfloat16, *SIZE)
    grad, (hidden, weight, targets) = problem.pop("grad"), problem.values()
    part = slice(None, None, 64)
    exact = with_gradient(
        lambda x, w, y: torch.log_softmax(x @ w.T, -1).gather(1, y[:, None])[:, 0],
        hidden[part].double(),
        weight.double(),
        targets[part],
        grad=grad[part],
    )
    for name in names:
        options = dict(VARIANTS[name])
        skip = options.pop("skip_below", 0.0)
        use(**options)

        def run(skip: float = skip, both: bool = name.startswith("both")) -> Any:
            if both:
                function = lambda x, w, y: linear_logprob(x, w, y, skip_below=skip)  # noqa: E731
                return with_gradient(function, hidden, weight, targets, grad=grad)
            return without_gradient(linear_logprob, hidden, weight, targets)

        try:
            values, gradient = run()
            off = float((values[part].double() - exact[0]).abs().max())
            said = f"{timed(run):8.3f} ms, values off by {off:.1e}"
            if gradient is not None:
                far = (gradient[part].double() - exact[1]).norm() / exact[1].norm()
                said += f", gradient by {float(far):.1e}"
        except Exception as error:
            said = f"{type(error).__name__}: {str(error)[:300]}"
        print(f"{name:28s} {said}", flush=True)


if __name__ == "__main__":
    words = sys.argv[1:]
    if "--compile" in words:
        each = [[sys.executable, __file__, name] for name in VARIANTS]
        quiet = {"stdout": subprocess.DEVNULL, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
        for process in [subprocess.Popen(command, **quiet) for command in each]:
            process.wait()
    main([word for word in words if word != "--compile"] or [*VARIANTS])
