"""Times of the operators on GPUs that are not here, from compiled kernels and launch plans.

    python benchmarks/machine.py                # predicts; writes benchmarks/results/predicted
    python benchmarks/machine.py --measured FILE.json ...   # rows of test_kernels.py beside that

An operator runs on tensors without data, as on the GPU: its products, kernels with their grids and
arguments, PyTorch's operators and waits are recorded in order. Kernels are compiled, in the form
that the gate lists, and their SASS is read (`Code`). Host and GPU then go through the record:

- A product kernel: per step the slowest of tensor cores, L2 reads, operands from shared memory and
  issue slots. Per tile, besides, the epilogue's instructions, and filling the pipeline unless one
  loop has both; hidden only where several blocks share a processor. The last round counts whole.
- cuBLAS: products at the GPU's sustained rate with inputs meanwhile, then the outputs.
- Everything else: bytes, from memory or the L2 cache (the last ones used are there), or its
  instructions.
- The host needs TRITON, ATEN and OPERATOR seconds a call, the GPU LAUNCH seconds a kernel; where
  the operator waits for the GPU, both clocks meet. Time runs as test_kernels.py measures it: from
  the end of a flush of the L2 cache, meanwhile the host is ahead, to the end of the last kernel.

The rates of a GPU stand in `alphaspin.foundation.gpus`, with their sources; throughputs of
instructions are those of the CUDA C++ programming guide ("arithmetic instructions"); 128 bytes a
cycle from shared memory. Not in the model: the order in which tiles meet in the L2 cache, bank
conflicts, latencies of a step that waits for its own product, clusters.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import alphaspin_kernels
import roofline
import torch
import triton
from alphaspin_kernels import OPERATORS, _dispatch
from alphaspin_kernels._triton.common import SIGNATURE, Kernel
from roofline import GPUS, Gpu
from sass import Code, Form, compiled, forms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

RESULTS = Path(__file__).parent / "results" / "predicted"

# Assumptions that no publication was found for; a measurement decides.
ISSUE = 0.8  # share of issue slots that an epilogue of a few warps fills
RESIDENT = 0.6  # share of the L2 cache that keeps what was used last
STREAM = 0.92  # share of the datasheet's bandwidth that copies reach
FILL = 900  # cycles until the first tile of a pipeline is there: a read of memory and barriers
# Host seconds a call, of an operator directly and by torch.library (benchmarks/test_host_time.py).
TRITON, ATEN, OPERATOR, LIBRARY = 25e-6, 5e-6, 30e-6, 250e-6
FLUSHED = 256 << 20  # bytes that test_kernels.py writes before, while the host goes ahead
LAUNCH, WAIT = 3e-6, 10e-6  # seconds between kernels; of a wait of the host, beside waiting


@dataclass
class Event:
    """One call: a kernel of ours, a product of cuBLAS, an operator of PyTorch, or a wait."""

    kind: str
    name: str = ""
    reads: list[Tensor] = field(default_factory=list)
    writes: list[Tensor] = field(default_factory=list)
    operations: float = 0.0
    arguments: dict[str, Any] = field(default_factory=dict)
    grid: int = 0
    form: Form | None = None


class Recorder(TorchDispatchMode):
    """What is called on tensors without data."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "alphaspin":
            self.events.append(Event("library"))
            definition = torch._library.custom_ops.OPDEFS[f"alphaspin::{name}"]
            with self:  # a mode is off in what it calls itself
                return definition._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func.is_view or name in ("empty", "empty_strided", "new_empty", "detach", "empty_like"):
            return result
        leaves = torch.utils._pytree.tree_leaves
        given = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in leaves(result) if isinstance(x, Tensor)]
        if name in ("mm", "addmm"):
            self.product(made[0], *given[-2:])
        elif name in ("index", "embedding"):  # rows of a matrix: as many as are made
            self.events.append(Event("aten", name, made, made))
        else:
            self.events.append(Event("aten", name, given, made))
        return result

    def product(self, out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
        operations = 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
        self.events.append(Event("cublas", "mm", [a, b] + [out] * add, [out], operations))


class Recorded:
    """A form of a kernel: notes the launch instead of making it."""

    def __init__(self, form: Any, recorder: Recorder, capability: int) -> None:
        self.form, self.recorder, self.capability = form, recorder, capability

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*positional: Any, **options: Any) -> None:
            names = self.form.arg_names
            arguments = dict(zip(names, positional, strict=False)) | options
            place = find(self.form, arguments, self.capability)
            tensors = [getattr(x, "base", x) for x in arguments.values()]
            tensors = [x for x in tensors if isinstance(x, Tensor)]
            name = self.form.fn.__name__
            event = Event("triton", name, tensors, [], 0.0, arguments, math.prod(grid), place)
            self.recorder.events.append(event)

        return launch


