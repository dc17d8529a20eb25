"""scripts/reproduce.py: its plan by hand, its table, and all of it on a stand-in, stopped and gone
on with."""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from alphaspin.cli import parse
from alphaspin.judges.base import Comparison, Prompt

SCRIPT = Path(__file__).parents[1] / "scripts" / "reproduce.py"
spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
assert spec and spec.loader
reproduce = importlib.util.module_from_spec(spec)
sys.modules["reproduce"] = reproduce
spec.loader.exec_module(reproduce)

OPTIONS = argparse.Namespace(stand_in=False, output=None, train="", gpu="h100")


def test_the_papers_runs() -> None:
    """α, h and what the paper states, of each run; the same settings otherwise."""
    found = {name: parse(reproduce.settings(name, OPTIONS))[0] for name in reproduce.RUNS}
    assert [config.reference.alpha for config in found.values()] == [1, 0.95, 0.95, 0.95, 0.95]
    histories = [getattr(config.selfplay, "history", None) for config in found.values()]
    assert histories == [1, 1, 2, "inf", None]
    assert found["alpha-gflownet"].selfplay.opponent == "mixture-gflownet"
    sampler = found["alpha-gflownet"].gflownet
    assert (sampler.prompts, sampler.epochs, sampler.lr, sampler.lora.r) == (1000, 10, 1e-4, 16)
    for config in found.values():
        assert config.model == "google/gemma-2b" and config.selfplay.prompts == (50000, 100000)
        assert (config.train.epochs, config.lora.r, config.selfplay.iterations) == (4, 16, 3)


def test_the_stand_ins_rule() -> None:
    pair = Comparison(Prompt([]), "a b c", "a a a a")
    assert reproduce.more_words(pair) == 1 and reproduce.more_words(pair.swapped()) == 0
    assert reproduce.words(pair) == 4 and reproduce.words(pair.swapped()) == 2


def test_table(tmp_path: Path) -> None:
    """Per cent and grades by iterate; what was not measured is not a number."""

    def write(place: str, results: dict[str, Any]) -> None:
        folder = tmp_path / "evaluation" / place
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"results": results}))

    write("open-llm-1/base", {"gsm8k": {"exact_match,strict-match": 0.125}})
    write("open-llm-1/0", {"mean of the six": {"score,none": 0.4321}})
    write("mt-bench-2/0", {"all": {"grade,none": 4.5}})
    write("answers-3/0", {"all": {"grade,none": 9}})
    lines = reproduce.table("spin", tmp_path).splitlines()
    assert lines[-2].startswith("| base | – ") and "| 12.50 | –" in lines[-2]
    assert lines[-1].endswith("| 43.21 | 4.50 | – |")
    write("mt-bench-4/0", {"all": {"grade,none": 5.5}})  # by another judge, for instance
    with pytest.raises(reproduce.InputError, match="mt-bench-2, mt-bench-4: move away all but one"):
        reproduce.table("spin", tmp_path)


@pytest.mark.skipif("ALPHASPIN_SWEEP" not in os.environ, reason="a minute; see make test-all")
def test_end_to_end_on_a_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One run with all benchmarks; a second call makes nothing again, and says the same."""
    monkeypatch.setattr(
        sys,
        "argv",
        [
            *("reproduce.py", "--stand-in", "--output", str(tmp_path), "--runs", "alpha-h2"),
            *("--no-open-llm", "--train", "--selfplay.prompts 16 --selfplay.iterations 2"),
        ],
    )
    reproduce.main()
    page = (tmp_path / "alpha-h2/report.html").read_text()
    assert 'aria-label="Grades, 1 to 10"' in page and 'aria-label="Win rate' in page
    results = (tmp_path / "results.md").read_text()
    assert "no result" in results and results.count("| base |") == 1 and "| 1 |" in results
    made = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("hashes.json")}
    assert any("answers-" in str(path) for path in made)
    capfd.readouterr()
    reproduce.main()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("hashes.json")} == made
    assert (tmp_path / "results.md").read_text() == results
    assert capfd.readouterr().out.count("+ ") == 3
