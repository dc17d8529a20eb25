"""Force one implementation of the operators in a test, and find the device it runs on.

"torch" is the portable version, "csrc" the C++ extension, "triton" the Triton kernels: on the GPU
if there is one, otherwise on the CPU in Triton's interpreter.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from alphaspin_kernels import _dispatch
from torch.utils._python_dispatch import TorchDispatchMode

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
            monkeypatch.setenv("TRITON_INTERPRET", "1")  # for Triton, and for us, who ask once
            monkeypatch.setattr(_dispatch, "interpreting", lambda: True)
        torch.set_default_device("cuda" if name == "triton" and GPU else "cpu")
        choose = lambda operator, tensor: "torch" if tensor.dtype == torch.float64 else name  # noqa: E731
        monkeypatch.setattr(_dispatch, "choose", choose)

    yield use
    torch.set_default_device(default)


def generator(seed: int) -> torch.Generator:
    """A generator on the device of the implementation under test."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def there(arguments: dict[str, object]) -> dict[str, object]:
    """Arguments made at import, on the device of the implementation under test."""
    device = torch.get_default_device()
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for key, value in arguments.items()
    }


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class LargestTensor(TorchDispatchMode):
    """Remember the largest tensor any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for tensor in result if isinstance(result, tuple) else (result,):
            if not isinstance(tensor, torch.Tensor):
                continue
            # A view of an argument is no memory of its own.
            if tensor.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, tensor.numel())
        return result
