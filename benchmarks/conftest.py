"""`pytest benchmarks --benchmark`: measurements that write tables to `benchmarks/results/`."""

import json
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

RESULTS = Path(os.environ.get("ALPHASPIN_RESULTS", Path(__file__).parent / "results"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run the measurements (minutes)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the flag, what takes `measuring` runs once as a smoke test; the rest is skipped."""
    if not config.getoption("--benchmark"):
        for item in items:
            ours = Path(__file__).parent in item.path.parents
            if ours and "measuring" not in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="a measurement: needs --benchmark"))


@pytest.fixture
def measuring(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.getoption("--benchmark")


@pytest.fixture
def record(
    pytestconfig: pytest.Config, tmp_path: Path
) -> Callable[[str, list[str], list[list[str]], str, Any], Path]:
    """Write a table (Markdown) and its raw numbers (JSON) under the device's folder."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu-{_processor()}"
    results = RESULTS if pytestconfig.getoption("--benchmark") else tmp_path
    folder = results / "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")

    def write(title: str, header: list[str], rows: list[list[str]], text: str, raw: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now(UTC).date().isoformat()
        versions = (
            f"{name}, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
            f"torch {torch.__version__}, transformers {transformers.__version__}; {stamp}"
        )
        lines = [header, ["---"] * len(header), *rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        path = folder / f"{title}.md"
        path.write_text(f"# {title}\n\n{versions}\n\n{table}\n\n{text}\n", encoding="utf-8")
        raw = {"versions": versions, "raw": raw}
        path.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
        return path

    return write


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()
