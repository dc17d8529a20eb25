"""Time variants of one computation against each other, check them, and write down the result."""

import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from alphaspin_kernels.segmented_lora import multiplies_natively
from torch import Tensor

ROOT = Path(__file__).parents[1]
FIRST_COUNTS = 5.0  # seconds: a first call this long needs no warm-up, and is not made twice
MEMORY_UP_TO = 15.0  # seconds: slower variants are not run once more for their memory, on the CPU
LEFT_OUT_FROM = 90.0  # seconds that a variant would take at the rate of the first one
Result = tuple[Tensor, Tensor | None] | None  # values and gradient; None: nothing to check


@dataclass
class Variant:
    """One way to compute the result. Ours must be right; another's row says where it is not."""

    run: Callable[[], Any]
    operation: str | None = None  # the name in roofline.py, for ours
    flops: float = 0.0
    moved: float = 0.0  # bytes
    compiles: bool = False  # the first call is the compiler's


@dataclass
class Row:
    """What was measured of one variant, in seconds and bytes."""

    variant: Variant
    samples: list[float] = field(default_factory=list)
    memory: int | None = None
    error: float | None = None  # of values, absolute
    gradient_error: float | None = None  # ‖g - ref‖ / ‖ref‖
    failure: str | None = None

    def quantile(self, share: float) -> float:
        ordered = sorted(self.samples)
        at = share * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return statistics.median(self.samples) if self.samples else float("nan")


@dataclass
class Goal:
    """A bound on a measured number."""

    measure: str
    value: float
    limit: float
    unit: str = ""
    at_least: bool = False

    def row(self) -> list[str]:
        met = self.value >= self.limit if self.at_least else self.value <= self.limit
        sign = "≥" if self.at_least else "≤"
        limit = f"{sign} {self.limit:.3g}{self.unit}"
        if math.isnan(self.value):
            return [self.measure, limit, "not measured", ""]
        found = f"{self.value:.3g}{self.unit}"
        return [self.measure, limit, found, "met" if met else "**missed**"]


@dataclass
class Case:
    """Variants on the same inputs, what their results should be, and what to reach."""

    name: str
    device: str
    dtype: torch.dtype
    shape: dict[str, int]
    variants: dict[str, Variant]
    reference: Callable[[], tuple[Callable[[Tensor], Tensor], Tensor, Tensor | None]]
    # Of our values (absolute) and gradient (relative).
    tolerance: Callable[[], tuple[float, float]]
    goals: Callable[[dict[str, Row]], list[Goal]] = lambda _: []
    absent: dict[str, str] = field(default_factory=dict)  # peers that do not import, and why


def measure(case: Case, rounds: int, budget: float) -> dict[str, Row]:
    """Run the variants in turn until each has had `rounds` calls or `budget` seconds.

    The first call of each is checked, and only counted where it is a long one. Another's variant
    that would take LEFT_OUT_FROM seconds, at the rate of the first variant, is not run.

    Raises:
        AssertionError: one of ours is wrong.
    """
    select, expected, expected_gradient = case.reference()
    tolerance = case.tolerance()
    if case.device == "cuda":
        _flush()  # before any memory is counted
    rows = {label: Row(variant) for label, variant in case.variants.items()}
    spent = dict.fromkeys(rows, 0.0)
    rate = 0.0  # of the first variant
    for label, row in rows.items():
        foreseen = row.variant.flops / rate if rate else 0.0
        if foreseen > LEFT_OUT_FROM and row.variant.operation is None:
            row.failure = f"left out: some {foreseen:.0f} s a call"
            continue
        try:
            spent[label], result = _timed(row.variant.run, case.device)
            if case.device == "cuda":  # compiled by now: a second call shows what it takes
                del result
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                _, result = _timed(row.variant.run, case.device)
                row.memory = torch.cuda.max_memory_allocated() - before
        except Exception as error:
            if row.variant.operation:
                raise
            row.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            continue
        rate = rate or row.variant.flops / spent[label]
        if result is not None:
            row.error = _largest(select(result[0]).double() - expected)
            if result[1] is not None and expected_gradient is not None:
                off = select(result[1]).double() - expected_gradient
                row.gradient_error = float(off.norm() / expected_gradient.norm())
        # Others may round logits to 16 bits, but must compute the same function.
        loose = (max(0.5, 4 * tolerance[0]), 0.1)
        value_limit, gradient_limit = tolerance if row.variant.operation else loose
        # Written so that NaN fails.
        if not ((row.error or 0) <= value_limit and (row.gradient_error or 0) <= gradient_limit):
            row.failure = f"wrong: error {row.error}, of the gradient {row.gradient_error}"
            assert not row.variant.operation, f"{case.name}, {label}: {row.failure}"
        if spent[label] >= FIRST_COUNTS and not row.variant.compiles:
            row.samples.append(spent[label])
        else:
            spent[label] = 0.0
        del result
    for _ in range(rounds):
        for label, row in rows.items():
            if row.failure is None and (spent[label] < budget or not row.samples):
                seconds, _ = _timed(row.variant.run, case.device)
                row.samples.append(seconds)
                spent[label] += seconds
    return rows


