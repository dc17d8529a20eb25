"""The kernel package by itself: what it imports, and what an installation holds."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "alphaspin_kernels"

ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("alphaspin", "transformers", "peft", "accelerate", "pydantic"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import alphaspin_kernels as kernels

hidden, head, targets = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8), torch.arange(5)
kernels.sequence_logprob(hidden, head, targets, torch.tensor([0, 2, 5])).sum().backward()
kernels.mixture_logprob(hidden.detach(), hidden.detach(), head, targets, 0.5)
kernels.logits_logprob(head[:, :5], torch.zeros(11, dtype=torch.int64))
kernels.segmented_lora(hidden, head, [(head[:2], head[:, :2]), None], [3, 2], 1.0)
kernels.subtb_loss(torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1, 3), torch.tensor([2]), 1.0)
assert len(kernels.kernel_status()) == 2 * len(kernels.OPERATORS) == 12
print(hidden.grad.isfinite().all().item())
"""


def test_needs_torch_and_nothing_of_the_trainer():
    command = [sys.executable, "-W", "error::UserWarning:alphaspin_kernels", "-c", ALONE]
    result = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(PACKAGE.parent)}
    )
    assert result.stdout == "True\n", result.stderr


def test_an_installation_holds_every_module(tmp_path):
    """Without `_triton` every operator fails on a GPU, and no test in a checkout sees it."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    built = tmp_path / "alphaspin_kernels"
    expected = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    assert {path.relative_to(built) for path in built.rglob("*.py")} == expected
    assert Path("_triton/common.py") in expected
