"""What a run and its plan say of the data, and what they refuse."""

import json
from datetime import datetime, timedelta

import numpy as np
import pytest
from helpers import arithmetic, write_rows
from transformers import AutoTokenizer

from alphaspin.cli import parse
from alphaspin.commands import inputs, job
from alphaspin.config import Config
from alphaspin.data.chat import ChatFormat
from alphaspin.data.demonstrations import Demonstration
from alphaspin.errors import InputError
from alphaspin.foundation import artefacts, runs
from alphaspin.foundation.artefacts import SEAL
from alphaspin.foundation.paths import packaged
from alphaspin.methods.spin import Pair, telling_start
from alphaspin.report import page
from alphaspin.sampling.answer import Answer

SMALL = {
    "model": "tiny",
    "control": "none",
    "selfplay": {"iterations": 1, "prompts": 4},
    "train": {"batch_size": 4, "accumulation": 1},
    "evaluate": {"prompts": 2},
    "text": {"max_prompt_tokens": 96, "max_response_tokens": 32},
}
DATED = (
    "{{ strftime_now('%d %b %Y %H') }}\n{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{{ '<|end|>' if m.role == 'assistant' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt }}"
)


def config(**changes) -> Config:
    merged = SMALL | {
        k: SMALL.get(k, {}) | v if isinstance(v, dict) else v for k, v in changes.items()
    }
    return Config.model_validate(merged)


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat.create(AutoTokenizer.from_pretrained(str(packaged("tiny/model"))))


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def checked(config: Config, chat: ChatFormat) -> tuple[int, int]:
    demonstrations, heldout = inputs.load_data(config, chat)
    inputs.check_data(config, demonstrations, heldout)
    return len(demonstrations), len(heldout)


def test_splits_of_a_run(tmp_path, chat):
    write_rows(tmp_path / "train.jsonl", arithmetic(20))
    write_rows(tmp_path / "test.jsonl", arithmetic(30)[20:])
    data = str(tmp_path)
    assert checked(config(data=data), chat) == (18, 2)
    assert checked(config(data=data, split="test"), chat) == (8, 2)
    assert checked(config(data=data, heldout=data, heldout_split="test"), chat) == (20, 2)
    with pytest.raises(InputError, match="no split 'nonsense'"):
        checked(config(data=data, split="nonsense"), chat)
    one = str(tmp_path / "test.jsonl")
    assert checked(config(data=one, split="test"), chat) == (8, 2)
    with pytest.raises(InputError, match=r"split = dev: data = .*test\.jsonl has no splits"):
        checked(config(data=one, split="dev"), chat)
    with pytest.raises(InputError, match=r"heldout_split = dev: heldout = .* has no splits"):
        checked(config(data=data, heldout=one, heldout_split="dev"), chat)
    with pytest.raises(InputError, match="split = dev: data = tiny has no splits"):
        checked(config(data="tiny", split="dev"), chat)
    with pytest.raises(InputError, match="heldout_split = test is a split of heldout: set that"):
        checked(config(data=data, heldout_split="test"), chat)


def test_a_recipes_split_gives_way_with_its_data():
    assert parse(["gemma-2b-ultrachat", "--data", "rows.jsonl"])[0].split == "train"
    assert parse(["gemma-2b-ultrachat", "--data", "a", "--split", "b"])[0].split == "b"
    assert parse(["gemma-2b-ultrachat"])[0].split == "train_sft"


def test_held_out_prompts_that_are_trained_on(tmp_path, chat, capsys):
    data = str(write_rows(tmp_path / "a.jsonl", arithmetic(9)))
    rows = arithmetic(11)[8:]
    rows[0]["prompt"] = rows[0]["prompt"].replace(" ", "\u00a0 ") + "\n"  # is no other prompt
    other = str(write_rows(tmp_path / "b.jsonl", rows))
    both = {"data": data, "heldout": other}
    with pytest.raises(InputError, match=r"1 of 3 held-out .*b\.jsonl:1 \(as .*a\.jsonl:9\): eval"):
        checked(config(**both, evaluate={"prompts": 3}), chat)
    doubled = [{**rows[0], "prompt": rows[0]["prompt"] + " " * (i % 2)} for i in range(4)]
    parted = config(data=str(write_rows(tmp_path / "c.jsonl", [*doubled, *arithmetic(9)[:4]])))
    assert {len(part) for part in inputs.load_data(parted, chat)} <= {1, 4, 7}, (
        "variants stay together"
    )
    kept = config(**both, evaluate={"prompts": 3, "overlap": "keep"})
    assert checked(kept, chat) == (9, 3)
    assert "ALARM 1 of 3 held-out" in said(capsys)
    dropped = config(**both, evaluate={"prompts": 3, "overlap": "drop"})
    assert checked(dropped, chat) == (8, 3)
    assert "1 rows dropped: their prompts are held out" in said(capsys)
    same = config(data=data, heldout=data, evaluate={"prompts": 9, "overlap": "drop"})
    with pytest.raises(InputError, match="no demonstration is left"):
        checked(same, chat)


def test_demonstrations_that_would_be_cut(tmp_path, chat, capsys):
    rows = arithmetic(50)
    rows[7]["completion"] = "it is " + "9 " * 40
    rows[8]["completion"] = "it is " + "9 " * 30
    data = str(write_rows(tmp_path / "a.jsonl", rows))

    def text(**settings):
        return config(data=data, evaluate={"prompts": 0}, text=settings)

    assert checked(text(), chat) == (50, 0)  # 4 %
    assert "2 of 50 demonstrations cut" in said(capsys)
    with pytest.raises(
        InputError, match=r"2 of 50 .*_tokens = 32 .*the longest has 8\d.* to 0\.04"
    ):
        checked(text(overlong_share=0.03), chat)
    assert checked(text(overlong="cut", overlong_share=0), chat) == (50, 0)
    assert checked(text(overlong="drop"), chat) == (48, 0)
    assert "2 rows dropped: the response" in said(capsys)


