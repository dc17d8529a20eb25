"""What the compiler made of a kernel: its SASS, a step of its products and the rest."""

import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from alphaspin_kernels import gate
from alphaspin_kernels._triton.common import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED, REGISTERS, THREADS = 228 << 10, 65536, 2048  # of a processor, 8.0 to 10.0

# Cycles that a warp's instruction holds a unit of its quarter of a processor.
UNITS = {
    "fma": (1, "FFMA FADD FMUL HFMA2 HADD2 HMUL2"),
    "alu": (
        2,
        "FMNMX FMNMX3 FSEL FSETP FSET ISETP SEL LOP3 SHF SHL SHR IADD3 IADD VIADD LEA PRMT IMAD "
        "MOV VIMNMX IMNMX PLOP3 F2FP P2R R2P SGXT IABS POPC FCHK",
    ),
    "special": (8, "MUFU F2F F2I I2F I2FP FRND"),
    "memory": (4, "LDS STS LDG STG LDSM STSM SHFL LDGSTS LDC ATOMS LDTM STTM"),
}
UNIT = {name: (unit, cycles) for unit, (cycles, names) in UNITS.items() for name in names.split()}
PRODUCT = re.compile(r"^(HGMMA|HMMA|UTCHMMA|UTCQMMA)")
SKIPPED = 64  # a branch of a loop over at least so many instructions goes round the epilogue


def slots(instructions: list[str]) -> float:
    """Cycles of a quarter of a processor for one warp: the slowest unit, or a cycle each."""
    busy: Counter[str] = Counter()
    for text in instructions:
        name = text.split(".")[0].split()[0]
        unit, cycles = UNIT.get(name, ("issue", 1))
        if unit == "memory":
            cycles *= 4 if ".128" in text else 2 if ".64" in text else 1
        busy[unit] += cycles
    return max([len(instructions), *busy.values()])


@dataclass(frozen=True)
class Form:
    """A form that the gate lists, with what is constant in this launch."""

    operator: str
    index: int
    constants: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Code:
    """What the compiler made of a form of a kernel.

    Attributes:
        step: cycles a warp for one step of the product loop, without the product.
        tile: cycles a warp for what is done once a tile, or a program.
        whole: whether tile and step are one loop, so that copies run during the epilogue.
        shapes: (m, n, k) of each warp-group product of a step, on 9.0.
    """

    registers: int
    shared: int
    warps: int
    step: float
    tile: float
    whole: bool
    shapes: tuple[tuple[int, int, int], ...]

    def blocks(self) -> int:
        """Programs that share a processor."""
        threads = 32 * self.warps
        registers = REGISTERS // (threads * 8 * math.ceil(self.registers / 8))
        return max(1, min(registers, SHARED // (self.shared + 1024), THREADS // threads))


def read_sass(text: str) -> tuple[list[str], dict[str, int]]:
    """Instructions without their predicates, and the place of each label."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*)", line):
            code.append(found[1].strip())
    return code, labels


def divide(code: list[str], labels: dict[str, int]) -> tuple[list[str], list[str], bool]:
    """The instructions of a step, those of a tile or program, and whether one loop has both.

    The step is the innermost loop with most products, or, without any, the longest loop. What a
    branch in it goes round is the tile's, and so is the smallest loop around, or all of the
    program. Without products, what a branch goes round is an option that is off, unless it is most
    of the code. Paths for operands without columns, which come last, are counted with the tile.
    """
    jumps = [
        (at, labels[target[0]])
        for at, text in enumerate(code)
        if text.startswith("BRA") and (target := re.search(r"\.L_\w+", text))
    ]
    loops = [(start, at + 1) for at, start in jumps if start < at]
    products = [at for at, text in enumerate(code) if PRODUCT.match(text)]
    if not products:
        first, last = max(loops, key=lambda one: one[1] - one[0], default=(0, 0))
        off = {
            place
            for at, target in jumps
            if SKIPPED <= target - at <= len(code) / 2
            for place in range(at + 1, target)
        }
        step = [code[at] for at in range(first, last) if at not in off]
        rest = [code[at] for at in (*range(first), *range(last, len(code))) if at not in off]
        return step, rest, False
    inner = [one for one in loops if any(one[0] <= at < one[1] for at in products)]
    for outer in [*inner]:
        if any(outer[0] <= one[0] and one[1] <= outer[1] for one in inner if one != outer):
            inner.remove(outer)
    first, last = max(inner, key=lambda one: sum(one[0] <= at < one[1] for at in products))
    aside: set[int] = set()
    for at, target in jumps:
        region = range(at + 1, target)
        if first <= at < target <= last and len(region) >= SKIPPED:
            aside |= set() if any(place in region for place in products) else set(region)
    step = [code[at] for at in range(first, last) if at not in aside]
    if aside:
        return step, [code[at] for at in sorted(aside)], True
    around = [one for one in loops if one[0] < first and one[1] >= last]
    start, end = min(around, key=lambda one: one[1] - one[0], default=(0, len(code)))
    return step, code[start:first] + code[last:end], False


@cache
def compiled(form: Form, capability: int) -> Code:
    """Compile a form, and read it."""
    launch = forms(form.operator, capability)[form.index]
    names: list[str] = launch.kernel.arg_names
    constants = dict(form.constants)
    made = triton.compile(
        ASTSource(
            launch.kernel,
            {name: "constexpr" if name in constants else launch.types[name] for name in names},
            constants,
            {
                (names.index(name),): [["tt.divisibility", 16]]
                for name in launch.aligned
                if name not in constants
            },
        ),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "enable_fp_fusion": True,
        },
    )
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def tool(name: str, *options: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            command = [str(tools / name), *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = re.search(r"REG:(\d+)", tool("cuobjdump", "-res-usage"))
    assert usage
    step, tile, whole = divide(*read_sass(tool("nvdisasm", "-c")))
    found = [re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", text) for text in step]
    shapes = tuple((int(m[1]), int(m[2]), int(m[3])) for m in found if m)
    warps = made.metadata.num_warps
    return Code(int(usage[1]), made.metadata.shared, warps, slots(step), slots(tile), whole, shapes)


@cache
def forms(operator: str, capability: int) -> list[Launch]:
    """The gate's list, read once: before its kernels may be replaced."""
    return gate.forms(operator, capability)
