"""Every form of every Triton kernel, compiled for GPUs that are not here."""

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from alphaspin_kernels import (
    OPERATORS,
    linear_logprob,
    logits_logprob,
    mixture_logprob,
    segmented_lora,
)
from alphaspin_kernels._triton.common import Fast, Kernel, multiples_of_16
from alphaspin_kernels.gate import SHARED, Report
from implementations import needs_triton

SWEEP = bool(os.environ.get("ALPHASPIN_SWEEP"))
FEW = """
from alphaspin_kernels import gate

def few(operator, capability, every=gate.forms):
    kept = {}
    for form in sorted(every(operator, capability), key=lambda form: "fp16" not in str(form.types)):
        types = str(form.types).replace("fp16", "bf16")
        if form.products and "bf16" not in types:
            continue
        options = form.constexprs if form.products else form.constexprs | {"BLOCK_C": None}
        kept[form.kernel, types, str(options), form.aligned] = form
    return list(kept.values())

gate.forms = few
gate.main()
"""
"""The gate, of forms that differ in the 16-bit type alone with that in bf16 (the name of an
instruction is another), and of those that differ in a chunk's width alone with the widest, which
takes most registers. Products of fp32 alone, which take longest to compile, are not among them."""


PARTS = [[operator] for operator in OPERATORS] if SWEEP else [OPERATORS[:1], OPERATORS[1:]]


@needs_triton
@pytest.mark.parametrize("capability", SHARED if SWEEP else [90])
@pytest.mark.parametrize("operators", PARTS, ids="+".join)
def test_no_spills_shared_memory_in_limits_and_tensor_cores(operators, capability):
    # In a process of its own: in this one the kernels were made for the interpreter.
    program = ["-m", "alphaspin_kernels.gate"] if SWEEP else ["-c", FEW]
    command = [sys.executable, *program, "--processes", "1"]
    command += ["--operator", *operators, "--capability", str(capability)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(f"sm_{capability} ") >= 2 * len(operators)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"spilled": 8}, "8 bytes of registers"),
        ({"shared": 300_000}, "300000 bytes of shared memory of 232448"),
        ({"tensor_cores": False}, "no wgmma.mma_async in the PTX"),
        ({"serialised": True}, "each wgmma waits"),
        ({"copies": 0}, "no UTMALDG"),
        ({"shape": "m64n128k16"}, "m64n128k16 instead of m64n256k16"),
        ({"epilogue": 15.4}, "15.4 of 6.0 instructions an entry"),
    ],
)
def test_what_the_gate_refuses(changes, problem):
    good = Report(
        name="kernel",
        capability=90,
        registers=128,
        spilled=0,
        shared=100_000,
        products=True,
        tensor_cores=True,
        shape="m64n256k16",
        copies=6,
        epilogue=5.1,
        fast=Fast("m64n256k16", 128 * 256, 6.0),
    )
    assert good.problems() == []
    assert problem in replace(good, **changes).problems()[0]


@needs_triton
@pytest.mark.parametrize("sizes", [(2, 128, 256), (3, 61, 101)], ids=str)
def test_only_forms_the_gate_compiles_are_launched(sizes, force, monkeypatch):
    """Of a kernel's two forms, the one for multiples of 16 gets nothing else."""
    force("triton")
    linear = importlib.import_module("alphaspin_kernels._triton.linear_logprob")
    monkeypatch.setattr(linear, "_chunks", lambda *_, frozen: (256,))
    launched = watch(monkeypatch)
    rows, hidden, vocabulary = sizes
    # Columns before and after those of every matrix: addresses, strides that are not multiples.
    for before, after, full in ((0, 0, False), (0, 0, True), (1, 15, False), (0, 1, True)):

        def matrix(*shape, before=before, after=after):
            return torch.randn(shape[0], before + shape[1] + after)[:, before : before + shape[1]]

        x, weight = matrix(rows, hidden), matrix(vocabulary, hidden)
        targets = torch.arange(rows)
        softcap, bias = (5.0, torch.randn(vocabulary)) if full else (None, None)
        options = {"bias": bias, "softcap": softcap}
        linear_logprob(x, weight, targets, **options)
        buffer = torch.empty(rows)
        previous = matrix(rows, hidden)
        mixture_logprob(x, previous, weight, targets, 0.5, log_normaliser=buffer, **options)
        x.requires_grad_()
        skip = 0.1 if full else 0.0
        linear_logprob(x, weight, targets, skip_below=skip, **options).sum().backward()
        head = weight.clone().requires_grad_()
        linear_logprob(x, head, targets, **options).sum().backward()
        logits = matrix(rows, vocabulary).requires_grad_()
        logits_logprob(logits, targets, softcap=softcap).sum().backward()
        adapters = [(matrix(7, hidden).requires_grad_(), matrix(vocabulary, 7)), None]
        segmented_lora(x, weight, adapters, [rows - 1, 1], 2.0, bias=bias).sum().backward()
    kernels = {name for name, _ in launched}
    assert len(kernels) == 10
    assert launched >= set(product(kernels, [hidden == 128]))


def watch(monkeypatch) -> set[tuple[str, bool]]:
    """The kernels and forms launched from now on; asserts that they fit their arguments."""
    launched: set[tuple[str, bool]] = set()
    for kernel in Kernel.made:
        for even, form in kernel.forms.items():
            replacement = Watched(form, even, kernel.aligned, launched)
            monkeypatch.setitem(kernel.forms, even, replacement)
    return launched


class Watched:
    def __init__(self, form, even: bool, aligned: list[str], launched: set) -> None:
        self.form, self.even, self.aligned, self.launched = form, even, aligned, launched

    def __getitem__(self, grid):
        def launch(*args, **options):
            names = self.form.arg_names
            given = dict(zip(names, args, strict=False)) | options
            self.launched.add((self.form.fn.__name__, self.even))
            assert not self.even or multiples_of_16(*(given[name] for name in self.aligned))
            return self.form[grid](*args, **options)

        return launch