def test_what_shows_in_the_hash_of_the_data_tells_no_runs_apart():
    plain = config()
    for same in (
        config(text={"overlong": "cut", "overlong_share": 1}),
        config(evaluate={"overlap": "keep"}),
    ):
        assert same.digest() == plain.digest()
    for other in (
        config(text={"overlong": "drop"}),
        config(text={"template_options": {"enable_thinking": False}}),
        config(evaluate={"overlap": "drop"}),
        config(heldout="tiny", heldout_split="test"),
    ):
        assert other.digest() not in (plain.digest(), config(heldout="tiny").digest())
    settings = {"overlong", "overlong_share", "template_options"}
    assert settings.isdisjoint(plain.identity()["text"])


def test_template_options_on_the_command_line():
    found, _ = parse(["tiny", "--text.template_options", "enable_thinking", "False", "n", "3"])
    assert found.text.template_options == {"enable_thinking": False, "n": 3}
    for words in (["a"], [], ["a", "off"]):
        with pytest.raises(InputError, match=r"text\.template_options"):
            parse(["tiny", "--text.template_options", *words])


def test_what_tells_all_winners_from_losers():
    def pairs(losers: list[list[int]], winners: int = 7) -> list[Pair]:
        demos = [Demonstration(i, np.array([1]), np.array([winners, 8, i, 1]), False, "", "")
                 for i in range(len(losers))]  # fmt: skip
        answers = [Answer(np.array(loser, np.int32), False) for loser in losers]
        return [Pair(demo, answer) for demo, answer in zip(demos, answers, strict=True)]

    assert telling_start(pairs([[9, 1]] * 20)) == [7, 8]
    assert telling_start(pairs([[9, 1]] * 19 + [[7, 8, 1]])) == [7, 8]
    assert telling_start(pairs([[9, 1]] * 18 + [[7, 8, 1]] * 2)) == []
    assert telling_start(pairs([[9, 1]] * 15)) == []
    assert telling_start([*pairs([[9, 1]] * 20), *pairs([[9, 1]], winners=6)]) == []


class Tomorrow(datetime):
    days = 0

    @classmethod
    def now(cls, tz=None):
        return datetime(2026, 1, 31, 12) + timedelta(days=cls.days)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_whose_template_prints_the_date_goes_on_tomorrow(tmp_path, monkeypatch, recorded):
    from alphaspin.api import evaluate

    monkeypatch.setattr(runs, "datetime", Tomorrow)
    monkeypatch.setattr("alphaspin.data.chat.datetime", Tomorrow)
    monkeypatch.setattr(Tomorrow, "days", 0)
    (tmp_path / "dated.jinja").write_text(DATED)
    data = str(write_rows(tmp_path / "a.jsonl", arithmetic(10)))
    text = {"template": str(tmp_path / "dated.jinja")}
    settings = config(data=data, output=str(tmp_path / "run"), text=text)
    summary = job.run(settings)
    assert summary["samples"][0]["prompt"].startswith("31 Jan 2026 12")
    file = tmp_path / "run/manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["identity"]["clock"] == "2026-01-31T12:00:00"
    if not recorded:  # as versions before this one left it
        del manifest["identity"]["clock"]
        del manifest[SEAL]
        file.write_text(json.dumps(manifest))
        monkeypatch.setattr(artefacts, "_says_whose", lambda _: False)
    monkeypatch.setattr(Tomorrow, "days", 1)
    if recorded:
        assert job.run(settings)["adapters"] == summary["adapters"]
        assert [row.name for row in evaluate(tmp_path / "run")] == ["base", "0"]
        return
    with pytest.raises(InputError, match="prints the date"):
        evaluate(tmp_path / "run")
    with pytest.raises(InputError, match="prints the date"):
        job.run(settings)
    monkeypatch.setattr(Tomorrow, "days", 0)
    assert job.run(settings)["adapters"] == summary["adapters"]


def test_a_run_on_prompts_alone(tmp_path, monkeypatch):
    from alphaspin.api import evaluate

    monkeypatch.chdir(tmp_path)
    (tmp_path / "shorter.py").write_text(
        "def judge(pair):\n    return 0.5 + 0.4 * ((len(pair.first) < len(pair.second)) "
        "- (len(pair.first) > len(pair.second)))\n"
    )
    rows = [{"prompt": row["prompt"]} for row in arithmetic(12)]
    data = str(write_rows(tmp_path / "a.jsonl", rows))
    judged = {
        "data": data,
        "method": "sppo",
        "judge": {"kind": "callable", "function": "shorter:judge"},
        "output": str(tmp_path / "run"),
    }
    summary = job.run(config(**judged))
    assert [row["name"] for row in summary["rows"]] == ["base", "0"]
    measured = summary["rows"][1]
    assert {"nll", "sampled", "greedy", "preferred", "margin"}.isdisjoint(measured)
    assert {"judged", "kl", "length", "self_bleu"} <= measured.keys()
    assert evaluate(tmp_path / "run")[1].nll is None
    html = page.write(tmp_path / "run").read_text()
    assert "judged better" in html and "NLL of the demonstrations, nats" not in html
    for needs in ({"control": "sft"}, {"judge": {}}, {"method": "spin", "judge": {}}):
        with pytest.raises(InputError, match="prompts alone serve a judge"):
            job.run(config(**judged | needs | {"output": str(tmp_path / "other")}))
    assert not (tmp_path / "other").exists()
