"""A GPU that is not there: tensors that say they are on `cuda:0`, with their numbers on the CPU.

What a CUDA build refuses is refused: operands on different devices, and 16-bit products in ways
that the oldest supported torch has not. What makes the host wait for the device is recorded, with
the line of this project that asked for it. Triton kernels run in the interpreter, by way of the
functions that launch them. Underneath is PyTorch's hook for devices written in Python, so that
autograd, views and parameters are PyTorch's own.
"""

import sys
import traceback
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plain_varlen
import pytest
import torch
from alphaspin_kernels import OPERATORS
from alphaspin_kernels._triton import common
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from triton.tools.tensor_descriptor import TensorDescriptor

from alphaspin.model import graphs, varlen

ROOT = Path(__file__).parents[1]
CUDA, UNDERNEATH = torch.device("cuda", 0), torch.device("privateuseone", 0)
NEWEST = (99, 0)
aten = torch.ops.aten
# Their results have a size, or are a number, that the host has to know.
WAITS = frozenset(
    ["_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"]
)
INDEXED = frozenset(["index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"])
_made: list[torch.library.Library] = []


# Functions that are called for each micro-batch, token and pass.
HOT = {
    ("training/trainer.py", "accumulate_gradients"): "train",
    ("model/scoring.py", "score"): "score",
    ("sampling/decode.py", "admit"): "sample",
    ("sampling/decode.py", "choose"): "sample",
    ("model/stepper.py", "prefill"): "sample",
    ("model/stepper.py", "step"): "sample",
    ("model/stepper.py", "select"): "sample",
}
# They add with atomics, or in the order in which blocks finish, unless torch is told not to.
ADDING = frozenset(
    ["index_add", "index_add_", "scatter_add", "scatter_add_", "index_copy", "index_copy_"]
)
# What a fused backward pass would be here, and one that is.
ATTENTION = frozenset(["_softmax_backward_data", "_varlen_attn_backward"])
NO_ORDER = frozenset(["cumsum", "cumsum_", "histc", "put_", "median", "nll_loss_forward"])


class Log:
    """What happened on the device.

    waits: of the host, by hot loop ("" for none), file and function. unordered: operators whose
    result may differ from run to run. recorded: passes that were recorded as graphs.
    """

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str, str]] = Counter()
        self.unordered: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.recorded, self.recording = 0, False

    def record(self, work: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], Tensor], Any]:
        """Runs it as a capture does: nothing waits, nothing comes from the host."""
        self.recording = True
        try:
            work()
        finally:
            self.recording = False
        self.recorded += 1
        return work, pool

    def touch(self) -> None:
        """The host and the device exchange something."""
        if self.recording:
            raise RuntimeError("operation not permitted when stream is capturing")

    def wait(self) -> None:
        """Note the innermost function of this project that is at work."""
        self.touch()
        loop, where = "", ("elsewhere", "")
        for frame in traceback.extract_stack():
            path = Path(frame.filename)
            if ROOT in path.parents and path.relative_to(ROOT).parts[0] in ("alphaspin", "kernels"):
                where = (str(path.relative_to(ROOT)), frame.name)
                loop = loop or HOT.get((f"{path.parent.name}/{path.name}", frame.name), "")
        self.waits[loop, *where] += 1

    def note(self, func: Any, args: Any) -> None:
        """Count the operator, and whether the order of its sums is open."""
        name = func.overloadpacket.__name__
        self.operators[str(func)] += 1
        ordered = torch.are_deterministic_algorithms_enabled()
        strict = ordered and not torch.is_deterministic_algorithms_warn_only_enabled()
        floats = isinstance(args[0], Tensor) and args[0].is_floating_point() if args else False
        adds = name in ADDING or (name.startswith("index_put") and len(args) > 3 and args[3])
        if (
            (adds and not ordered)
            or (name in ATTENTION and not strict)
            or (name in NO_ORDER and floats)
        ):
            self.unordered[name] += 1


