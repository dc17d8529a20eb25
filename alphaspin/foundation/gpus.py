"""What is known of the GPUs that a run may be planned for."""

from dataclasses import dataclass

from alphaspin.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """A GPU by its datasheet, and what others measured of it.

    Attributes:
        rate: bf16 products per second, dense, by the datasheet.
        bandwidth: bytes per second of its memory.
        source: who says so.
        memory: bytes.
        sustained: share of `rate` that large bf16 products reach under its power limit.
        capability: 10 x major + minor.
        processors: multiprocessors; 64K registers and 228 KB of shared memory each.
        clock: cycles per second.
        cache: bytes of the L2 cache.
        cache_rate: bytes per second from it to all processors.
    """

    rate: float
    bandwidth: float
    source: str
    memory: float = 0.0
    sustained: float = 1.0
    capability: int = 90
    processors: int = 132
    clock: float = 1.755e9
    cache: float = 50e6
    cache_rate: float = 9.4e12


# cuBLAS on an H100 and Liger's kernels on an H200 (Liger pull request 1422): 730 and 748-791
# TFLOP/s. B200: between 1,233 (tilus pull request 91, by events) and 1,610 (its tutorial, by
# counters). L2: what our forward head read on an H200, 50.4 GB of tiles in 5.35 ms, at least
# (benchmarks/results/nvidia-h200/first-visit.md), and for the H100 the same; for the A100 4.2 TB/s
# (RRZE gpu-benches issue 13). For the B200 nothing was found: assumed twice the H200's, as its
# tensor cores take twice as much a clock.
GPUS = {
    "a100": Gpu(
        312e12,
        2.039e12,
        "NVIDIA A100 datasheet, 80GB SXM",
        memory=80e9,
        sustained=0.8,
        capability=80,
        processors=108,
        clock=1.41e9,
        cache=40e6,
        cache_rate=4.2e12,
    ),
    "h100": Gpu(
        989e12,
        3.35e12,
        "NVIDIA H100 datasheet, SXM, without sparsity",
        memory=80e9,
        sustained=0.74,
    ),
    "h200": Gpu(
        989e12,
        4.8e12,
        "NVIDIA H200 datasheet, SXM, without sparsity",
        memory=141e9,
        sustained=0.78,
    ),
    "b200": Gpu(
        2250e12,
        8.0e12,
        "NVIDIA HGX B200 datasheet, without sparsity",
        memory=180e9,
        sustained=0.62,
        capability=100,
        processors=148,
        clock=1.85e9,
        cache=126e6,
        cache_rate=18.8e12,
    ),
}


@dataclass(frozen=True)
class Target:
    """What a plan is for: some GPUs of one kind or, without one, the machine that it is made on."""

    gpu: Gpu | None = None
    name: str = ""
    count: int = 1


HERE = Target()


def find_gpu(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        InputError: it is not known; names those that are.
    """
    if name.lower() not in GPUS:
        raise InputError(f"gpu = {name}: not known; known are {', '.join(GPUS)}")
    return GPUS[name.lower()]
