"""Which implementation serves a tensor: Triton, the C++ extension, or PyTorch, and why.

CUDA tensors go to the Triton kernels and CPU tensors to the C++ extension. PyTorch serves float64
and operators that C++ would not make faster; where something is missing (a CPU wheel without the
extension, a GPU without Triton) it is the fallback, and says once that it is slower. With
``TRITON_INTERPRET=1`` CPU tensors go through the Triton kernels too, interpreted, which is how they
are tested without a GPU.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, Literal, cast

import torch
from torch import Tensor

_LIBRARY = Path(__file__).with_name("_C.so")
_BUILD = "build it with `pip install --no-build-isolation -e .` (or `python setup.py build_ext -i`)"

Implementation = Literal["triton", "csrc", "torch"]

# Functions that have a C++ version: it is faster than PyTorch there (benchmarks/results).
CSRC = frozenset({"linear_logprob", "logits_logprob", "logits_logprob_gradient", "subtb_loss"})
OPERATORS = (
    "linear_logprob",
    "logits_logprob",
    "mixture_logprob",
    "segmented_lora",
    "sequence_logprob",
    "subtb_loss",
)


class Operator:
    """``alphaspin::<name>``: one definition, and two ways to it.

    ``torch.library``'s way is for whoever has to see the operator: ``torch.compile``, fake tensors,
    dispatch modes, functorch, tensors of a class of their own. Its bookkeeping takes 0.2 to 0.3 ms
    of a call forward and more backward, on a processor that has 224 linears of a 7B pass to launch;
    plain tensors in eager code go to the same functions directly.

    Args:
        name: of the operator, and of its C++ and Triton versions: see :func:`version`.
        portable: the version in PyTorch. The operator has its arguments and results.
        empty: makes results that are not filled, for tracing; gets the arguments by name.
        by: the argument whose device and dtype decide; None: `portable` looks itself.
        mutates: the arguments that are written to.
        setup_context, backward: as ``torch.library.register_autograd`` takes them; none where the
            operator has no derivative.
    """

    def __init__(
        self,
        name: str,
        portable: Callable[..., Any],
        empty: Callable[..., Any],
        *,
        by: str | None,
        mutates: tuple[str, ...] = (),
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        names = list(inspect.signature(portable).parameters)
        deciding = None if by is None else names.index(by)

        @functools.wraps(portable)
        def chosen(*arguments: Any) -> Any:
            return version(name, portable, arguments[cast(int, deciding)])(*arguments)

        run: Callable[..., Any] = portable if deciding is None else chosen
        self.run = run
        self._written = [names.index(argument) for argument in mutates]
        self.registered = torch.library.custom_op(f"alphaspin::{name}", run, mutates_args=mutates)
        self.registered.register_fake(
            lambda *arguments: empty(**dict(zip(names, arguments, strict=True)))
        )
        self._direct = None
        if setup_context is not None and backward is not None:
            self.registered.register_autograd(backward, setup_context=setup_context)
            self._direct = _direct(run, setup_context, backward)

    def __call__(self, *arguments: Any) -> Any:
        """The results, with their derivative where an argument requires one."""
        if torch.compiler.is_compiling() or _observed():
            return self.registered(*arguments)
        differentiated = False
        for argument in arguments:
            for x in argument if type(argument) is list else (argument,):
                kind = type(x)
                if kind in _NOT_TENSORS:
                    continue
                if kind not in _PLAIN or not (x.is_cpu or x.is_cuda):
                    return self.registered(*arguments)
                differentiated = differentiated or x.requires_grad
        if differentiated and self._direct is not None and torch.is_grad_enabled():
            return self._direct.apply(*arguments)
        for index in self._written:
            torch.autograd.graph.increment_version(arguments[index])
        return self.run(*arguments)


_NOT_TENSORS = frozenset({NoneType, bool, int, float, str})
_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def _observed() -> bool:
    """Whether a dispatch mode or a function transform wants to see operators."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


