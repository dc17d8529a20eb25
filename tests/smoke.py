"""Does it run here? Every operator once, and one tiny run of each method, each on its own.

    PYTHONPATH=.:kernels:tests python tests/smoke.py [NAME FOLDER]

An operator is held against its definition in float64, forward and backward, in the dtypes that
training has; a run goes through every phase and ends in its summary. `benchmarks/gpu.py` runs all
of them at once, a process each: what one does to the device does not reach the others.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from alphaspin_kernels import (
    linear_logprob,
    logits_logprob,
    mixture_logprob,
    reference,
    segmented_lora,
    sequence_logprob,
    subtb_loss,
)
from helpers import arithmetic, save_model, write_rows
from torch import Tensor

from alphaspin.model import varlen

N, H, V = 37, 64, 513


def compared(
    ours: Callable[..., Tensor], exact: Callable[..., Tensor], *given: Any, trained: tuple[int, ...]
) -> None:
    """Values, and the gradients of some of the arguments, against float64."""

    def differentiate(function: Callable[..., Tensor], wide: bool) -> list[Tensor]:
        leaves = [
            (x.detach().double() if wide and x.is_floating_point() else x.detach().clone())
            if isinstance(x, Tensor)
            else x
            for x in given
        ]
        for index in trained:
            leaves[index].requires_grad_()
        y = function(*leaves)
        if trained:
            weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
            (y * weights.to(y.dtype)).sum().backward()
        return [y.detach(), *(leaves[index].grad for index in trained)]

    eps = next(torch.finfo(x.dtype).eps for x in given if isinstance(x, Tensor))
    results = zip(differentiate(ours, False), differentiate(exact, True), strict=True)
    for number, (found, expected) in enumerate(results):
        error = float((found.double() - expected).norm() / expected.norm().clamp(min=1e-9))
        what = f"gradient of argument {trained[number - 1]}" if number else "values"
        limit = max(2 * eps, 2e-5)
        assert error < limit, f"{what}: relative error {error:.2g}, at most {limit:.2g} expected"


def head(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, H, generator=generator), torch.randn(V, H, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    return (hidden.to(device, dtype), (weight / 4).to(device, dtype), targets.to(device))


def check_linear(device: str, dtype: torch.dtype) -> None:
    x = head(device, dtype)
    compared(linear_logprob, reference.linear_logprob, *x, trained=())
    compared(linear_logprob, reference.linear_logprob, *x, trained=(0,))
    capped = {"softcap": 5.0, "temperature": 0.7}
    compared(
        partial(linear_logprob, **capped),
        partial(reference.linear_logprob, **capped),
        *x,
        trained=(0, 1),
    )


def check_logits(device: str, dtype: torch.dtype) -> None:
    hidden, weight, targets = head(device, dtype)
    logits = (hidden @ weight.T).contiguous()
    compared(logits_logprob, reference.logits_logprob, logits, targets, trained=(0,))


def check_sequence(device: str, dtype: torch.dtype) -> None:
    ends = torch.tensor([0, 5, 5, N], device=device)
    x = (*head(device, dtype), ends)
    compared(sequence_logprob, reference.sequence_logprob, *x, trained=(0,))


def check_mixture(device: str, dtype: torch.dtype) -> None:
    hidden, *rest = head(device, dtype)
    x = (hidden, hidden.flip(0), *rest, 0.7)
    capped = partial(mixture_logprob, softcap=5.0), partial(reference.mixture_logprob, softcap=5.0)
    compared(*capped, *x, trained=())


def check_lora(device: str, dtype: torch.dtype) -> None:
    """Adapters in fp32, as PEFT keeps them; with noise, and a base without an adapter."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, to)

    weight = normal(48, H) / 8
    down, up, other = (normal(*s, to=torch.float32) / 8 for s in ((8, H), (48, 8), (4, H)))
    last = normal(48, 4, to=torch.float32)

    def run(function: Callable[..., Tensor], x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        wide = x.dtype == torch.float64
        to = torch.float64 if wide else torch.float32
        adapters = [(a, b), (other.to(to), last.to(to)), None]
        return function(
            x, weight.to(x.dtype), adapters, [20, 10, 7], [2.0, 1.0, 0.0], dropout=0.2, seed=3
        )

    compared(
        partial(run, segmented_lora),
        partial(run, reference.segmented_lora),
        normal(N, H),
        down,
        up,
        trained=(0, 1, 2),
    )


def check_subtb(device: str, dtype: torch.dtype) -> None:
    del dtype  # always fp32 in and float64 inside
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, length, generator=generator).to(device) for length in (9, 10, 10)]
    lengths = torch.tensor([9, 0, 4], device=device)
    compared(
        partial(subtb_loss, lam=0.9),
        partial(reference.subtb_loss, lam=0.9),
        *parts,
        lengths,
        trained=(0, 1, 2),
    )


