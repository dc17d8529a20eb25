"""Limits that a run chooses by its model and data, and keeps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import arithmetic, save_model, write_rows

from alphaspin.commands import job, plan
from alphaspin.commands.played import Played
from alphaspin.commands.sizing import choose_limits, room, training_bytes
from alphaspin.config import Config
from alphaspin.data.demonstrations import Demonstration
from alphaspin.data.settings import TextConfig
from alphaspin.errors import InputError


def demonstrations(prompts: list[int], answers: list[int] | None) -> list[Demonstration]:
    sizes = answers or [0] * len(prompts)
    return [
        Demonstration(
            i,
            np.zeros(p, np.int32),
            np.zeros(r, np.int32),
            False,
            "yes" if answers else None,
            f"rows:{i}",
            whole=r,
        )
        for i, (p, r) in enumerate(zip(prompts, sizes, strict=True))
    ]


def chosen(
    text: TextConfig, prompts: list[int], answers: list[int] | None, **bounds: Any
) -> tuple[int, int, str]:
    bounds.setdefault("positions", None)
    found, note = choose_limits(text, demonstrations(prompts, answers), **bounds)
    return found.prompt_limit, found.response_limit, note


def test_limits_by_the_data():
    drop = TextConfig(too_long="drop")
    usual, tail = [40] * 198 + [79, 80], [40] * 199 + [81]
    assert chosen(drop, usual, usual)[:2] == (96, 96)  # 80, in steps of 32
    prompt, response, note = chosen(drop, tail, tail)
    assert (prompt, response) == (64, 64)
    assert "0.5 % of the prompts and 0.5 % of the answers" in note
    assert chosen(TextConfig(), tail, tail)[:2] == (96, 64)  # a long prompt would be an error
    # No more are cut than `overlong` lets be.
    assert chosen(TextConfig(too_long="drop", overlong_share=0.001), tail, tail)[:2] == (64, 96)
    assert chosen(drop, usual, None)[:2] == (96, 1024)
    assert chosen(TextConfig(max_prompt_tokens=7), usual, usual)[:2] == (7, 96)


def test_limits_by_the_model_and_the_memory():
    text, lengths = TextConfig(too_long="drop"), [90] * 10
    assert chosen(text, lengths, lengths, positions=192)[:2] == (96, 96)
    prompt, response, note = chosen(text, lengths, lengths, positions=150)
    assert (prompt, response) == (75, 75)
    assert "the model's 150 positions: 100 % of the prompts" in note
    assert chosen(text, [20] * 10, lengths, positions=100)[:2] == (20, 80)
    assert chosen(text, lengths, [20] * 10, positions=100)[:2] == (80, 20)
    # Where rounding up alone is too much, what is there fits, and answers have the rest.
    assert chosen(text, [70] * 10, [33] * 10, positions=128)[:2] == (70, 58)
    # Both answers of a pair are in memory with their prompt.
    assert chosen(text, lengths, lengths, positions=500, tokens=288, each=2)[:2] == (96, 96)
    prompt, response, note = chosen(text, lengths, lengths, positions=500, tokens=200, each=2)
    assert (prompt, response) == (90, 55)
    assert "within the memory here" in note
    assert prompt + 2 * response <= 200


def test_room_is_what_the_plan_counts(tmp_path, monkeypatch):
    save_model(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", arithmetic(30))
    config = Config(model=str(tmp_path / "base"), data=str(tmp_path / "rows.jsonl"))
    _, facts = plan.gather(config)
    fixed, each = training_bytes(config, facts, 4)
    device = torch.device("cpu")
    monkeypatch.setattr("alphaspin.commands.sizing.memory", lambda *_: (fixed + 50 * each) / 0.9)
    assert room(config, device) in (49, 50)
    monkeypatch.setattr("alphaspin.commands.sizing.memory", lambda *_: fixed)
    assert room(config, device) is None


def test_a_run_keeps_the_limits_it_chose(tmp_path, capsys, monkeypatch):
    """Also where it would choose others later; and the same numbers, given, are the same run."""
    base = save_model(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", arithmetic(30))
    settings: dict[str, Any] = {
        "model": str(base),
        "data": str(rows),
        "output": str(tmp_path / "run"),
        "selfplay": {"iterations": 1, "prompts": 6},
        "lora": {"r": 2},
        "train": {"batch_size": 6},
        "evaluate": {"prompts": 4},
    }
    config = Config.model_validate(settings)
    sized, facts = plan.gather(config)
    summary = job.run(config)
    limits = {"max_prompt_tokens": 32, "max_response_tokens": 32}
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("text.max_prompt_tokens = 32, text.max_response_tokens = 32, chosen by") == 2
    assert (sized.text.prompt_limit, sized.text.response_limit) == (32, 32)
    assert facts.demonstrations == 26
    for found in (
        summary["config"],
        json.loads((tmp_path / "run" / "manifest.json").read_text())["identity"]["config"],
        Played.open(tmp_path / "run").config.model_dump(),
    ):
        assert {key: found["text"][key] for key in limits} == limits
    monkeypatch.setattr("alphaspin.commands.sizing.STEP", 128)
    for text in ({}, limits, {"max_prompt_tokens": 32}):
        again = job.run(Config.model_validate(settings | {"text": text}))
        assert (again["rows"], again["config"]["text"]) == (
            summary["rows"],
            summary["config"]["text"],
        )
    with pytest.raises(InputError, match=r"its config\.text\.max_response_tokens is 32, not 20"):
        job.run(Config.model_validate(settings | {"text": {"max_response_tokens": 20}}))


def test_a_run_without_output_goes_on_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = {"max_prompt_tokens": 64, "max_response_tokens": 32}
    config = Config(model="base", data="rows.jsonl")
    sized = config.sized(text)
    assert sized.run_folder() == config.run_folder() == Path(f"runs/run-{config.digest()}")
    assert sized.identity()["text"] == config.identity()["text"] | text
    assert sized.sized({"max_prompt_tokens": 9}) is sized
    assert Config(text=TextConfig(max_prompt_tokens=9)).sized(text).text.prompt_limit == 9
