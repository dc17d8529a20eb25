"""Whole runs of SPPO with the judges that are models, or behind a server that falls ill."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import arithmetic, make_tokenizer, save_model, write_rows
from safetensors.numpy import load_file
from test_judge_models import make_pairrm, make_reward_model
from test_judges import answers_of, serve
from transformers import AutoTokenizer

from alphaspin.commands import job
from alphaspin.config import Config
from alphaspin.data.chat import ChatFormat
from alphaspin.data.demonstrations import hold_out, load_demonstrations
from alphaspin.errors import JudgeError
from alphaspin.foundation.artefacts import file_hash
from alphaspin.judges.base import Prompt
from alphaspin.judges.matrix import pick_pair, win_probabilities
from alphaspin.judges.models import PairRMJudge, RewardModelJudge

__all__ = ["serve"]  # a fixture
PROMPTS, K = 6, 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    write_rows(folder / "data.jsonl", arithmetic(20))
    for make in (make_reward_model, make_pairrm):
        (folder / make.__name__).mkdir()
        make(folder / make.__name__)
    return folder


@pytest.fixture(scope="module")
def prompts(inputs: Path) -> list[Prompt]:
    """What is asked about each of the demonstrations that are left to train on."""
    chat = ChatFormat.create(make_tokenizer())
    demos, _ = load_demonstrations(str(inputs / "data.jsonl"), chat, Config().text)
    return [Prompt(demo.messages) for demo in hold_out(demos, 3, 0)[0]]


def config(inputs: Path, run: Path, **judge: Any) -> Config:
    return Config.model_validate(
        {
            "method": "sppo",
            "model": str(inputs / "model"),
            "data": str(inputs / "data.jsonl"),
            "output": str(run),
            "text": {"max_response_tokens": 8},
            "selfplay": {"iterations": 2, "prompts": PROMPTS},
            "judge": judge,
            "preference": {"responses": K, "eta": 4.0},
            "lora": {"r": 2},
            "train": {"batch_size": 4, "lr": 1e-2},
            "evaluate": {"prompts": 3},
        }
    )


def responses(inputs: Path, run: Path, iteration: int) -> dict[int, list[str]]:
    """Texts by example, decoded without the package's reader."""
    tokenizer: Any = AutoTokenizer.from_pretrained(inputs / "model")
    found: dict[int, list[str]] = {}
    for path in sorted((run / f"iterations/{iteration}/responses").rglob("*.safetensors")):
        data = load_file(path)
        parts = np.split(data["tokens"], data["length"].cumsum()[:-1])
        for example, ids in zip(data["example"].tolist(), parts, strict=True):
            found.setdefault(example, []).append(tokenizer.decode(ids, skip_special_tokens=True))
    return found


@pytest.mark.parametrize("kind", ["reward_model", "pairrm"])
def test_a_run_with_a_model_as_judge(
    inputs: Path, prompts: list[Prompt], tmp_path: Path, kind: str
) -> None:
    """The pairs of each iteration are what the model says of the sampled answers."""
    folder = str(inputs / f"make_{kind}")
    summary = job.run(config(inputs, tmp_path / "run", kind=kind, model=folder))
    judge = {"reward_model": RewardModelJudge, "pairrm": PairRMJudge}[kind](folder)
    for t in (0, 1):
        groups = responses(inputs, tmp_path / "run", t)
        assert len(groups) == PROMPTS and all(len(group) == K for group in groups.values())
        found = win_probabilities(judge, [prompts[e] for e in groups], list(groups.values()))
        pairs = [pair for matrix in found if (pair := pick_pair(matrix))]
        reported = summary["pairs"][t]
        assert reported["pairs"] == len(pairs) > 0
        assert reported["p_best"] == pytest.approx(np.mean([p.p_best for p in pairs]), abs=1e-6)
        assert reported["p_worst"] == pytest.approx(np.mean([p.p_worst for p in pairs]), abs=1e-6)
    for row in summary["rows"][1:]:
        assert row["judged_low"] < row["judged"] < row["judged_high"] and row["judged"] != 0.5
        assert 0 < row["controlled"] < 1
    assert len(set(summary["adapters"].values())) == 2
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["identity"]["judge"] == judge.identity


def result(run: Path) -> dict[str, str]:
    """Hashes of what must not depend on what the server did."""
    files = [p for kind in ("adapter", "evaluation") for p in run.rglob(f"{kind}/*") if p.is_file()]
    return {str(path.relative_to(run)): file_hash(path) for path in files}


def shorter(question: str, number: int) -> str:
    """Prefers the shorter answer, and A where they are equal."""
    del number
    one, other = answers_of(question)
    return "[[A]]" if len(one) <= len(other) else "[[B]]"


def test_a_run_with_a_server_that_falls_ill(
    inputs: Path, tmp_path: Path, serve: Callable[..., Any]
) -> None:
    """It stops answering twice; the run goes on, at another address too, and asks nothing twice."""
    url, whole = serve(shorter)
    job.run(config(inputs, tmp_path / "whole", kind="server", url=url, model="m", workers=1))

    def question(request: dict[str, Any]) -> str:
        return request["messages"][-1]["content"]

    expected = [question(request) for request in whole]
    assert len(expected) == len(set(expected)) > 20
    answered: list[str] = []
    for share in (0.3, 0.8, 1.0):
        limit = int(share * len(expected))

        def reply(text: str, number: int, limit: int = limit) -> Any:
            if len(answered) == limit and limit < len(expected):
                return 400
            answered.append(text)
            return shorter(text, number)

        url, _ = serve(reply)
        settings = config(inputs, tmp_path / "run", kind="server", url=url, model="m", workers=1)
        if share < 1:
            with pytest.raises(JudgeError, match="HTTP 400"):
                job.run(settings)
            assert len(answered) == limit
        else:
            summary = job.run(settings)
    assert answered == expected
    assert result(tmp_path / "run") == result(tmp_path / "whole")
    assert len(set(summary["adapters"].values())) == 2
    before = len(answered)
    job.run(settings)  # a finished run asks nothing
    assert len(answered) == before