class OnGpu(Tensor):
    """A tensor whose numbers, `.host`, are on the CPU."""

    host: Tensor
    events = Log()
    torch_version = NEWEST

    @staticmethod
    def __new__(cls, host: Tensor) -> "OnGpu":
        made = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            host.stride(),
            host.storage_offset(),
            dtype=host.dtype,
            device=UNDERNEATH,
        )
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = property(lambda self: True)
    device = property(lambda self: CUDA)

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> Any:
        self.events.wait()
        return self.host.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def __deepcopy__(self, memo: Any) -> Any:
        copy = type(self)(self.host.detach().clone()).requires_grad_(self.requires_grad)
        return torch.nn.Parameter(copy, self.requires_grad) if hasattr(self, "_is_param") else copy

    def __repr__(self) -> str:
        return f"OnGpu({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        cls.events.note(func, args)
        name = func.overloadpacket.__name__
        if func.namespace == "alphaspin":
            definition = torch._library.custom_ops.OPDEFS[f"alphaspin::{name}"]
            with Redirect():  # a mode is off in what it calls itself
                return definition._init_fn(*args, **kwargs)
        refuse(func, args, kwargs)
        if waits(func, args, kwargs):
            cls.events.wait()
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, OnGpu)]
        host_args, host_kwargs = tree_map_only(OnGpu, lambda x: x.host, (args, kwargs))
        device = kwargs.get("device")
        if device is not None:
            host_kwargs["device"] = torch.device("cpu")
        result = compute(func, host_args, host_kwargs)
        if name == "_local_scalar_dense":
            return result
        if name == "_to_copy" and device is not None and torch.device(device).type == "cpu":
            return result
        same = {id(x.host): x for x in given}  # in place, and `out=`

        def wrap(x: Any) -> Any:
            return same[id(x)] if id(x) in same else cls(x)

        return tree_map(lambda x: wrap(x) if isinstance(x, Tensor) else x, result)


def refuse(func: Any, args: Any, kwargs: Any) -> None:
    """Raise what CUDA builds raise about tensors that are elsewhere.

    Single numbers and indices may be on the CPU, and copies are between devices.
    """
    name = func.overloadpacket.__name__
    if name in ("copy_", "_to_copy"):
        return
    elsewhere = [x for x in tree_leaves((args, kwargs)) if type(x) is Tensor and x.dim()]
    if name in INDEXED and isinstance(args[0], OnGpu):
        elsewhere = [x for x in elsewhere if not any(x is index for index in args[1])]
    if elsewhere:
        shapes = [list(x.shape) for x in elsewhere]
        raise RuntimeError(f"{func}: tensors of shape {shapes} are on the CPU, others on cuda:0")


