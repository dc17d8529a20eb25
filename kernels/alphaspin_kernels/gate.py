"""Compile every Triton kernel for GPUs that are not here, and read what the compiler made of it.

    python -m alphaspin_kernels.gate [--capability 80 90 100] [--operator linear_logprob ...]

prints one line per compiled form with its registers, shared memory and tensor-core instruction,
and exits with 1 if one spills, takes more shared memory than the GPU has, or has products that do
not reach the tensor cores or wait for each other there. Of a form that says what makes it fast it
prints and asserts that too: copies by the copy engine (TMA), the shape of the tensor cores'
instruction, and the fp32 instructions of an entry of a tile besides. Needs triton and no GPU.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alphaspin_kernels import OPERATORS
from alphaspin_kernels._triton.common import Fast, Launch

# Shared memory one block may have, bytes: CUDA C++ programming guide, "technical specifications per
# compute capability" (163 KB on 8.0, 227 KB on 9.0 and 10.0).
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Of fp32 numbers: what an epilogue is made of.
ARITHMETIC = ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "MUFU")

BOUND_BY_MEMORY = ("_low_kernel",)
"""Products may wait for each other: x passes through registers, where dropout sets its zeros, and
reading it takes longer than multiplying it with so few columns."""


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
    serialised: bool = False  # each wgmma waits for the one before
    shape: str = ""  # m, n and k of the wgmma
    copies: int = 0  # by the copy engine, in the SASS
    epilogue: float = 0.0  # fp32 instructions an entry, of which `fast` says how many there are
    fast: Fast | None = None

    def problems(self) -> list[str]:
        """What is wrong with it; empty if nothing."""
        found: list[str] = []
        if self.spilled:
            found.append(f"{self.spilled} bytes of registers per thread spilled")
        if self.shared > SHARED[self.capability]:
            found.append(f"{self.shared} bytes of shared memory of {SHARED[self.capability]}")
        if self.products and not self.tensor_cores:
            found.append(f"no {TENSOR_CORES[self.capability]} in the PTX")
        if self.serialised and not self.name.startswith(BOUND_BY_MEMORY):
            found.append("each wgmma waits for the one before")
        if self.fast:
            if not self.copies:
                found.append("no UTMALDG in the SASS: threads copy the tiles")
            if self.fast.shape not in self.shape:
                found.append(f"{self.shape} instead of {self.fast.shape}")
            if self.epilogue > self.fast.epilogue:
                found.append(f"{self.epilogue:.1f} of {self.fast.epilogue} instructions an entry")
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
    usage, sass = _disassembled(compiled.asm["cubin"])
    count = Counter(
        re.findall(r"^\s*(?:/\*\w+\*/)?\s*(?:@!?U?P\d\s+)?([A-Z]\w*)", sass, re.MULTILINE)
    )
    # The last of a group carries a barrier; all do where ptxas could not keep them in flight.
    groups = re.findall(r"HGMMA.*?(gsb0)?\s*;", sass)
    fast, threads = launch.fast, 32 * launch.num_warps
    constants = ", ".join(
        f"{name} {value}" for name, value in launch.constexprs.items() if value is not None
    )
    types = "/".join(
        sorted(set(re.findall(r"(?:\*|<)([fb][pf]\d+)", " ".join(launch.types.values()))))
    )
    ragged = "" if launch.aligned or launch.constexprs.get("TMA") else ", unaligned"
    return Report(
        name=f"{launch.kernel.__name__}[{types}{ragged}: {constants}]",
        capability=capability,
        registers=usage["REG"],
        # Triton keeps no arrays in local memory: what is on the stack was spilled.
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        products=launch.products,
        tensor_cores=TENSOR_CORES[capability] in compiled.asm["ptx"],
        serialised=len(groups) > 1 and all(groups),
        shape="/".join(sorted(set(re.findall(r"wgmma\S+\.(m\d+n\d+k\d+)", compiled.asm["ptx"])))),
        copies=count["UTMALDG"],
        epilogue=sum(count[name] for name in ARITHMETIC) * threads / fast.elements if fast else 0.0,
        fast=fast,
    )


def _disassembled(cubin: bytes) -> tuple[dict[str, int], str]:
    """Registers and bytes of local memory, and the SASS."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used, sass = (
            subprocess.run(
                [tools / tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = re.findall(r"(REG|STACK|LOCAL):(\d+)", used)
    return {name: int(value) for name, value in found}, sass


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
        fast = f" {report.copies} TMA, {report.epilogue:.1f} an entry" if report.fast else ""
        print(
            f"sm_{report.capability} {report.registers:3d} registers {report.shared >> 10:3d} KiB "
            f"{unit:15s} {report.shape}{fast} {report.name} "
            f"{'FAILED: ' + '; '.join(problems) if problems else ''}"
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
