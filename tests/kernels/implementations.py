"""Force one implementation of the operators in a test, and find the device it runs on.

"torch" is the portable version, "csrc" the C++ extension, "triton" the Triton kernels: on the GPU if
there is one, otherwise on the CPU in Triton's interpreter.
"""

import importlib.util

import pytest
import torch
from alphaspin_kernels import _dispatch

GPU = torch.cuda.is_available()
BUILT = _dispatch.csrc_problem() is None
needs_csrc = pytest.mark.skipif(not BUILT, reason=f"C++ operators: {_dispatch.csrc_problem()}")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
TORCH = pytest.param("torch")
CSRC = pytest.param("csrc", marks=needs_csrc)
TRITON = pytest.param("triton", marks=needs_triton)


@pytest.fixture
def force(monkeypatch):
    """A function that makes every operator use one implementation, until the test ends.

    Tensors are made on its device by default: draw random numbers with `generator(seed)`.
    """
    default = torch.get_default_device()

    def use(name: str) -> None:
        if name == "triton" and not GPU:
            monkeypatch.setenv("TRITON_INTERPRET", "1")
        torch.set_default_device("cuda" if name == "triton" and GPU else "cpu")
        choose = lambda operator, tensor: "torch" if tensor.dtype == torch.float64 else name  # noqa: E731
        monkeypatch.setattr(_dispatch, "choose", choose)

    yield use
    torch.set_default_device(default)


def generator(seed: int) -> torch.Generator:
    """A generator on the device of the implementation under test."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
