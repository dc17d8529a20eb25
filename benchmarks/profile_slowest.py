"""Profile the slowest of our measured variants: python benchmarks/profile_slowest.py RESULTS."""

import sys
from pathlib import Path

import measure
import test_kernels
import torch
from torch.profiler import ProfilerActivity, profile

DEFAULT = ("linear_logprob-bfloat16", "alphaspin: forward + backward")


def slowest(results: Path) -> tuple[str, str]:
    """(name in CASES, variant) of the largest median; the default where nothing was measured."""
    measured = [
        (row["p50"], raw["case"].removeprefix("kernel-"), row["variant"])
        for raw in measure.read(results)
        for row in raw["rows"]
        if row["operation"] and row["p50"]
    ]
    return max(measured)[1:] if measured else DEFAULT


def main() -> None:
    name, label = slowest(Path(sys.argv[1]))
    case = test_kernels.CASES[name](test_kernels.DEVICE, small="--small" in sys.argv)
    run = case.variants[label].run
    run()  # compiles
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities, profile_memory=True) as found:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{name}, {label}: one call, {case.dtype}, {case.shape}\n")
    print(found.key_averages().table(sort_by=f"self_{where}_time_total", row_limit=25))


if __name__ == "__main__":
    main()
