"""What the kernels share: dtypes under the interpreter, and the record of a launch."""

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter multiplies the raw bits of bf16 in tl.dot (triton issue 11584).
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LOWEST = tl.constexpr(-3.4028234e38)  # of fp32
# What stays in the L2 cache: 50 MB on an H100, less what streams through it.
CACHE = 32 << 20
SIGNATURE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Kernel:
    """Decorator: two Triton kernels of one function.

    ``kernel[True]`` is for the arguments named in ``aligned``, pointers and integers, being
    multiples of 16, so that they are read in vectors; ``kernel[False]`` for any. By itself Triton
    would compile another variant for every combination of arguments that are multiples of 16, or
    1, at the launch that first has it: forms that the gate has not seen.
    """

    made: ClassVar[list["Kernel"]] = []

    def __init__(self, aligned: str) -> None:
        self.made.append(self)
        self.aligned = aligned.split()

    def __call__(self, function: Any) -> "Kernel":
        """Make the two kernels."""
        parameters = inspect.signature(function).parameters.values()
        names = [p.name for p in parameters if p.annotation is not tl.constexpr]
        rest = [name for name in names if name not in self.aligned]
        self.forms = {
            True: triton.jit(function, do_not_specialize=rest),
            False: triton.jit(function, do_not_specialize=names),
        }
        return self

    def __getitem__(self, even: bool) -> Any:
        return self.forms[even]


def multiples_of_16(*arguments: Tensor | int | None) -> bool:
    """Whether the tensors' addresses and the integers are."""
    bits = 0
    for x in arguments:
        bits |= x.data_ptr() if isinstance(x, Tensor) else x or 0
    return bits % 16 == 0


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up; Triton's own is for kernels too, and takes 10 µs on the host."""
    return -(-x // y)


@dataclass(frozen=True)
class Fast:
    """What the gate asserts of a form beyond that it fits.

    Attributes:
        shape: of the tensor cores' instruction, in the PTX.
        elements: results of a tile's product, which the epilogue takes.
        epilogue: fp32 instructions for each of them, at most.
    """

    shape: str
    elements: int
    epilogue: float


@dataclass(frozen=True)
class Launch:
    """One compiled form of a kernel.

    Attributes:
        kernel: the ``@triton.jit`` function.
        types: Triton type of each argument that is not a constexpr: ``*bf16``, ``i32``, ``fp32``.
        constexprs: the constexpr arguments, block sizes among them.
        aligned: names of the pointers and integers that are multiples of 16.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
        products: whether it has ``tl.dot``, so that tensor-core instructions are expected.
        fast: what makes it fast, where that is known and the gate shall hold it.
    """

    kernel: Any
    types: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int = 4
    num_stages: int = 3
    products: bool = False
    fast: "Fast | None" = None

    @classmethod
    def of(
        cls,
        kernel: Kernel,
        even: bool,
        types: Sequence[tuple[str, str]],
        options: dict[str, Any],
        *,
        products: bool = False,
        fast: "Fast | None" = None,
    ) -> "Launch":
        """Shorter to write: ``[("*bf16", "hidden weight")]``, and options as a launch has them.

        Names that are not this kernel's are passed over, so that several kernels can share a list;
        the last type of a name counts, and a pointer without one is absent, None.
        """
        options = dict(options)
        compiler = {k: options.pop(k) for k in ("num_warps", "num_stages") if k in options}
        own = kernel[even].arg_names
        named = {name: kind for kind, names in types for name in names.split() if name in own}
        options |= dict.fromkeys(set(own) - named.keys() - options.keys())
        aligned = tuple(name for name in kernel.aligned if even and name in named)
        return cls(kernel[even], named, options, aligned, products=products, fast=fast, **compiler)


def capability_of(x: Tensor) -> int:
    """Compute capability of the tensor's GPU, 10 x major + minor; 90 where there is none."""
    return _capability_and_processors(x.get_device())[0] if x.is_cuda else 90


def processors(x: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; 4 in the interpreter, to split work there too."""
    return _capability_and_processors(x.get_device())[1] if x.is_cuda else 4


@functools.cache  # each linear asks
def _capability_and_processors(gpu: int) -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability(gpu)
    return 10 * major + minor, torch.cuda.get_device_properties(gpu).multi_processor_count


def unit_stride(x: Tensor) -> Tensor:
    """The matrix itself, or a copy whose rows are contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


def head_arguments(
    bias: Tensor | None, softcap: float | None, temperature: float
) -> dict[str, Any]:
    """Arguments of a kernel that makes z' of a tile: bias and cap may be absent."""
    return {
        "bias": None if bias is None else bias.contiguous(),
        "cap": softcap or 1.0,
        "temperature": temperature,
        "HAS_BIAS": bias is not None,
        "CAPPED": softcap is not None,
    }


def chunk_bytes(rows: int, width: int, vocabulary: int, chunk: int) -> int:
    """Bytes that the frozen head's gradient moves through memory beside the head itself.

    A chunk reads and writes the fp32 mean [rows, width] and reads the hidden states; its logits in
    fp32 and p in 16 bits are written and read there if both do not stay in the cache.
    """
    chunks = cdiv(vocabulary, chunk)
    tiles = 0 if 6 * rows * min(chunk, vocabulary) <= CACHE else 12 * rows * vocabulary
    return chunks * rows * width * (4 + 4 + 2) + tiles


def chunk_entries(rows: int, width: int, vocabulary: int, sizes: Sequence[int]) -> int:
    """The chunk that moves the fewest bytes."""
    return min(sizes, key=lambda chunk: chunk_bytes(rows, width, vocabulary, chunk))


def multiply_add(c: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """c <- (c +) a b with c in fp32: 16-bit factors through cuBLAS's fp32 sums, never rounded."""
    if a.is_cuda and a.dtype != torch.float32:
        if add and TORCH < (2, 10):  # its addmm takes no fp32 summand (pytorch 167931)
            c += torch.mm(a, b, out_dtype=torch.float32)
        elif add:
            torch.addmm(c, a, b, out_dtype=torch.float32, out=c)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=c)
    else:
        with torch.autocast(a.device.type, enabled=False):
            torch.addmm(c, a.float(), b.float(), beta=float(add), out=c)


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a b, in fp32: 16-bit factors on the tensor cores, fp32 ones as three TF32."""
    if INTERPRET:
        return accumulator + tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, accumulator, input_precision="tf32x3")


@triton.jit
def at_least_one(rounds):
    """max(rounds, 1), known to be positive.

    A product's loop that may not run at all makes each wgmma wait for the one before (triton 3.6):
    the sum's registers then have zeros moved into them on a way past the loop.
    """
    rounds = tl.maximum(rounds, 1)
    tl.assume(rounds > 0)
    return rounds


@triton.jit
def tanh(x):
    """tanh for fp32; by its series near 0, where 1 - 2 / (1 + e^2x) would lose digits."""
    # 2 log2(e) x, bounded where e^2x would overflow.
    e = tl.exp2(tl.minimum(x * 2.8853900817779268, 100.0))
    far = 1.0 - 2.0 / (1.0 + e)
    s = x * x
    series = s * 0.021869488536155203 - 0.053968253968253971  # 62 / 2835, -17 / 315
    series = s * (s * (s * series + 0.13333333333333333) - 0.33333333333333333)
    return tl.where(tl.abs(x) < 0.3, x + x * series, far)


@triton.jit
def bounded(z, cap, temperature, CAPPED: tl.constexpr):
    """z' = cap(z) / temperature."""
    if CAPPED:
        z = cap * tanh(z / cap)
    return z / temperature
