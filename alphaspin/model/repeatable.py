"""What makes torch give the same numbers again, so that a resumed run ends with the same bits.

On a CPU that is one setting. On a GPU cuBLAS needs its workspace set before its first product, and
the backward kernels of attention, which add with atomics, take their ordered path only where torch
is to *refuse* what has none (pytorch, attention_backward.cu: with `warn_only` they stay as they
are). Refusing would stop families whose own code has such an operator; hence two degrees.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from alphaspin.model.backbone import Backbone

WORKSPACE, ORDERED = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""The two that cuBLAS repeats itself with, by NVIDIA's manual."""


@contextmanager
def repeatable() -> Generator[None]:
    """Operators of torch that give the same numbers again; its settings are put back at the end.

    The workspace is of the process, and stays.
    """
    memory: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    if not torch.cuda.is_initialized():
        os.environ.setdefault(WORKSPACE, ORDERED[0])
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.backends.cuda.enable_cudnn_sdp(False)  # has no ordered backward pass
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = before[2]
        torch.backends.cuda.enable_cudnn_sdp(before[3])


def backward(loss: Tensor, backbone: "Backbone") -> None:
    """The backward pass of a loss; within `repeatable` the same bits each time, on a GPU too.

    There for packed trees, that is for families whose layers mix tokens by attention alone.
    """
    strict = loss.is_cuda and backbone.layout == "packed"
    with refusing(strict and os.environ.get(WORKSPACE) in ORDERED):
        loss.backward()


@contextmanager
def refusing(refuse: bool) -> Generator[None]:
    """Within `repeatable`, refuse operators without an ordered path, or only warn of them."""
    before = torch.is_deterministic_algorithms_warn_only_enabled()
    if torch.are_deterministic_algorithms_enabled() and before == refuse:
        torch.use_deterministic_algorithms(True, warn_only=not refuse)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(True, warn_only=before)
    else:
        yield


def lenient() -> Any:
    """For what a backward pass computes again, which is the layers' own code."""
    return refusing(False)
