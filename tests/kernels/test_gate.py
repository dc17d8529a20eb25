"""Every form of every Triton kernel, compiled for GPUs that are not here."""

import subprocess
import sys
from dataclasses import replace

import pytest
from alphaspin_kernels import OPERATORS
from alphaspin_kernels.gate import SHARED, Report
from implementations import needs_triton


@needs_triton
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("operator", OPERATORS)
def test_no_spills_shared_memory_in_limits_and_tensor_cores(operator, capability):
    # In a process of its own: in this one the kernels were made for the interpreter.
    command = [sys.executable, "-m", "alphaspin_kernels.gate", "--processes", "1"]
    command += ["--operator", operator, "--capability", str(capability)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(f"sm_{capability} ") >= 2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"spilled": 8}, "8 bytes of registers"),
        ({"shared": 300_000}, "300000 bytes of shared memory of 232448"),
        ({"tensor_cores": False}, "no wgmma.mma_async in the PTX"),
    ],
)
def test_what_the_gate_refuses(changes, problem):
    good = Report("kernel", 90, 128, 0, 100_000, products=True, tensor_cores=True)
    assert good.problems() == []
    assert problem in replace(good, **changes).problems()[0]
