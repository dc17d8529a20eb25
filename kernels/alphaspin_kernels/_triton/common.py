"""What the kernels share: dtypes under the interpreter, and the record of a launch."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

# Triton's interpreter multiplies the raw bits of bf16 in tl.dot (triton issue 11584).
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
SIGNATURE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Launch:
    """One compiled form of a kernel.

    Attributes:
        kernel: the ``@triton.jit`` function.
        types: Triton type of each argument that is not a constexpr: ``*bf16``, ``i32``, ``fp32``.
        constexprs: the constexpr arguments, block sizes among them.
        aligned: names of the pointers and integers that are multiples of 16, as Triton specialises
            them at a launch with aligned tensors.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
        products: whether it has ``tl.dot``, so that tensor-core instructions are expected.
    """

    kernel: Any
    types: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int = 4
    num_stages: int = 3
    products: bool = False


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a b, in fp32: 16-bit factors on the tensor cores, fp32 ones as three TF32."""
    if INTERPRET:
        return accumulator + tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, accumulator, input_precision="tf32x3")


@triton.jit
def tanh(x):
    """tanh for fp32; by its series near 0, where 1 - e^(-2|x|) would lose digits."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = a * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * 62.0 / 2835.0))))
    size = tl.where(a < 0.3, near, far)
    return tl.where(x < 0.0, -size, size)
