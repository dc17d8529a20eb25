"""All causal families of the installed transformers: none is wrong, none that was exact is refused.

A sixth of them in CI, all with ALPHASPIN_SWEEP=1 (`make test-all`).
"""

import json
import os
from pathlib import Path

import families
import pytest

KNOWN: dict[str, str] = json.loads(families.FILE.read_text())["verdicts"]
STEP = 1 if os.environ.get("ALPHASPIN_SWEEP") else 6


@pytest.mark.filterwarnings("ignore")  # what the code of a family says about itself
@pytest.mark.parametrize("family", families.names()[::STEP])
def test_a_family_has_its_verdict(family: str, tmp_path: Path) -> None:
    found, known = families.verdict(family, tmp_path), KNOWN.get(family, "")
    assert not found.startswith("wrong"), found
    if known in ("packed", "padded"):
        assert found in ("packed", known), f"it was {known}"


def test_the_page_has_the_table() -> None:
    assert families.table(KNOWN) in families.PAGE.read_text()
