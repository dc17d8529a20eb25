"""Families with Liger's kernels, in Triton's interpreter, against the same without them.

Arguments: family:mode of the reference, each. Run by `test_speedups.py` in a process of its own,
for the interpreter is chosen at import.
"""

import os
import sys
from importlib import import_module

os.environ["TRITON_INTERPRET"] = "1"

import helpers
import numpy as np
import pytest
import torch
import triton.language as tl
from alphaspin_kernels import _dispatch
from test_backbone import PREVIOUS, perturb, relative
from test_reference_modes import gradients, pairs
from triton.runtime import interpreter

from alphaspin.model.backbone import Backbone
from alphaspin.model.routing import POLICY
from alphaspin.model.settings import LoraConfig
from alphaspin.model.speedups import fuse
from alphaspin.model.tree import Tree

# The interpreter leaves numbers with a point as Python has them, where a GPU is handed fp32, and
# has nothing of CUDA's library of functions.
convert = interpreter._implicit_cvt


def with_floats(value):
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.float32([value]), tl.float32), tl.float32)
    return convert(value)


interpreter._implicit_cvt = with_floats
import_module("liger_kernel.ops.rms_norm").rsqrt = lambda x: tl.math.rsqrt(x)
import_module("liger_kernel.ops.geglu").tanh = lambda x: 1 - 2 / (tl.math.exp(2 * x) + 1)
_dispatch.interpreting = lambda: False  # our own kernels are not what is tested here


launched: set[str] = set()
launch = interpreter.GridExecutor.__call__


def recorded(self, *args, **kwargs):
    launched.add(self.fn.__name__)
    return launch(self, *args, **kwargs)


interpreter.GridExecutor.__call__ = recorded


def size(tree: Tree) -> int:
    return len(tree.prompt) + sum(map(len, tree.responses))


def run(family: str, mode: str, device: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and gradients of a batch, with what there is for `device`."""
    model = helpers.make_model(family, num_hidden_layers=1)
    fuse(model, torch.device(device))
    backbone = Backbone(model, "x", "y")
    for number, name in enumerate((POLICY, PREVIOUS)):
        backbone.add_adapter(name, LoraConfig(r=4, alpha=6), seed=number, iteration=0)
        perturb(backbone, name, number)
        backbone.adapter_ids[name] = name
    return gradients(backbone, sorted(pairs(9), key=size)[:2], mode)


for argument in sys.argv[1:]:
    family, mode = argument.split(":")
    launched.clear()
    expected, expected_gradients = run(family, mode, "cpu")
    assert not launched
    found, found_gradients = run(family, mode, "cuda")
    mlp = "geglu_tanh" if family.startswith("gemma") else "swiglu"
    for name in ("rms_norm", mlp):
        assert {f"_{name}_forward_kernel", f"_{name}_backward_kernel"} <= launched, launched
    assert "_triton_rope" in launched, launched
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    error = relative(found_gradients, expected_gradients)
    assert error < 1e-5
    print(f"{family} {mode}: gradients differ by {error:.1g}")