def llama(vocabulary: int, hidden: int, layers: int, end: int | None) -> Any:
    """A random Llama with a tied head, and this end token."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    return model.bfloat16() if torch.cuda.is_available() else model


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    if device != "cuda":
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result
    _flush().zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    result = run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, result


@functools.cache
def _flush() -> Tensor:
    """256 MiB: writing them leaves nothing of the inputs in the L2 cache."""
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def measure_cpu_memory(rows: dict[str, Row], arguments: list[str]) -> None:
    """Peak resident memory of a fresh process that runs the variant, less that of its inputs."""
    for label, row in rows.items():
        if row.samples and row.median < MEMORY_UP_TO:
            command = [sys.executable, __file__, *arguments, label]
            folders = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
            environment = os.environ | {"PYTHONPATH": ":".join(folders)}
            printed = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            ).stdout
            row.memory = int(printed.split()[-1]) << 10


def growth(warm_up: Callable[[], Any], run: Callable[[], Any]) -> int:
    """KiB by which the largest resident set in `run` exceeds what was resident before.

    Not ru_maxrss: a process inherits that of the one that started it, which holds the inputs too.
    """
    warm_up()  # loads libraries, starts threads
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


HEADER = [
    "variant",
    "p50 ms",
    "p20",
    "p80",
    "n",
    "× first",
    "rate",
    "extra MiB",
    "error",
    "∇ error",
]


def cells(rows: dict[str, Row]) -> list[list[str]]:
    first = next((row.median for row in rows.values() if row.samples), float("nan"))
    table: list[list[str]] = []
    for label, row in rows.items():
        if row.failure is not None:
            table.append([label, row.failure, *[""] * (len(HEADER) - 2)])
            continue
        rate = f"{row.variant.moved / row.median / 1e9:.1f} GB/s" if row.variant.moved else ""
        if row.variant.flops:
            rate = f"{row.variant.flops / row.median / 1e12:.3g} TFLOP/s"
        shown = (f"{1e3 * row.quantile(share):.4g}" for share in (0.5, 0.2, 0.8))
        memory = "" if row.memory is None else f"{row.memory / 2**20:.0f}"
        errors = ("" if e is None else f"{e:.1e}" for e in (row.error, row.gradient_error))
        name = f"**{label}**" if row.variant.operation else label
        ratio = f"{row.median / first:.2f}"
        table.append([name, *shown, str(len(row.samples)), ratio, rate, memory, *errors])
    return table


def finish(case: Case, rows: dict[str, Row], record: Callable[..., Path]) -> None:
    """Write the table, the numbers and a plot."""
    goals = case.goals(rows)
    shape = ", ".join(f"{name} {size:,}" for name, size in case.shape.items())
    text = f"{case.dtype}, {shape}. Bold: ours; seconds of one call, inputs in place."
    text += " Error: largest absolute one against float64; ∇: ‖g - ref‖ / ‖ref‖."
    if case.device == "cpu":
        text += f" {_load()}"
        if not multiplies_natively(torch.empty(0, dtype=case.dtype)):
            text += f" This processor has no {case.dtype} units: such products are emulated."
    for label, reason in case.absent.items():
        text += f"\n\nNot measured: {label} ({reason})."
    if goals:
        lines = [["measure", "goal", "measured", ""], ["---"] * 4, *(goal.row() for goal in goals)]
        text += "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
    raw = {
        "case": case.name,
        "device": case.device,
        "dtype": str(case.dtype),
        "shape": case.shape,
        "absent": case.absent,
        "rows": [
            {
                "variant": label,
                "operation": row.variant.operation,
                "seconds": row.samples,
                "p50": row.median if row.samples else None,
                "memory": row.memory,
                "error": row.error,
                "gradient_error": row.gradient_error,
                "failure": row.failure,
            }
            for label, row in rows.items()
        ],
        "goals": [goal.row() for goal in goals],
    }
    path = record(case.name, HEADER, cells(rows), text, raw)
    _plot(case, rows, path.with_suffix(".svg"))
    print("\n" + path.read_text(encoding="utf-8"))


def _load() -> str:
    one, *_ = os.getloadavg()
    return f"Load average when it ended: {one:.1f} on {os.cpu_count()} processors."


def _plot(case: Case, rows: dict[str, Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "alphaspin"  # the same bytes for the same numbers
    from matplotlib import pyplot

    shown = {label: row for label, row in rows.items() if row.samples}
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.35 * len(shown)), layout="constrained")
    middle = [1e3 * row.median for row in shown.values()]
    spread = [
        [1e3 * (row.median - row.quantile(0.2)) for row in shown.values()],
        [1e3 * (row.quantile(0.8) - row.median) for row in shown.values()],
    ]
    colours = ["C1" if row.variant.operation else "C7" for row in shown.values()]
    axes.barh(list(shown), middle, xerr=spread, color=colours)
    axes.invert_yaxis()
    axes.set_xlabel("ms, median and 20th to 80th percentile; orange: ours")
    axes.set_title(case.name)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def read(folder: Path) -> list[dict[str, Any]]:
    """The raw numbers of every kernel case under a folder."""
    found = [json.loads(path.read_text())["raw"] for path in sorted(folder.rglob("kernel-*.json"))]
    return [raw for raw in found if isinstance(raw, dict)]


if __name__ == "__main__":
    # NAME VARIANT: peak memory of one variant of one case, in KiB.
    import test_kernels

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    name, label = sys.argv[1:]
    small = test_kernels.CASES[name]("cpu", small=True)
    case = test_kernels.CASES[name]("cpu", small=False)
    print(growth(small.variants[label].run, case.variants[label].run))