def find(form: Any, arguments: dict[str, Any], capability: int) -> Form:
    """The form of the gate's list that is launched.

    The gate compiles options once all off and once all on; one that is on there and off here, or
    absent, is taken as here.

    Raises:
        LookupError: none; the gate has not seen it.
    """
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    types = {k: f"*{SIGNATURE[x.dtype]}" for k, x in tensors.items() if x.is_floating_point()}
    for operator in OPERATORS:
        for index, launch in enumerate(forms(operator, capability)):
            if launch.kernel is not form or any(launch.types.get(k) != t for k, t in types.items()):
                continue
            absent = [name for name in launch.types if arguments.get(name) is None]
            given = {name: arguments.get(name) for name in [*launch.constexprs, *absent]}
            if all(value in (given[name], True) for name, value in launch.constexprs.items()):
                return Form(operator, index, tuple(given.items()))
    raise LookupError(f"{form.fn.__name__} is launched in a form that the gate does not list")


@contextmanager
def gpu_without_data(gpu: Gpu) -> Generator[Recorder]:
    """Within, operators on `meta` tensors go the way of this GPU, and are recorded."""
    recorder = Recorder()

    def call(operator: Any, *arguments: Any) -> Any:
        recorder.events.append(Event("operator"))
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if operator._direct and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return operator._direct.apply(*arguments)
        return operator.run(*arguments)

    def rows(targets: Tensor, _: int) -> Tensor:
        recorder.events.append(Event("wait", "active_rows", [targets]))
        return torch.empty(len(targets), dtype=torch.int64, device="meta")

    def multiply_add(c: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
        recorder.product(c, a, b, add)

    replaced = {
        "check_targets": lambda *_: recorder.events.append(Event("wait", "check_targets")),
        "active_rows": rows,
        "selected": lambda rows_R, mask_R: rows(mask_R, 0)[:0],
        "multiply_add": multiply_add,
        "capability_of": lambda _: gpu.capability,
        "processors": lambda _: gpu.processors,
        "_on_gpu": lambda _: True,
    }
    for operator in OPERATORS:
        forms(operator, gpu.capability)  # before their kernels are replaced
    modules = [m for name, m in sys.modules.items() if name.startswith("alphaspin_kernels")]
    kernels = {id(x): x for m in modules for x in vars(m).values() if isinstance(x, Kernel)}
    with ExitStack() as undo:
        undo.enter_context(patch.object(_dispatch, "choose", lambda *_: "triton"))
        undo.enter_context(patch.object(_dispatch.Operator, "__call__", call))
        for module in modules:
            for name, function in replaced.items():
                if hasattr(module, name):
                    undo.enter_context(patch.object(module, name, function))
        for kernel in kernels.values():
            recorded = {k: Recorded(f, recorder, gpu.capability) for k, f in kernel.forms.items()}
            undo.enter_context(patch.object(kernel, "forms", recorded))
        undo.enter_context(recorder)
        yield recorder


def ceil(number: float, by: float) -> int:
    return math.ceil(number / by)


@dataclass(frozen=True)
class Tiles:
    """The products of a launch: tiles of m x n x k a step, and how many steps and tiles."""

    m: int
    n: int
    k: int
    steps: int
    tiles: int  # that the busiest processor has to do
    products: int = 1  # of a step, with other rows


def tiles_of(event: Event, gpu: Gpu) -> Tiles | None:
    """The tiles of a kernel of ours; None where it has no products."""
    given = event.arguments

    def block(axis: str) -> int:
        return given[f"BLOCK_{axis}"]

    match event.name:
        case "_forward_kernel" | "_weights_kernel" | "_mixture_kernel":
            rows, steps = ceil(given["A"], block("R")), ceil(given["H"], block("H"))
            count = rows * ceil(given["V"], block("T"))
            each = ceil(count, event.grid)  # one program after another, or many tiles a program
            busiest = each * ceil(event.grid, gpu.processors)
            products = 2 if "mixture" in event.name else 1
            return Tiles(block("R"), block("T"), block("H"), steps, busiest, products)
        case "_target_kernel":
            sizes, steps = (block("R"), block("T"), block("H")), ceil(given["H"], block("H"))
        case "_linear_kernel":
            steps = ceil(given["inputs"], block("K")) + ceil(given["width"], block("J"))
            sizes = (block("R"), block("C"), block("K"))
        case "_low_kernel":
            sizes, steps = (block("R"), block("J"), block("K")), ceil(given["inputs"], block("K"))
        case "_update_kernel":
            sizes, steps = (block("R"), block("K"), block("J")), ceil(given["rank"], block("J"))
        case _:
            return None
    return Tiles(*sizes, steps, ceil(event.grid, gpu.processors))


class Timeline:
    """The clocks of host and GPU, and what the GPU's seconds were spent on."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.ahead = FLUSHED / (STREAM * gpu.bandwidth)
        self.host, self.device = 0.0, self.ahead
        self.spent: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.cached: dict[Any, float] = {}  # bytes by place, the last used last

    def run(self, events: list[Event]) -> "Timeline":
        for event in events:
            if event.kind in ("operator", "library"):
                self.host += OPERATOR if event.kind == "operator" else LIBRARY
                continue
            self.host += TRITON if event.kind == "triton" else ATEN
            if event.kind == "wait":
                self.host = max(self.host, self.device) + WAIT
                continue
            start = max(self.host, self.device)
            self.spent["host"] += start - self.device
            self.spent["launches"] += LAUNCH
            seconds = self.seconds(event)
            self.spent.update(seconds)
            self.launches[event.kind] += 1
            self.device = start + LAUNCH + sum(seconds.values())
        return self

    def moved(self, tensors: list[Tensor]) -> float:
        """Seconds that these take, from memory or the cache, which then has them."""
        slow = fast = 0.0
        for x in tensors:
            storage, size = x.untyped_storage()._cdata, float(x.numel() * x.element_size())
            place = (storage, x.storage_offset(), size)
            if self.cached.pop(place, None) is not None:
                fast += size
            else:
                slow += size
            if size <= RESIDENT * self.gpu.cache:
                self.cached[place] = size
        while sum(self.cached.values()) > RESIDENT * self.gpu.cache:
            self.cached.pop(next(iter(self.cached)))
        return slow / (STREAM * self.gpu.bandwidth) + fast / self.gpu.cache_rate

    def seconds(self, event: Event) -> dict[str, float]:
        """What a kernel takes, by what it waits for."""
        if event.kind == "cublas":
            product = event.operations / (self.gpu.rate * self.gpu.sustained)
            inputs = self.moved(event.reads)
            name = "tensor cores" if product > inputs else "memory"
            return {name: max(product, inputs), "outputs of products": self.moved(event.writes)}
        if event.kind == "aten":
            return {"memory": self.moved([*event.reads, *event.writes])}
        assert event.form
        code = compiled(event.form, self.gpu.capability)
        tiles = tiles_of(event, self.gpu)
        reads = [x for x in event.reads if x is not event.arguments.get("means")]
        memory = self.moved(reads)
        if tiles is None:
            trips = 1
            if event.name == "forward":  # of logits_logprob: a row's tiles one after another
                trips = ceil(event.arguments["vocabulary"], event.arguments["TILE"])
            warps = ceil(event.grid, self.gpu.processors) * code.warps
            issue = warps * (trips * code.step + code.tile) / 4 / ISSUE / self.gpu.clock
            return {"memory" if memory > issue else "instructions": max(memory, issue)}
        step, tile = self.product(code, tiles)
        if memory > step["all"] + sum(tile.values()):
            return {"memory": memory}
        longest = max((k for k in step if k != "all"), key=lambda k: step[k])
        return {longest: step["all"]} | tile

    def product(self, code: Code, tiles: Tiles) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of the steps, by part and all, and of what is done once a tile."""
        gpu, count = self.gpu, tiles.tiles
        m, n, k = tiles.m * tiles.products, tiles.n, tiles.k
        operations = 2.0 * m * n * k
        if code.shapes:  # every group of four warps reads both its operands
            groups = operations / sum(2 * a * b * c for a, b, c in code.shapes)
            operands = groups * sum(2 * c * (a + b) for a, b, c in code.shapes)
        else:
            operands = 2.0 * k * (m + n)
        steps = count * tiles.steps
        parts = {
            "tensor cores": steps * operations * gpu.processors / (gpu.rate * gpu.sustained),
            "L2": steps * 2.0 * k * (m + n) * gpu.processors / gpu.cache_rate,
            "shared memory": steps * operands / 128 / gpu.clock,
            "instructions": steps * code.step * code.warps / 4 / gpu.clock,
        }
        # Filling: the first tile's way, its bytes, and the last product before the epilogue.
        first = 2.0 * k * (m + n) * gpu.processors / gpu.cache_rate
        fill = 0.0 if code.whole else FILL / gpu.clock + first
        epilogue = code.tile * code.warps / 4 / ISSUE / gpu.clock
        parts["all"] = max(parts.values())
        once = {"epilogue": count * epilogue, "filling": count * fill}
        if (blocks := code.blocks()) > 1:  # the others' products go on meanwhile
            hidden = min(parts["all"] * (1 - 1 / blocks), sum(once.values()) * (1 - 1 / blocks))
            share = 1 - hidden / sum(once.values())
            once = {name: share * value for name, value in once.items()}
        return parts, once


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def backward(output: Tensor, *leaves: Tensor, rows: int | None = None) -> None:
    torch.autograd.grad(output[:rows], leaves, torch.empty_like(output[:rows]))


def head(n: int, h: int, v: int, both: bool, **options: Any) -> None:
    x, targets = meta(n, h, grad=both), meta(n, dtype=torch.int64)
    logp = alphaspin_kernels.linear_logprob(x, meta(v, h), targets, **options)
    if both:
        backward(logp, x)


def mixture(n: int, h: int, v: int) -> None:
    normaliser = meta(n, dtype=torch.float32)
    rows, targets = (meta(n, h), meta(n, h)), meta(n, dtype=torch.int64)
    alphaspin_kernels.mixture_logprob(*rows, meta(v, h), targets, 0.9, log_normaliser=normaliser)


def logits(n: int, v: int, both: bool) -> None:
    z = meta(n, v, grad=both)
    logp = alphaspin_kernels.logits_logprob(z, meta(n, dtype=torch.int64))
    if both:
        backward(logp, z)


def lora(n: int, i: int, o: int, r: int, both: bool) -> None:
    """Three segments: a trained adapter, another, none."""
    x, third = meta(n, i, grad=both), n // 3
    adapters = [[meta(r, i, dtype=torch.float32), meta(o, r, dtype=torch.float32)] for _ in "12"]
    trained = [one.requires_grad_(both) for one in adapters[0]]
    near = [(meta(r, i), meta(o, r)) for _ in adapters]
    y = alphaspin_kernels.segmented_lora(
        x, meta(o, i), [trained, adapters[1], None], [third] * 3, 2.0, rounded=[*near, None]
    )
    if both:
        backward(y, x, *trained, rows=third)


FLAT = {"tokens": 4096, "vocabulary": 128_256}
HEAD = {"tokens": 4096, "hidden": 4096, "vocabulary": 128_256}
LORA = {"tokens": 3 * 4096, "wide_in": 4096, "wide_out": 4096, "rank": 16}
GEMMA = {"tokens": 8192, "hidden": 2304, "vocabulary": 256_000}
CASES: list[tuple[str, dict[str, int], Callable[..., None]]] = [
    ("linear_logprob forward", HEAD, lambda *x: head(*x, False)),
    ("linear_logprob forward + backward", HEAD, lambda *x: head(*x, True)),
    ("linear_logprob forward, softcap", GEMMA, lambda *x: head(*x, False, softcap=30.0)),
    ("mixture_logprob", HEAD, mixture),
    ("logits_logprob forward", FLAT, lambda *x: logits(*x, False)),
    ("logits_logprob forward + backward", FLAT, lambda *x: logits(*x, True)),
    ("segmented_lora forward", LORA, lambda *x: lora(*x, False)),
    ("segmented_lora forward + backward", LORA, lambda *x: lora(*x, True)),
]


def predict(
    name: str, shape: dict[str, int], call: Callable[..., None], gpu: str
) -> dict[str, Any]:
    """The predicted seconds of one operation on one GPU, and where they go."""
    chosen, work = GPUS[gpu], roofline.work_of(name, shape)
    assert work is not None, name
    with gpu_without_data(chosen) as recorder:
        call(*shape.values())
    line = Timeline(chosen).run(recorder.events)
    products = 2 if name == "mixture_logprob" else 1  # two, where the normaliser is wanted
    floor = products * work.floor(chosen)
    return {
        "gpu": gpu,
        "operation": name,
        "shape": shape,
        "seconds": line.device - line.ahead,
        "floor": floor,
        "bound": max(line.spent, key=lambda part: line.spent[part]),
        "parts": {part: value for part, value in line.spent.items() if value},
        "launches": sum(line.launches.values()),
    }


def table(rows: list[list[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    )


def write(found: list[dict[str, Any]]) -> str:
    """The predictions as a page and as numbers, with what made them."""
    versions = (
        f"python benchmarks/machine.py; no GPU; Python {sys.version.split()[0]}, torch "
        f"{torch.__version__}, triton {triton.__version__}; {datetime.now(UTC).date().isoformat()}"
    )
    rows = [
        ["GPU", "operation", "predicted ms", "floor ms", "×", "bound by", "ms by part", "launches"]
    ]
    for one in found:
        parts = sorted(one["parts"].items(), key=lambda part: -part[1])
        rows.append(
            [
                one["gpu"],
                f"{one['operation']}, {' × '.join(f'{size:,}' for size in one['shape'].values())}",
                f"**{1e3 * one['seconds']:.3g}**",
                f"{1e3 * one['floor']:.3g}",
                f"{one['seconds'] / one['floor']:.2f}",
                one["bound"],
                ", ".join(f"{name} {1e3 * value:.3g}" for name, value in parts if value >= 5e-6),
                str(one["launches"]),
            ]
        )
    text = (
        f"# Predicted times\n\n{versions}\n\nbf16. Nothing here was measured. Terms, rates and "
        "their sources: `benchmarks/machine.py`, `alphaspin/foundation/gpus.py`. Shapes: tokens × "
        "hidden × vocabulary; tokens × in × out × rank. Floor: products at the datasheet's rate, "
        "or bytes.\n\n"
        f"{table(rows)}\n"
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "kernels.md").write_text(text, encoding="utf-8")
    raw = {"versions": versions, "raw": found}
    (RESULTS / "kernels.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    return text


def compare(files: list[Path]) -> str:
    """Rows of test_kernels.py beside what was predicted for the same GPU and shape."""
    predicted = json.loads((RESULTS / "kernels.json").read_text(encoding="utf-8"))
    rows = [["GPU", "operation", "measured ms", "predicted ms", "measured / predicted"]]
    for path in files:
        content = json.loads(path.read_text(encoding="utf-8"))
        raw = content["raw"]
        if not isinstance(raw, dict) or raw.get("dtype") != "torch.bfloat16":
            continue
        device = content["versions"].split(",")[0]
        gpu = next((name for name in GPUS if name in device.lower()), device)
        for row in raw["rows"]:
            if raw["device"] != "cuda" or not row["operation"] or not row["p50"]:
                continue
            same = {"gpu": gpu, "operation": row["operation"], "shape": raw["shape"]}
            found = [one["seconds"] for one in predicted["raw"] if same.items() <= one.items()]
            beside = [f"{1e3 * one:.3g} | {row['p50'] / one:.2f}" for one in found] or ["none | "]
            rows.append([gpu, row["operation"], f"{1e3 * row['p50']:.3g}", *beside])
    return f"Predicted by {predicted['versions']}\n\n{table(rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--gpu", choices=GPUS, nargs="+", default=["h100", "h200", "b200"])
    parser.add_argument("--measured", type=Path, nargs="+", metavar="FILE.json")
    options = parser.parse_args()
    if options.measured:
        print(compare(options.measured))
    else:
        print(write([predict(*case, gpu) for gpu in options.gpu for case in CASES]))


if __name__ == "__main__":
    main()
