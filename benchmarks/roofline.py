"""Least work and floor time of each operation of one preference step, for a GPU and a model.

    python benchmarks/roofline.py --gpu h100 --hidden 4096 --vocabulary 128256 --tokens 4096
    python benchmarks/roofline.py --gpu h200 --model FOLDER --measured benchmarks/results/*/*.json

Operations are those of the matrix products; bytes count each input and each output once, at two
bytes a number. The floor is max(operations / rate, bytes / bandwidth). Nothing runs faster.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphaspin.foundation.gpus import GPUS, Gpu


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes."""

    operations: float
    moved: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.moved + other.moved)

    def floor(self, gpu: Gpu) -> float:
        """Seconds."""
        return max(self.operations / gpu.rate, self.moved / gpu.bandwidth)


def head(tokens: int, hidden: int, vocabulary: int, products: int = 1, states: int = 1) -> Work:
    """linear_logprob: hidden states and head in, log-probs out; a second product adds d hidden."""
    rows = states + (products - 1)
    moved = 2 * (rows * tokens * hidden + vocabulary * hidden) + 12 * tokens  # target 8, lp 4
    return Work(2 * products * tokens * vocabulary * hidden, moved)


def logits(tokens: int, vocabulary: int, backward: bool = False) -> Work:
    """logits_logprob: logits in, log-probs out; backward: logits in, d logits out."""
    return Work(0, 2 * tokens * vocabulary * (3 if backward else 1) + 12 * tokens)


def lora(tokens: int, wide_in: int, wide_out: int, rank: int, adapted: int | None = None) -> Work:
    """One linear, forward, with the low-rank update on `adapted` of the rows (default: all)."""
    adapted = tokens if adapted is None else adapted
    small = rank * (wide_in + wide_out)
    operations = 2 * tokens * wide_in * wide_out + 2 * adapted * small
    adapters = small if adapted else 0
    return Work(operations, 2 * (wide_in * wide_out + adapters + tokens * (wide_in + wide_out)))


def lora_backward(tokens: int, wide_in: int, wide_out: int, rank: int) -> Work:
    """d x, d A and d B of a frozen linear: dy W; dy B, (dy B) A, (dy B)' x; x A', dy' (x A')."""
    small = rank * (wide_in + wide_out)
    operations = 2 * tokens * (wide_in * wide_out + rank * (2 * wide_out + 3 * wide_in))
    # In: W, A, B, x, dy. Out: dx, dA, dB.
    moved = wide_in * wide_out + 2 * small + tokens * (2 * wide_in + wide_out)
    return Work(operations, 2 * moved)


def attention(
    tokens: int, sequence: int, width: int, width_kv: int, backward: bool = False
) -> Work:
    """Causal attention over sequences of one length; backward: 5 products instead of 2."""
    products = 5 if backward else 2
    operations = products * 2 * tokens * sequence * width / 2
    # q, k, v in and o out; backward: those and do in, dq, dk, dv out.
    numbers = 4 * width + 4 * width_kv if backward else 2 * width + 2 * width_kv
    return Work(operations, 2 * tokens * numbers)


def linears(model: argparse.Namespace) -> list[tuple[int, int]]:
    """(width in, width out) of the linears of one layer."""
    query, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    hidden, inner = model.hidden, model.intermediate
    attend = [(hidden, query), (hidden, kv), (hidden, kv), (query, hidden)]
    return [*attend, (hidden, inner), (hidden, inner), (inner, hidden)]


def step(model: argparse.Namespace) -> dict[str, Work]:
    """The operations of one step: `tokens` rows of the policy, as many under each reference."""
    n, v, r, layers = model.tokens, model.vocabulary, model.rank, model.layers
    found: dict[str, Work] = {}

    def add(name: str, works: list[Work]) -> None:
        total = sum(works, Work(0, 0))
        found[name] = Work(layers * total.operations, layers * total.moved)

    if layers:
        shapes = linears(model)
        widths = (model.heads * model.head_dim, model.kv_heads * model.head_dim)
        add("policy linears forward", [lora(n, i, o, r) for i, o in shapes])
        add("policy linears backward", [lora_backward(n, i, o, r) for i, o in shapes])
        references = [lora(n, i, o, r) + lora(n, i, o, r, 0) for i, o in shapes]
        add("reference linears forward, separate", references)
        # Two adapters are read, which lora() counts as one.
        segmented = [lora(3 * n, i, o, r, 2 * n) + Work(0, 2 * r * (i + o)) for i, o in shapes]
        add("segmented_lora forward, all three", segmented)
        add("attention forward, policy", [attention(n, model.sequence, *widths)])
        add("attention backward, policy", [attention(n, model.sequence, *widths, True)])
        add("attention forward, references", [attention(2 * n, model.sequence, *widths)])
    found["linear_logprob forward"] = head(n, model.hidden, v)
    found["linear_logprob forward + backward"] = head(n, model.hidden, v, 2)
    found["mixture_logprob"] = head(n, model.hidden, v, states=2)
    found["logits_logprob forward"] = logits(n, v)
    found["logits_logprob forward + backward"] = logits(n, v, True)
    return found


