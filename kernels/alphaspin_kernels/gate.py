"""Compile every Triton kernel for GPUs that are not here, and read what the compiler made of it.

    python -m alphaspin_kernels.gate [--capability 80 90 100] [--operator linear_logprob ...]

prints one line per compiled form with its registers, spills, shared memory and tensor-core
instruction, and exits with 1 if one spills, takes more shared memory than the GPU has, or has
products that do not reach the tensor cores. Needs triton and no GPU.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alphaspin_kernels._triton.common import Launch

OPERATORS = (
    "linear_logprob",
    "segmented_lora",
)
# Shared memory one block may have, bytes: CUDA C++ programming guide, "technical specifications per
# compute capability" (163 KB on 8.0, 227 KB on 9.0 and 10.0).
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@dataclass(frozen=True)
class Report:
    """What one form of a kernel became."""

    name: str
    capability: int
    registers: int
    spilled: int  # bytes of local memory per thread
    shared: int  # bytes
    products: bool
    tensor_cores: bool

    def problems(self) -> list[str]:
        """What is wrong with it; empty if nothing."""
        found: list[str] = []
        if self.spilled:
            found.append(f"{self.spilled} bytes of registers per thread spilled")
        if self.shared > SHARED[self.capability]:
            found.append(f"{self.shared} bytes of shared memory of {SHARED[self.capability]}")
        if self.products and not self.tensor_cores:
            found.append(f"no {TENSOR_CORES[self.capability]} in the PTX")
        return found


def forms(operator: str, capability: int) -> list[Launch]:
    """Every form in which the operator's kernels can be launched on a GPU of this capability."""
    return importlib.import_module(f"alphaspin_kernels._triton.{operator}").launches(capability)


def describe(operator: str, index: int, capability: int) -> Report:
    """Compile one form. Raises what the compiler raises."""
    launch = forms(operator, capability)[index]
    arguments: list[str] = launch.kernel.arg_names
    unknown = set(arguments) ^ (set(launch.types) | set(launch.constexprs))
    assert not unknown, f"{launch.kernel.__name__}: arguments {unknown} in one list only"
    signature = {name: launch.types.get(name, "constexpr") for name in arguments}
    attributes: Any = {
        (arguments.index(name),): [["tt.divisibility", 16]] for name in launch.aligned
    }
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, launch.constexprs, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "enable_fp_fusion": True,
        },
    )
    usage = _resource_usage(compiled.asm["cubin"])
    # A product of small blocks is right on any tensor-core instruction that the GPU still has.
    units = {TENSOR_CORES[capability], *launch.constexprs.get("UNITS", ())}
    constants = ", ".join(
        f"{name} {value}" for name, value in launch.constexprs.items() if value is not None
    )
    types = "/".join(sorted({t[1:] for t in launch.types.values() if re.match(r"\*(fp|bf)", t)}))
    ragged = "" if launch.aligned else ", unaligned"
    return Report(
        name=f"{launch.kernel.__name__}[{types}{ragged}: {constants}]",
        capability=capability,
        registers=usage["REG"],
        # Triton keeps no arrays in local memory: what is on the stack was spilled.
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        products=launch.products,
        tensor_cores=any(unit in compiled.asm["ptx"] for unit in units),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def survey(
    operators: list[str], capabilities: list[int], processes: int | None = None
) -> list[Report]:
    """Compile every form of the operators for every capability."""
    jobs = [
        (operator, index, capability)
        for operator, capability in product(operators, capabilities)
        for index in range(len(forms(operator, capability)))
    ]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(describe, *zip(*jobs, strict=True)))


def main() -> None:
    """Print the table; exit with 1 if a form fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--capability", type=int, nargs="+", default=list(SHARED))
    parser.add_argument("--operator", nargs="+", default=list(OPERATORS), choices=OPERATORS)
    parser.add_argument("--processes", type=int)
    arguments = parser.parse_args()
    failed = False
    for report in survey(arguments.operator, arguments.capability, arguments.processes):
        problems = report.problems()
        failed = failed or bool(problems)
        unit = TENSOR_CORES[report.capability] if report.tensor_cores else "-"
        print(
            f"sm_{report.capability} {report.registers:3d} registers {report.shared >> 10:3d} KiB "
            f"{unit:15s} {report.name} {'FAILED: ' + '; '.join(problems) if problems else ''}"
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
