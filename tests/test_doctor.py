"""`alphaspin doctor`: what it says is there is there, and what it says ran has run."""

import importlib.util
import re
from typing import Any, NoReturn

import pytest
import torch
from alphaspin_kernels import OPERATORS, _dispatch

from alphaspin.commands import doctor


def test_short_tells_of_what_ran(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show_short()
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert ".cuda" not in printed  # of what is not there nothing is claimed
    assert not re.search(r"(?<![\w.])/\w", printed)
    for name in OPERATORS:
        (line,) = re.findall(f"^{name}: .*$", printed, re.M)
        error = re.search(r"; ran, (\S+) off float64$", line)
        assert error and float(error[1]) < 1e-5, line
    for name in doctor.OPTIONAL:
        assert (f"{name} " in printed) == bool(importlib.util.find_spec(name)), name


def test_the_table_tells_of_the_device_here_alone(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show()
    printed = capsys.readouterr().out
    assert ".cuda" not in printed and all(f"kernel {name} " in printed for name in OPERATORS)


def test_short_tells_of_what_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*tensors: Any) -> NoReturn:
        raise RuntimeError("no /home/somebody/lib/cuda.so here\nand more")

    monkeypatch.setitem(doctor.TRIALS, "subtb_loss", fail)
    monkeypatch.setattr(_dispatch, "csrc_problem", lambda: "not built (/home/somebody/_C.so)")
    doctor.show_short()
    printed = capsys.readouterr().out
    assert "FAILED here: RuntimeError: no cuda.so here" in printed and "and more" not in printed
    assert "linear_logprob: PyTorch: not built (_C.so); ran" in printed
    assert "C++ extension" not in printed and "somebody" not in printed