def _direct(
    run: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Any:
    """The ``autograd.Function`` of an operator."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = run(*arguments)
            ctx.set_materialize_grads(False)  # of results that have no derivative
            setup_context(ctx, arguments, output)
            ctx.arguments = len(arguments)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if all([grad is None for grad in grads]):  # nothing arrived at any result
                return (None,) * ctx.arguments
            found = backward(ctx, *grads)
            found = found if type(found) is tuple else (found,)
            # A list of tensors is no tensor here.
            return tuple([None if type(grad) is list else grad for grad in found])

    return Direct


def version(name: str, portable: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
    """Return the version of a function that serves ``tensor``; all take the same arguments.

    In C++ it is ``torch.ops.alphaspin.<name>_cpu``; in Triton ``<name>`` of the module in
    ``_triton`` that is called like the module of ``portable``.
    """
    match choose(name, tensor):
        case "csrc" if name in CSRC:
            return getattr(torch.ops.alphaspin, f"{name}_cpu")
        case "triton":
            # Not before a kernel is launched: triton may be absent, and decides when kernels are
            # made whether they are interpreted.
            return getattr(_triton(portable.__module__.rpartition(".")[2]), name)
        case _:
            return portable


@functools.cache  # importlib takes longer than a launch
def _triton(module: str) -> ModuleType:
    return importlib.import_module(f"alphaspin_kernels._triton.{module}")


def choose(operator: str, tensor: Tensor) -> Implementation:
    """Return the implementation that serves ``tensor``; warn once if it is only the fallback."""
    if tensor.dtype == torch.float64:
        return "torch"
    if tensor.is_cuda or interpreting():
        reason = triton_problem()
        if tensor.is_cuda and tensor.dtype == torch.bfloat16:
            reason = reason or _bf16_problem(tensor.get_device())
        if reason is None:
            return "triton"
    elif operator not in CSRC:
        return "torch"
    else:
        reason = csrc_problem()
        if reason is None:
            return "csrc"
    _warn_once(reason)
    return "torch"


@functools.cache  # Triton decides when kernels are made; and every call of an operator asks
def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_problem() -> str | None:
    """Return None, or the reason why the Triton kernels cannot be used."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


@functools.cache
def _bf16_problem(gpu: int) -> str | None:
    """Return None, or that Triton has no bfloat16 for a GPU of its compute capability."""
    capability = torch.cuda.get_device_capability(gpu)
    if capability < (8, 0):
        return "compute capability {}.{} has no bfloat16 (8.0 has)".format(*capability)
    return None


@functools.cache
def csrc_problem() -> str | None:
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
def _warn_once(reason: str) -> None:
    """Warn, once per reason and process, that operators run through PyTorch."""
    warnings.warn(
        f"alphaspin_kernels runs through PyTorch, which is slower: {reason}", stacklevel=2
    )


def kernel_status() -> dict[str, str]:
    """Say which implementation each operator uses on each device, and why.

    Returns:
        ``{"<operator>.<device type>": "<implementation and reason>"}``; loads the C++ extension if
        that has not happened yet.
    """
    status: dict[str, str] = {}
    problem = triton_problem()
    triton = f"PyTorch: {problem}" if problem else "Triton (float64: PyTorch)"
    for operator in OPERATORS:
        problem = csrc_problem()
        if interpreting():
            cpu = f"{triton}, interpreted because TRITON_INTERPRET=1"
        elif operator not in CSRC:
            cpu = "PyTorch: this operator has no C++ version"
        elif problem is not None:
            cpu = f"PyTorch: {problem}"
        else:
            cpu = f"C++ extension {_LIBRARY} ({_path(operator)}float64: PyTorch)"
        status |= {f"{operator}.cpu": cpu, f"{operator}.cuda": triton}
    return status


def _path(operator: str) -> str:
    """How the C++ version multiplies on this processor, for the operators that do."""
    if operator != "linear_logprob":
        return ""
    path = torch.ops.alphaspin.linear_logprob_cpu_path
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return "".join(f"{str(dtype).removeprefix('torch.')}: {path(dtype)}; " for dtype in dtypes)
