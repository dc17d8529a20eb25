"""Without a GPU the Triton kernels run in Triton's interpreter, which is chosen at import."""

import importlib
import importlib.util
import os
import sys

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose own functions look
    import alphaspin_kernels

    for operator in alphaspin_kernels.OPERATORS:
        importlib.import_module(f"alphaspin_kernels._triton.{operator}")
    # Only the tests that ask for it use the interpreted kernels.
    del os.environ["TRITON_INTERPRET"]

import pytest
from helpers import painted


@pytest.fixture(autouse=True)
def figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn to the last stroke where a test looks at them, and in what a file makes once."""
    plots = sys.modules.get("alphaspin.report.plots")
    if plots and request.path.stem not in ("test_report", "test_browser"):
        monkeypatch.setattr(plots, "draw", painted)
