"""The optional C++ extension: load it once, and say why when it cannot be used."""

import functools
import re
import warnings
from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_C.so")
_BUILD = "build it with `pip install --no-build-isolation -e .` (or `python setup.py build_ext -i`)"


@functools.cache
def problem() -> str | None:
    """Load ``_C.so`` and return None, or return the reason why it cannot be used."""
    if not _LIBRARY.exists():
        return f"extension not built ({_LIBRARY} does not exist); {_BUILD}"
    # A library of another torch release may crash instead of failing to load, so its version is
    # read from the bytes of the file, where csrc/ leaves a marker, before anything is executed.
    marker = re.search(rb"ALPHASPIN_TORCH=(\d+\.\d+)", _LIBRARY.read_bytes())
    built_for = marker.group(1).decode() if marker else "unknown"
    running = ".".join(torch.__version__.split(".")[:2])
    if built_for != running:
        return f"extension was built for torch {built_for}, this is torch {running}; {_BUILD}"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"extension does not load ({error.__cause__ or error}); {_BUILD}"
    return None


@functools.cache
def warn_once(reason: str) -> None:
    """Warn, once per reason and process, that the CPU operators run through PyTorch."""
    warnings.warn(
        f"alphaspin_kernels runs on the CPU through PyTorch, which is slower: {reason}",
        stacklevel=2,
    )


def kernel_status() -> dict[str, str]:
    """Say which implementation each operator uses on each device, and why.

    Returns:
        ``{"<operator>.<device type>": "<implementation and reason>"}``; loads the C++ extension if
        that has not happened yet.
    """
    reason = problem()
    if reason is not None:
        cpu = f"PyTorch: {reason}"
    else:
        path = torch.ops.alphaspin.linear_logprob_cpu_path
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        paths = ", ".join(f"{str(dtype).removeprefix('torch.')}: {path(dtype)}" for dtype in dtypes)
        cpu = f"C++ extension {_LIBRARY} ({paths}; float64: PyTorch)"
    return {
        "linear_logprob.cpu": cpu,
        "linear_logprob.cuda": "PyTorch: this operator has no CUDA kernel",
    }
