"""The examples that are to be read from top to bottom, run as a person runs them."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from faults.forks import fork

EXAMPLES = Path(__file__).parents[1] / "examples"


def script(name: str, folder: Path, log: Path) -> None:
    """As `cd folder && python name`, in a process that has imported the libraries."""
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.argv, sys.path[0] = [name], str(folder)
    sys.stdout = sys.stderr = log.open("w")
    try:
        runpy.run_path(name, run_name="__main__")
    finally:
        sys.stdout.flush()


def executed(name: str, place: Path) -> str:
    """What an example prints, in a copy of the folder, as after `cd examples`."""
    shutil.copytree(EXAMPLES, place / "examples", ignore=shutil.ignore_patterns("own-*", "trl"))
    process = fork(script, name, place / "examples", place / "log")
    process.start()
    process.join(580)
    assert process.exitcode == 0, (place / "log").read_text()
    return (place / "log").read_text()


def test_own_data(tmp_path: Path) -> None:
    printed = executed("own_data.py", tmp_path)
    likelihoods = dict(re.findall(r"^(base|\d|sft \d) +NLL of the rows +([\d.]+)", printed, re.M))
    assert set(likelihoods) == {"base", "0", "1", "sft 0", "sft 1"}
    assert float(likelihoods["1"]) < float(likelihoods["base"]), "it learns the rows"
    here = tmp_path / "examples/own-data"
    assert (here / "run/report.html").is_file() and (here / "merged/model.safetensors").is_file()
    assert "license: apache-2.0" in (here / "merged/README.md").read_text()


def test_custom_judge(tmp_path: Path) -> None:
    printed = executed("custom_judge.py", tmp_path)
    assert "P(short ≻ long) = 0.91" in printed
    rows = re.findall(r"^(base|\d) +([\d.]+) tokens +right answers +\d+ %(.*)$", printed, re.M)
    assert [name for name, *_ in rows] == ["base", "0", "1"]
    won = int(re.findall(r"base +(\d+) %", rows[-1][2])[0])
    assert won > 50 and float(rows[-1][1]) < float(rows[0][1]), "answers get shorter"
    manifest = json.loads((tmp_path / "examples/own-judge/run/manifest.json").read_text())
    assert "judges:brief" in str(manifest["identity"])


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="trl is not installed")
def test_kernels_in_trl(tmp_path: Path) -> None:
    printed = executed("kernels_in_trl.py", tmp_path)
    assert len(re.findall(r"step \d: loss [\d.]+ by TRL, [\d.]+ with linear_logprob", printed)) == 4