def waits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the host waits until the device has done all that it was given before."""
    name = func.overloadpacket.__name__
    if name == "_to_copy":  # this way, and not to the device
        return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    if name == "copy_":
        return isinstance(args[1], OnGpu) and not isinstance(args[0], OnGpu)
    if name in INDEXED:
        return any(x is not None and x.dtype == torch.bool for x in args[1])
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return name in WAITS


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """The operator on the CPU, and what only CUDA has: 16-bit factors with a product in fp32."""
    if func in (aten.mm.dtype, aten.mm.dtype_out):
        a, b, dtype = args
        check_factors(a, b, dtype)
        return torch.mm(a.float(), b.float(), **kwargs)
    if func in (aten.addmm.dtype, aten.addmm.dtype_out):
        c, a, b, dtype = args
        check_factors(a, b, dtype)
        if OnGpu.torch_version < (2, 10) and c.dtype != b.dtype:  # pytorch 167931
            raise RuntimeError(f"self and mat2 must have the same dtype, got {c.dtype}, {b.dtype}")
        return torch.addmm(c.float(), a.float(), b.float(), **kwargs)
    if func.namespace == "torch_attn":
        if args[0].dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        backward = func.overloadpacket.__name__ == "_varlen_attn_backward"
        return plain_varlen.backward(*args) if backward else plain_varlen.forward(*args)
    return func(*args, **kwargs)


def check_factors(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    if a.dtype != b.dtype or a.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"out_dtype = {dtype}: factors are {a.dtype}, {b.dtype}")


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    return OnGpu(torch.empty(size, dtype=dtype, memory_format=memory_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return OnGpu(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Tensor:
    """Of a list that serves as an index."""
    OnGpu.events.touch()
    target.host.copy_(source)
    return target


class _Move(torch.autograd.Function):
    """A copy of a CPU tensor on the device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        OnGpu.events.touch()
        return OnGpu(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return grads[0].host


class Redirect(TorchFunctionMode):
    """Makes and moves tensors on the pretended device where a call says `cuda`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.backward:
            with self:
                return torch.autograd.backward(args, kwargs.get("gradient"))
        if getattr(func, "__name__", "") == "to" and isinstance(args[0], Tensor):
            rest = [*args[1:], *kwargs.values()]
            devices = [d for d in map(device_of, rest) if d is not None]
            if not devices or devices[0].type != "cuda":
                return func(*args, **kwargs)
            x = args[0] if isinstance(args[0], OnGpu) else _Move.apply(args[0])
            dtypes = [d.dtype if isinstance(d, Tensor) else d for d in rest]
            dtypes = [d for d in dtypes if isinstance(d, torch.dtype)]
            return x.to(dtypes[0]) if dtypes and dtypes[0] != x.dtype else x
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        if args and isinstance(args[0], OnGpu):  # new_zeros, zeros_like
            return func(*args, **kwargs | {"device": None})
        wanted = kwargs.pop("requires_grad", False)
        made = func(*args, **kwargs | {"device": "cpu"})
        return OnGpu(made).requires_grad_(wanted) if isinstance(made, Tensor) else made


def device_of(value: Any) -> torch.device | None:
    if isinstance(value, str):
        return torch.device(value)
    if isinstance(value, Tensor):
        return value.device
    return value if isinstance(value, torch.device) else None


def on_host(x: Any) -> Any:
    return replace(x, base=x.base.host) if isinstance(x, TensorDescriptor) else x.host


class Interpreted:
    """A form of a Triton kernel: checks where its arguments are, and gives it their numbers."""

    def __init__(self, form: Any) -> None:
        self.form = form

    def __getattr__(self, name: str) -> Any:
        return getattr(self.form, name)

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            given = (getattr(x, "base", x) for x in (*args, *options.values()))
            elsewhere = [x for x in given if type(x) is Tensor]
            if elsewhere:
                raise RuntimeError(f"{self.form.fn.__name__}: a pointer to memory of the CPU")
            OnGpu.events.kernels[self.form.fn.__name__] += 1
            numbers = tree_map_only((OnGpu, TensorDescriptor), on_host, (args, options))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TRITON_INTERPRET", "1")
                return self.form[grid](*numbers[0], **numbers[1])

        return launch


@contextmanager
def gpu(version: tuple[int, int] = NEWEST) -> Generator[Log]:
    """Within, torch has a GPU of capability 9.0, as a CUDA build of this version serves it."""
    if not _made:
        _setup_privateuseone_for_python_backend("pretended")
        _made.append(torch.library.Library("aten", "IMPL"))
        _made[0].impl("empty.memory_format", _empty, "PrivateUse1")
        _made[0].impl("empty_strided", _empty_strided, "PrivateUse1")
        _made[0].impl("_copy_from", _copy_from, "PrivateUse1")
    for operator in OPERATORS:
        import_module(f"alphaspin_kernels._triton.{operator}")
    properties = SimpleNamespace(
        multi_processor_count=4, name="pretended", major=9, minor=0, total_memory=80 * 2**30
    )
    OnGpu.events, OnGpu.torch_version = Log(), version
    with pytest.MonkeyPatch.context() as patch, Redirect():
        patch.setattr(varlen, "CHOSEN", {})
        patch.setattr(graphs, "record", OnGpu.events.record)
        if version < (2, 10):
            patch.setitem(sys.modules, "torch.nn.attention.varlen", None)
        patch.setattr(common, "TORCH", version)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr(torch, "Generator", lambda *_, of=torch.Generator: of("cpu"))
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        patch.setattr(torch.cuda, "get_device_name", lambda *_: "pretended")
        load = lambda path, device: {k: v.to(device) for k, v in load_file(path).items()}  # noqa: E731
        patch.setattr("alphaspin.model.backbone.load_file", load)
        for kernel in common.Kernel.made:
            forms = {even: Interpreted(form) for even, form in kernel.forms.items()}
            patch.setattr(kernel, "forms", forms)
        yield OnGpu.events
