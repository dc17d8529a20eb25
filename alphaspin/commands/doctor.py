"""`alphaspin doctor`: what is installed, which kernels and attention will be used, and why."""

import importlib.util
import platform
import re
import warnings
from collections.abc import Callable
from importlib import metadata

import alphaspin_kernels as kernels
import torch
from alphaspin_kernels import kernel_status
from torch import Tensor

from alphaspin import __version__
from alphaspin.foundation import console
from alphaspin.model import attention, varlen
from alphaspin.model.load import choose_bf16
from alphaspin.model.speedups import liger_problem

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "datasets")
OPTIONAL = (
    *("bitsandbytes", "flash_attn", "liger_kernel", "lm_eval"),
    *("mlflow", "tensorboard", "trackio", "wandb"),
)
TRIALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear_logprob": lambda x, i: kernels.linear_logprob(x, x, i),
    "logits_logprob": lambda x, i: kernels.logits_logprob(x, i),
    "mixture_logprob": lambda x, i: kernels.mixture_logprob(x, -x, x, i, 0.5),
    "segmented_lora": lambda x, i: kernels.segmented_lora(x, x, [(x[:4], x[:, :4])], [len(i)], 1.0),
    "sequence_logprob": lambda x, i: kernels.sequence_logprob(x, x, i, i[[0, -1]] + i[:2]),
    "subtb_loss": lambda x, i: kernels.subtb_loss(x[:, 1:], x, x, i, 0.9),
}
"""A call of each operator, of a square matrix and the numbers of its rows."""


def show() -> None:
    """Print the findings."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    status = kernel_status()
    lines = [
        ("alphaspin", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((name, _version(name)) for name in PACKAGES),
        *((f"{name} (optional)", _version(name)) for name in OPTIONAL),
        ("device", _device(device)),
        ("threads", f"{torch.get_num_threads()} for PyTorch on the CPU"),
        ("base and activations", _dtype(device)),
        *((f"kernel {name}", status[f"{name}.{device.type}"]) for name in TRIALS),
        ("attention, training", _attention(device)),
        ("norms, RoPE, MLPs", _layers(device)),
        ("attention, sampling", "PyTorch SDPA on a cache with a slot per sequence"),
    ]
    console.table("", ["what", "finding"], [list(line) for line in lines], words=True)


def show_short() -> None:
    """Print a block for a bug report: versions, device, and how each kernel does here.

    Nothing about other devices, and no paths.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    system = f"{platform.system()} {platform.machine()}"
    installed = [(n, _version(n)) for n in (*PACKAGES, *OPTIONAL) if importlib.util.find_spec(n)]
    missing = [name for name in PACKAGES if not importlib.util.find_spec(name)]
    status = kernel_status()
    lines = [
        f"alphaspin {__version__}, Python {platform.python_version()}, {system}",
        ", ".join(f"{name} {version}" for name, version in installed),
        *(f"not installed: {name}" for name in missing),
        f"{_device(device)}; {torch.get_num_threads()} threads",
        f"base and activations: {_dtype(device).split(':')[0]}",
        f"attention, training: {_attention(device)}",
        *(f"{name}: {status[f'{name}.{device.type}']}; {_tried(name, device)}" for name in TRIALS),
    ]
    # Not through `console`, which would break lines where the terminal ends.
    print("\n".join(re.sub(r"(?<![\w.])/(?:[^\s/(),;:]+/)*", "", line) for line in lines))


@torch.no_grad()
def _tried(name: str, device: torch.device) -> str:
    """What came of a call in fp32, beside the same in float64, which PyTorch serves."""
    numbers, call = torch.arange(16, device=device), TRIALS[name]
    x_NN = torch.sin(torch.arange(256.0, device=device)).view(16, 16)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the line says already what is missing
            found = call(x_NN, numbers).double()
        exact = call(x_NN.double(), numbers)
    except Exception as error:  # whatever a compiler or a driver raises: it is the finding
        reason = next(iter(str(error).splitlines()), "")
        return f"FAILED here: {type(error).__name__}: {reason}"
    return f"ran, {float((found - exact).abs().max() / exact.abs().max()):.0e} off float64"


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "installed, version unknown"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name()}, {torch.cuda.device_count()} visible"
    built = "this PyTorch has no CUDA" if torch.version.cuda is None else "no CUDA device found"
    return f"cpu: {torch.backends.cpu.get_cpu_capability()} ({built})"


def _layers(device: torch.device) -> str:
    problem = liger_problem(device)
    if problem:
        return f"transformers' own; Liger's kernels: {problem}"
    return "Liger's kernels, for families that it knows (train.liger)"


def _attention(device: torch.device) -> str:
    """Of Llama 3.1 8B's layers, where there is a GPU; those of a run tell of their own."""
    if device.type == "cuda":
        form = varlen.Form(device, torch.bfloat16, (32, 8), (128, 128), False, False, False, True)
        return str(varlen.find(form, attention.causal))
    return (
        "PyTorch SDPA, a call for each length, and plain products for soft caps (Gemma 2); on a "
        "GPU one call a layer by flash-attn, where it is installed, or by torch's varlen_attn"
    )


def _dtype(device: torch.device) -> str:
    if choose_bf16("auto", device):
        return "bf16: the GPU has it (adapters, optimiser and log-probs are fp32)"
    return "fp32: on CPUs bf16 attention is slower, and many have no bf16 units"
