"""Where our kernels' time goes: python benchmarks/profile_ours.py [CASE ...] [--small].

For each of ours among a case's variants: the median of 20 calls, one after another, and what one
call launches, by device time. A case or variant that fails is said and passed over; the exit code
is 1 then.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import test_kernels
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

CUDA = torch.cuda.is_available()


def median(run: Callable[[], Any], calls: int) -> float:
    """Seconds of a call, of which the host waits for the end."""
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        if CUDA:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def show(name: str, *, small: bool) -> None:
    """Print the tables of one case."""
    case = test_kernels.CASES[name](test_kernels.DEVICE, small=small)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA
    for label, variant in case.variants.items():
        if "alphaspin" not in label:
            continue
        median(variant.run, 2)  # compiles
        seconds = median(variant.run, 1 if small else 20)
        print(f"\n{name}, {label}: {1e3 * seconds:.3f} ms, {case.dtype}, {case.shape}")
        with profile(activities=activities) as found:
            median(variant.run, 1)
        where = "device" if CUDA else "cpu"
        # On a GPU the kernels alone: an operator has its kernels' time as its own too.
        rows = [x for x in found.key_averages() if x.device_type == DeviceType.CUDA or not CUDA]
        total = sum(getattr(row, f"self_{where}_time_total") for row in rows)
        print(f"{where}: {total / 1e3:.3f} ms in all")
        for row in sorted(rows, key=lambda row: -getattr(row, f"self_{where}_time_total"))[:14]:
            own = getattr(row, f"self_{where}_time_total")
            if own:
                print(f"  {own / 1e3:9.3f} ms {row.count:5} x {row.key[:110]}", flush=True)


def main() -> int:
    names = [word for word in sys.argv[1:] if word != "--small"] or [*test_kernels.CASES]
    code = 0
    for name in names:
        try:
            show(name, small="--small" in sys.argv)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
