"""The tests on a GPU that is not there, in a process of their own: see `test_pretended_gpu`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SWEEP = bool(os.environ.get("ALPHASPIN_SWEEP"))
PARTS = {"a run and operators": "not references"} | ({"references": "references"} if SWEEP else {})


@pytest.mark.parametrize("part", PARTS)
def test_alone(part: str) -> None:
    file = Path(__file__).with_name("test_pretended_gpu.py")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    found = subprocess.run(
        [*words, "-k", PARTS[part]],
        env={**os.environ, "ALPHASPIN_PRETEND": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-20000:] + found.stderr[-2000:]
    assert "skipped" not in found.stdout