def work_of(operation: str, shape: dict[str, int]) -> Work | None:
    """The work of a measured row of test_kernels.py; None where there is no model of it."""
    n, both = shape.get("tokens", 0), operation.endswith("backward")
    if operation.startswith("linear_logprob"):
        return head(n, shape["hidden"], shape["vocabulary"], 2 if both else 1)
    if operation == "mixture_logprob":
        return head(n, shape["hidden"], shape["vocabulary"], states=2)
    if operation.startswith("logits_logprob"):
        return logits(n, shape["vocabulary"], both)
    if operation.startswith("segmented_lora"):
        widths = (shape["wide_in"], shape["wide_out"], shape["rank"])
        forward = lora(n, *widths, 2 * n // 3) + Work(0, 2 * widths[2] * (widths[0] + widths[1]))
        return forward + lora_backward(n // 3, *widths) if both else forward
    return None


def from_config(folder: Path) -> dict[str, Any]:
    """What a transformers config.json says about the shapes."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    heads = config["num_attention_heads"]
    return {
        "hidden": config["hidden_size"],
        "vocabulary": config["vocab_size"],
        "layers": config["num_hidden_layers"],
        "intermediate": config["intermediate_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
    }


def line(name: str, work: Work, gpu: Gpu) -> str:
    bound = "products" if work.operations / gpu.rate > work.moved / gpu.bandwidth else "bytes"
    floor = f"{1e3 * work.floor(gpu):9.3f} ms"
    return f"{name:38s} {work.operations:10.3e} {work.moved / 1e9:9.3f} GB {floor}  {bound}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--rate", type=float, help="measured instead: TFLOP/s")
    parser.add_argument("--bandwidth", type=float, help="measured instead: TB/s")
    parser.add_argument("--model", type=Path, help="folder with a config.json")
    for name in ("hidden", "vocabulary", "layers", "intermediate", "heads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--kv-heads", type=int, help="default: heads")
    parser.add_argument("--head-dim", type=int, help="default: hidden / heads")
    parser.add_argument("--tokens", type=int, default=4096, help="rows under each policy")
    parser.add_argument("--sequence", type=int, default=1024, help="tokens of one sequence")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--measured", type=Path, nargs="+", default=[], metavar="FILE.json")
    model = parser.parse_args()
    known = from_config(model.model) if model.model else {}
    known |= {"layers": known.get("layers", 0), "heads": known.get("heads", 0)}
    for name, value in known.items():
        if getattr(model, name) is None:
            setattr(model, name, value)
    if not model.hidden or not model.vocabulary:
        parser.error("give --model, or --hidden and --vocabulary")
    if model.layers and not (model.intermediate and model.heads):
        parser.error("--layers needs --intermediate and --heads")
    model.kv_heads = model.kv_heads or model.heads
    model.head_dim = model.head_dim or model.hidden // max(1, model.heads)
    gpu = GPUS[model.gpu]
    if model.rate or model.bandwidth:
        rate = 1e12 * model.rate if model.rate else gpu.rate
        bandwidth = 1e12 * model.bandwidth if model.bandwidth else gpu.bandwidth
        gpu = Gpu(rate, bandwidth, f"given; otherwise {gpu.source}")
    print(f"{gpu.rate / 1e12:g} TFLOP/s bf16, {gpu.bandwidth / 1e12:g} TB/s ({gpu.source})")
    print(f"{'operation':38s} {'operations':>10s} {'bytes':>12s} {'floor':>12s}  bound by")
    for name, work in step(model).items():
        print(line(name, work, gpu))
    for path in model.measured:
        raw = json.loads(path.read_text())["raw"]
        if not isinstance(raw, dict) or "case" not in raw:
            continue
        print(f"\n{path.name}: {raw['device']}, {raw['dtype']}, {raw['shape']}")
        if raw["dtype"] != "torch.bfloat16" or raw["device"] != "cuda":
            print("not bf16 on a GPU: the peaks above are not its own")
            continue
        for row in raw["rows"]:
            work = work_of(row["operation"], raw["shape"]) if row["operation"] else None
            if work is not None and row["p50"]:
                ratio = row["p50"] / work.floor(gpu)
                print(
                    f"{line(row['operation'], work, gpu)}  {1e3 * row['p50']:.3f} ms  × {ratio:.2f}"
                )


if __name__ == "__main__":
    main()
