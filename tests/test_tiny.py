"""The embedded default: small, disjoint, and what `scripts/make_tiny.py` makes."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from alphaspin.foundation.paths import packaged
from alphaspin.model.load import load_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def make_tiny() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "make_tiny.py"
    spec = importlib.util.spec_from_file_location("make_tiny", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_tiny"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_the_demonstrations_are_the_scripts(
    make_tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    arguments = ["make_tiny", "--data-only", "--out", str(tmp_path), f"--threads={threads}"]
    monkeypatch.setattr(sys, "argv", arguments)
    make_tiny.main()
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == packaged(f"tiny/{name}").read_bytes(), name


def test_the_tokenizer_is_the_scripts_and_training_works(
    make_tiny: ModuleType, tmp_path: Path
) -> None:
    """Tokenizer, model, a few steps of its training, saving, loading; not the 20 minutes."""
    web = make_tiny.web_text(1)
    pairs = [next(web) for _ in range(20_000)]
    tokenizer = make_tiny.make_tokenizer(text for pair in pairs for text in pair)
    model = make_tiny.make_model(tokenizer, 0)
    text = make_tiny.clean_text(2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_tiny.train(model, tokenizer, text, steps=2, lr=1e-3, name="test")
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    make_tiny.save(model.to(torch.bfloat16), tokenizer, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        made, shipped = (
            json.loads((folder / name).read_text())
            for folder in (tmp_path / "model", packaged("tiny/model"))
        )
        for content in (made, shipped):
            content.pop("transformers_version", None)
        assert made == shipped, name
    backbone, _ = load_base(str(tmp_path / "model"), dtype="fp32", device=CPU)
    shipped_base, _ = load_base("tiny", dtype="fp32", device=CPU)
    shapes = [p.shape for p in backbone.parameters()]
    assert shapes == [p.shape for p in shipped_base.parameters()]


def test_it_is_small_and_nothing_held_out_is_trained_on() -> None:
    files = [path for path in packaged("tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5_000_000
    train, heldout = (
        packaged(f"tiny/{name}.jsonl").read_text().splitlines() for name in ("train", "heldout")
    )
    assert len(train) >= 4000 and len(heldout) >= 500
    assert not set(train) & set(heldout)
