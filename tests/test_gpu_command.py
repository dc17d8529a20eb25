"""`make gpu` with a Python that is not one: what crashes, raises or hangs costs others nothing."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)

PYTHON = """#!/bin/sh
case "$*" in
    *smoke.py) echo crashing raising hanging right ;;
    *smoke.py*crashing*) kill -SEGV $$ ;;
    *smoke.py*raising*) echo "Traceback ..."; echo "ValueError: 7 is not 8"; exit 1 ;;
    *smoke.py*hanging*) sleep 60 ;;
    *smoke.py*right*) echo "right: on cuda" ;;
    *test_kernels.py) echo one two ;;
    *test_kernel?one*) kill -SEGV $$ ;;
    *test_kernel?two*) echo "two was measured" ;;
    *tests/kernels*) exit 3 ;;
    *) echo "nothing wrong here" ;;
esac
"""


def test_one_list_of_all_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "versions", lambda: "a GPU\n")
    monkeypatch.setattr(gpu, "family", lambda: "h100")
    monkeypatch.setattr(gpu.smoke, "__defaults__", (2,))  # seconds
    for name in ("PYTHONPATH", "PYTHONUNBUFFERED", "ALPHASPIN_RESULTS"):
        monkeypatch.setenv(name, "")
    assert gpu.main(out) == 1
    about, *problems = (out / "summary.txt").read_text().splitlines()
    assert about == "a GPU" and sorted(problems) == [
        "benchmark one: killed by SIGSEGV",
        "smoke crashing: killed by SIGSEGV: ",
        "smoke hanging: stopped, 2 s were over: ",
        "smoke raising: exit code 1: ValueError: 7 is not 8",
        "tests: exit code 3",
    ]
    log = (out / "smoke.log").read_text()
    assert log.index("ValueError: 7") < log.index("--- raising") and "--- right" not in log
    assert "two was measured" in (out / "benchmarks.log").read_text()
    assert "nothing wrong here" in (out / "roofline.txt").read_text()
    assert len([*out.iterdir()]) <= 8
