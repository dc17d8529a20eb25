"""benchmarks/machine.py: its terms by hand, SASS of both kinds of loops, one kernel to the end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from alphaspin_kernels._dispatch import triton_problem

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
pytestmark = pytest.mark.skipif(triton_problem() is not None, reason="needs triton")


def sass(*lines: str) -> str:
    return "\n".join(
        line if line.endswith(":") else f"  /*{16 * at:04x}*/   {line} ;"
        for at, line in enumerate(lines)
    )


NESTED = sass(
    "S2R R0, SR_TID.X",
    ".L_tile:",
    "MOV R1, RZ",
    ".L_step:",
    "@P1 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
    "LDGSTS [R2], [R3]",
    "@!P0 BRA `(.L_step)",
    *["MUFU.EX2 R4, R5"] * 3,
    "@P0 BRA `(.L_tile)",
    "EXIT",
)


def test_loops_are_told_apart() -> None:
    import sass as module

    step, tile, whole = module.divide(*module.read_sass(NESTED))
    assert [text.split()[0] for text in step] == ["HGMMA.64x128x16.F32.BF16", "LDGSTS", "BRA"]
    assert [text.split()[0] for text in tile] == ["MOV", *["MUFU.EX2"] * 3, "BRA"]
    assert not whole
    # One loop with both: what the branch goes round is the tile's.
    flat = [".L_step:", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", "@P0 BRA `(.L_on)"]
    flat += ["FADD R1, R1, R2"] * 70 + [".L_on:", "IADD3 R1, R1, R2, RZ", "@P1 BRA `(.L_step)"]
    step, tile, whole = module.divide(*module.read_sass(sass(*flat, "EXIT")))
    assert whole and len(tile) == 70 and len(step) == 4
    # Without products: the longest loop, less an option that is off.
    plain = [".L_a:", "LDG.E R1, [R2]", "@P0 BRA `(.L_b)", *["MUFU.EX2 R4, R5"] * 70, ".L_b:"]
    plain += ["FADD R1, R1, R2"] * 80 + ["@P1 BRA `(.L_a)", "EXIT"]
    step, tile, _ = module.divide(*module.read_sass(sass(*plain)))
    assert len(step) == 83 and tile == ["EXIT"]


def test_slots_by_hand() -> None:
    import sass as module

    # Three MUFU hold their unit 8 cycles each; 30 additions take a cycle of issue each; a load of
    # 16 bytes a thread is four of 4 cycles.
    assert module.slots(["MUFU.EX2 R1, R2"] * 3) == 24
    assert module.slots(["FADD R1, R1, R2"] * 30 + ["MUFU.EX2 R1, R2"]) == 31
    assert module.slots(["LDS.128 R1, [R2]"]) == 16


def test_a_product_by_hand() -> None:
    import machine
    from sass import Code

    gpu = machine.Gpu(1e15, 1e12, "", sustained=0.5, processors=100, clock=1e9, cache_rate=1e13)
    shapes = ((64, 128, 16),) * 4
    code = Code(254, 131072, 8, 100, 1000, True, shapes)
    assert code.blocks() == 1
    parts, once = machine.Timeline(gpu).product(code, machine.Tiles(128, 128, 64, 10, 3))
    # 2·128·128·64 operations a step at 5e12 a processor, 30 steps; 32 KiB at 1e11 bytes a second.
    assert parts["tensor cores"] == pytest.approx(30 * 2097152 / 5e12)
    assert parts["L2"] == pytest.approx(30 * 32768 / 1e11)
    # Two groups of four warps read (64 + 128)·64·2 bytes each.
    assert parts["shared memory"] == pytest.approx(30 * 2 * 24576 / 128 / 1e9)
    assert parts["instructions"] == pytest.approx(30 * 100 * 8 / 4 / 1e9)
    assert parts["all"] == max(parts.values()) and once["filling"] == 0
    assert once["epilogue"] == pytest.approx(3 * 1000 * 8 / 4 / machine.ISSUE / 1e9)
    # Two blocks a processor: half of the epilogue is behind the other's products.
    shared = Code(100, 90000, 8, 100, 1000, True, shapes)
    assert shared.blocks() == 2
    _, hidden = machine.Timeline(gpu).product(shared, machine.Tiles(128, 128, 64, 10, 3))
    assert hidden["epilogue"] == pytest.approx(once["epilogue"] / 2)


def test_one_operation_to_the_end_and_beside_a_measurement(tmp_path: Path) -> None:
    # In a process of its own: in this one the kernels may have been made for the interpreter.
    shape = {"tokens": 4096, "vocabulary": 128_256}
    program = (
        "import json, sys, machine; from pathlib import Path\n"
        f"machine.RESULTS = Path({str(tmp_path)!r})\n"
        "case = next(c for c in machine.CASES if c[0] == 'logits_logprob forward')\n"
        "machine.write([machine.predict(*case, 'h100')])\n"
        "print(machine.compare([machine.RESULTS / 'measured.json']))\n"
    )
    raw = {"device": "cuda", "dtype": "torch.bfloat16", "shape": shape}
    rows = [{"operation": "logits_logprob forward", "p50": 1e-3}, {"operation": None, "p50": 1.0}]
    content = {"versions": "NVIDIA H100 80GB HBM3, 1 threads", "raw": raw | {"rows": rows}}
    (tmp_path / "measured.json").write_text(json.dumps(content))
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=BENCHMARKS, check=True, capture_output=True, text=True)
    (one,) = json.loads((tmp_path / "kernels.json").read_text())["raw"]
    # 1.05 GB once are .34 ms of memory; the kernel cannot be faster, nor wait for much else.
    assert one["seconds"] > one["floor"] == pytest.approx(1.0507e9 / 3.35e12, rel=1e-3)
    assert one["seconds"] < 3 * one["floor"]
    ratio = f"{1e-3 / one['seconds']:.2f}"
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("| h100 | logits_logprob forward | 1 |") and last.endswith(f"{ratio} |")