CHECKS = {
    "linear_logprob": check_linear,
    "logits_logprob": check_logits,
    "sequence_logprob": check_sequence,
    "mixture_logprob": check_mixture,
    "segmented_lora": check_lora,
    "subtb_loss": check_subtb,
}


def kernels(name: str, device: str) -> None:
    """One operator in bf16 and fp32."""
    for dtype in (torch.bfloat16, torch.float32):
        CHECKS[name](device, dtype)


JUDGE = {"kind": "callable", "function": "smoke:verdict"}
JUDGED = {"preference": {"responses": 2}, "judge": JUDGE}
RUNS: dict[str, dict[str, Any]] = {
    "spin": {"control": "sft", "reference": {"alpha": 0.8}, "lora": {"dropout": 0.1}},
    "spin-online": {"reference": {"alpha": 0.8, "mode": "online"}},
    "spin-joint": {"reference": {"alpha": 0.8, "mode": "joint"}},
    "spin-gflownet": {"selfplay": {"opponent": "mixture-gflownet"}, "reference": {"alpha": 0.8}},
    "t_spin": {"method": "t_spin"},
    "sppo": {"method": "sppo", **JUDGED},
    "rspo": {"method": "rspo", **JUDGED},
    "nash_md": {"method": "nash_md", "judge": JUDGE},
    "inpo": {"method": "inpo", **JUDGED},
    "comal": {"method": "comal", **JUDGED},
    "egpo": {"method": "egpo", **JUDGED},
}


def verdict(pair: Any) -> float:
    """A judge that prefers what comes first in the alphabet."""
    return 0.5 if pair.first == pair.second else 0.9 if pair.first < pair.second else 0.1


def settings(name: str, folder: Path) -> dict[str, Any]:
    """Of a run on a random model of two layers, which is made in `folder` if it is not there."""
    if not (folder / "data.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_model(folder / "model")
        write_rows(folder / "data.jsonl", arithmetic(12))
    base: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "output": str(folder / name),
        "text": {"max_response_tokens": 4, "overlong": "cut"},
        "selfplay": {"iterations": 2, "prompts": 2},
        "lora": {"r": 4, "targets": ["q_proj", "down_proj"]},
        "train": {"batch_size": 2, "lr": 1e-3, "liger": "off"},
        "sampling": {"batch_size": 4},
        "evaluate": {"prompts": 1},
    }
    for key, value in RUNS[name].items():
        base[key] = base.get(key, {}) | value if isinstance(value, dict) else value
    return base


def play(name: str, folder: Path) -> dict[str, Any]:
    """One run; what its `summary.json` holds."""
    from alphaspin.commands import job
    from alphaspin.config import Config

    return job.run(Config.model_validate(settings(name, folder)))


def main(name: str, folder: Path) -> None:
    """One of `CHECKS` or `RUNS`; raises what is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name in CHECKS:
        kernels(name, device)
    else:
        play(name, folder)
    if device == "cuda":
        torch.cuda.synchronize()  # a kernel may have failed after its launch
    print(f"{name}: right on {device}", *varlen.on(torch.device(device)), sep="; attention: ")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(sys.argv[1], Path(sys.argv[2]))
    else:
        print(*CHECKS, *RUNS)
