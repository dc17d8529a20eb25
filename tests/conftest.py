"""Without a GPU the Triton kernels run in Triton's interpreter, which is chosen at import."""

import importlib
import importlib.util
import os

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"
    for operator in ("segmented_lora",):
        importlib.import_module(f"alphaspin_kernels._triton.{operator}")
    # Only the tests that ask for it use the interpreted kernels.
    del os.environ["TRITON_INTERPRET"]
