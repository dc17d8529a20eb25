"""`alphaspin doctor`: what is installed, which kernels and attention will be used, and why."""

import importlib.util
import platform
from importlib import metadata

import torch
from alphaspin_kernels import kernel_status

from alphaspin import __version__
from alphaspin.foundation import console
from alphaspin.model.load import choose_bf16
from alphaspin.model.speedups import liger_problem

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "datasets")
OPTIONAL = ("bitsandbytes", "liger_kernel", "lm_eval", "tensorboard", "wandb")


def show() -> None:
    """Print the findings."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [
        ("alphaspin", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((name, _version(name)) for name in PACKAGES),
        *((f"{name} (optional)", _version(name)) for name in OPTIONAL),
        ("device", _device(device)),
        ("threads", f"{torch.get_num_threads()} for PyTorch on the CPU"),
        ("base and activations", _dtype(device)),
        *((f"kernel {name}", reason) for name, reason in kernel_status().items()),
        (
            "attention, training",
            "PyTorch SDPA, causal and without a mask (FlashAttention on a GPU); plain products for "
            "soft-capped scores (Gemma 2), which SDPA has not",
        ),
        ("norms, RoPE, MLPs", _layers(device)),
        ("attention, sampling", "PyTorch SDPA on a cache with a slot per sequence"),
    ]
    console.table("", ["what", "finding"], [list(line) for line in lines])


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


def _dtype(device: torch.device) -> str:
    if choose_bf16("auto", device):
        return "bf16: the GPU has it (adapters, optimiser and log-probs are fp32)"
    return "fp32: on CPUs bf16 attention is slower, and many have no bf16 units"
