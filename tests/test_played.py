"""A run opened again: compared with other judges and prompts, on harness tasks, and exported."""

import contextlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import arithmetic, make_tokenizer, save_model, write_rows
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphaspin import cli
from alphaspin.commands import exporting, job
from alphaspin.commands.played import Played
from alphaspin.config import Config, load_config
from alphaspin.data.chat import ChatFormat
from alphaspin.errors import EXIT_INPUT, EXIT_RESUMABLE
from alphaspin.evaluation import measures
from alphaspin.evaluation.diversity import distinct, self_bleu
from alphaspin.evaluation.winrate import at_equal_length, win_rate
from alphaspin.foundation.artefacts import SEAL, sealed, verifies
from alphaspin.foundation.paths import for_others, packaged
from alphaspin.foundation.runs import Run
from alphaspin.model.backbone import WEIGHTS
from alphaspin.model.load import load_base
from alphaspin.model.settings import LoraConfig

Command = Callable[..., tuple[int, str]]

JUDGE = """
import os, pathlib, signal

LOG = pathlib.Path(__file__).with_name("asked")

def longer(pair):
    with LOG.open("a") as file:
        file.write(f"{pair.first!r} {pair.second!r}\\n")
    ill = pathlib.Path(__file__).with_name("ill")
    if ill.exists() and len(LOG.read_text().splitlines()) > 5:
        if ill.read_text() == "error":
            raise ConnectionError("the judge went away")
        os.kill(os.getpid(), getattr(signal, ill.read_text()))
    one, other = len(pair.first), len(pair.second)
    return 0.5 if one == other else 0.75 if one > other else 0.1
"""
LONGER = ["--judge.kind=callable", "--judge.function=judge_of_length:longer"]
PROMPTS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data and a finished run, none of which a test may change."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    write_rows(folder / "data.jsonl", arithmetic(60))
    job.run(
        Config.model_validate(
            {
                "model": str(folder / "model"),
                "data": str(folder / "data.jsonl"),
                "output": str(folder / "run"),
                "control": "sft",
                "seed": 3,
                "text": {"max_response_tokens": 12},
                "selfplay": {"iterations": 2, "prompts": 12},
                "lora": {"r": 2},
                "train": {"batch_size": 6, "lr": 2e-2},
                "evaluate": {"prompts": PROMPTS},
            }
        )
    )
    return folder


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    """A copy of the run, and the judge of length in the working directory."""
    shutil.copytree(world / "run", tmp_path / "run")
    (tmp_path / "judge_of_length.py").write_text(JUDGE)
    return tmp_path / "run"


@pytest.fixture
def alphaspin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Run `alphaspin …` in a folder of its own; exit code, and all that was printed, in a line."""
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("judge_of_length", None)

    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["alphaspin", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, " ".join((printed.out + printed.err).split())

    return call


def evaluations(run: Path, kind: str = "heldout") -> dict[str, Any]:
    """The one comparison in a run, by policy."""
    (folder,) = (run / "evaluation").glob(f"{kind}-*")
    names = [path for path in folder.iterdir() if path.is_dir()]
    assert all(map(verifies, names))
    (file,) = {path.name for path in names[0].iterdir()} - {"hashes.json"}
    return {path.name: json.loads((path / file).read_text()) for path in names}


def own(run: Path, place: str) -> dict[str, Any]:
    return json.loads((run / place / "evaluation/evaluation.json").read_text())


def no_decoding(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("answers that are on disk were sampled again")


# Comparisons


def test_another_judge_is_asked_about_the_answers_that_are_there(
    run: Path, alphaspin: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(measures, "decode", no_decoding)
        code, printed = alphaspin("evaluate", run, *LONGER)
        assert code == 0, printed
    assert "judge callable:judge_of_length:longer" in printed and "distinct-" in printed, printed
    found = evaluations(run)
    assert list(sorted(found)) == ["0", "1", "base", "sft 0", "sft 1"]
    base = own(run, "base")
    for name, place in (("1", "iterations/1"), ("sft 0", "control/sft/0"), ("base", "base")):
        before, after = own(run, place), found[name]
        changed = {key for key in before if before[key] != after[key]}
        assert changed <= {key for key in before if key.startswith(("jud", "verd", "contr"))}
        lengths = [[len(text) for text in e["answers"]] for e in (after, base)]
        verdicts = [
            0.5 if a == b else 0.825 if a > b else 0.175 for a, b in zip(*lengths, strict=True)
        ]
        if name == "base":
            assert after["verdicts"] == [0.5] * PROMPTS
            assert [after[f"judged{end}"] for end in ("", "_low", "_high")] == [0.5] * 3
            continue
        assert after["verdicts"] == pytest.approx(verdicts) and len(set(verdicts)) > 1
        names = ("", "_low", "_high")
        assert [after[f"judged{n}"] for n in names] == pytest.approx(win_rate(verdicts))
        controlled = at_equal_length(verdicts, *lengths)
        assert [after[f"controlled{n}"] for n in names] == pytest.approx(controlled)
    questions = (run.parent / "asked").read_text().splitlines()
    assert len(questions) == len(set(questions))
    page = (run / "report.html").read_text()
    assert f"Compared with the base on {PROMPTS} held-out prompts" in page
    assert "judge_of_length:longer" in page and "95 % confidence intervals" in page
    before = contents(run)
    code, again = alphaspin("evaluate", run, *LONGER)
    assert code == 0 and again[again.index("8 held") :] == printed[printed.index("8 held") :]
    assert contents(run) == before
    assert (run.parent / "asked").read_text().splitlines() == questions


def contents(run: Path) -> dict[Path, bytes]:
    """All of a run's files but the lock, which names its last holder."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name != "lock")
    return {path: path.read_bytes() for path in files}


def test_measures_by_hand(world: Path, run: Path) -> None:
    """KL from PEFT and transformers alone; length and diversity from the answers."""
    after = own(run, "iterations/1")
    base = AutoModelForCausalLM.from_pretrained(world / "model").eval()
    plain = AutoModelForCausalLM.from_pretrained(world / "model")
    policy = PeftModel.from_pretrained(plain, run / "iterations/1/adapter").eval()
    played = Played.open(run)
    _, chat = played.load(torch.device("cpu"))
    drift: list[float] = []
    for demo, answer in zip(played.heldout(chat), after["answer_tokens"], strict=True):
        ids = torch.tensor([*demo.prompt.tolist(), *answer])[None]
        with torch.no_grad():
            ours, theirs = (m(input_ids=ids).logits[0].log_softmax(-1) for m in (policy, base))
        at = range(len(demo.prompt) - 1, ids.shape[1] - 1)
        drift.append(sum((ours - theirs)[i, ids[0, i + 1]].item() for i in at))
    assert after["kl"] == pytest.approx(np.mean(drift), abs=1e-4) and abs(after["kl"]) > 0.01
    assert after["kl_se"] == pytest.approx(np.std(drift, ddof=1) / PROMPTS**0.5, abs=1e-4)
    assert after["length"] == np.mean([len(answer) for answer in after["answer_tokens"]])
    assert after["distinct_2"] == distinct(after["answers"], 2)
    assert after["self_bleu"] == self_bleu(after["answers"], 3)
    assert own(run, "base")["kl"] == 0


def test_fewer_prompts_and_other_ones(world: Path, run: Path, alphaspin: Command) -> None:
    code, printed = alphaspin("evaluate", run, "--prompts=3", "--iterations=1")
    assert code == 0 and f"3 held-out prompts: set aside from {world}" in printed, printed
    found = evaluations(run)
    assert sorted(found) == ["1", "base", "sft 1"]
    whole = own(run, "iterations/1")
    assert found["1"]["answers"] == whole["answers"][:3]  # from the same random numbers
    assert found["1"]["nll"] == pytest.approx(-np.mean(whole["demonstration_logps"][:3]))
    shutil.rmtree(run / "evaluation")
    other = write_rows(run.parent / "other.jsonl", arithmetic(5, seed=7))
    code, printed = alphaspin("evaluate", run, f"--heldout={other}", "--iterations", "0", "1")
    assert code == 0 and "trained on" not in printed, printed
    found = evaluations(run)
    assert sorted(found) == ["0", "1", "base", "sft 0", "sft 1"]
    assert {len(e["answers"]) for e in found.values()} == {5}
    # The judge of the configuration is exact match, which a random model never wins.
    assert found["1"]["judge"] == "verifiable:None" and found["1"]["judged"] == 0.5


def test_prompts_that_were_trained_on_are_told(world: Path, run: Path, alphaspin: Command) -> None:
    own = f"--heldout={world / 'data.jsonl'}", "--prompts=2", "--iterations=0"
    code, printed = alphaspin("evaluate", run, *own)
    assert code == 0 and f"{60 - PROMPTS} of 60 held-out prompts were trained on" in printed
    code, printed = alphaspin("evaluate", run, *own, f"--data={packaged('tiny/nothing.jsonl')}")
    assert code == 0 and "were trained on cannot be told" in printed, printed


def test_a_run_that_has_not_ended(run: Path, alphaspin: Command) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["adapters"] = {"train/0": manifest["adapters"]["train/0"]}
    (run / "manifest.json").write_text(json.dumps(sealed(manifest)))
    shutil.rmtree(run / "iterations/1")
    shutil.rmtree(run / "control")
    (run / "summary.json").unlink()
    code, printed = alphaspin("evaluate", run, *LONGER)
    assert code == 0 and "the report is written when the run ends" in printed, printed
    assert sorted(evaluations(run)) == ["0", "base"]
    code, printed = alphaspin("evaluate", run, "--iterations", "0", "1")
    assert code == EXIT_INPUT and "iteration 1: not finished" in printed


def test_a_judge_that_fails_half_way_is_asked_for_the_rest(run: Path, alphaspin: Command) -> None:
    ill = run.parent / "ill"
    ill.write_text("error")
    with pytest.raises(ConnectionError):
        alphaspin("evaluate", run, *LONGER)
    ill.write_text("SIGTERM")
    code, printed = alphaspin("evaluate", run, *LONGER)
    assert code == EXIT_RESUMABLE and "the same command goes on from here" in printed
    ill.unlink()
    assert alphaspin("evaluate", run, *LONGER)[0] == 0
    questions = (run.parent / "asked").read_text().splitlines()
    repeated = [q for q in set(questions) if questions.count(q) > 1]
    assert repeated == [questions[5]]  # the one that got no answer


def test_a_run_that_somebody_works_in_is_left_alone(run: Path, alphaspin: Command) -> None:
    identity = json.loads((run / "manifest.json").read_text())["identity"]
    with contextlib.closing(Run(run, identity)):
        code, printed = alphaspin("evaluate", run)
        assert code == EXIT_INPUT and "is working in this run folder" in printed
    assert not (run / "evaluation").exists()


def test_what_is_not_the_runs_is_refused(world: Path, run: Path, alphaspin: Command) -> None:
    def told(*arguments: Any) -> str:
        code, printed = alphaspin("evaluate", *arguments)
        assert code == EXIT_INPUT and "Traceback" not in printed, printed
        return printed

    assert "is no run folder" in told(run.parent)
    assert f"there are {PROMPTS} held-out prompts" in told(run, "--prompts=50")
    assert "iterations = 0 last: expected numbers" in told(run, "--iterations", "0", "last")
    assert "did you mean --judge.kind" in told(run, "--judge.kid=server")
    assert "--judge.url" in told(run, "--judge.kind=server")
    weights = run / "iterations/1/adapter" / WEIGHTS
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1])
    assert f"iterations/1/adapter/{WEIGHTS} is damaged; restore it" in told(run)
    shutil.rmtree(weights.parent)
    shutil.copytree(run / "iterations/0/adapter", weights.parent)
    assert "iterations/1/adapter: it is iterations/0/adapter; restore it" in told(run)
    shutil.rmtree(weights.parent)
    shutil.copytree(world / "run/iterations/1/adapter", weights.parent)

    manifest = json.loads((run / "manifest.json").read_text())

    def edited(**config: Any) -> str:
        changed = {**manifest, "config": {**manifest["config"], **config}}
        (run / "manifest.json").write_text(json.dumps(sealed(changed)))
        return told(run)

    shutil.copytree(world / "model", run.parent / "model")
    state = load_file(run.parent / "model/model.safetensors")
    state["model.norm.weight"] += 1e-3
    save_file(state, run.parent / "model/model.safetensors", metadata={"format": "pt"})
    assert "is not the base of this run" in edited(model=str(run.parent / "model"))
    rows = write_rows(run.parent / "data.jsonl", arithmetic(60, seed=1))
    assert "not the prompts that this run held out" in edited(data=str(rows))
    del manifest["config"]
    (run / "manifest.json").write_text(json.dumps(sealed(manifest)))
    assert "the command that made the run adds it" in told(run)
    (run / "manifest.json").write_text("{")
    assert "damaged" in told(run)


def test_a_record_that_was_edited_or_is_anothers_is_not_believed(
    run: Path, alphaspin: Command
) -> None:
    """Summary, comparison, manifest and check: each edited, unsealed, and put elsewhere."""
    assert alphaspin("evaluate", run, "--judge.kind=verifiable")[0] == 0
    (about,) = run.glob("evaluation/*/about.json")
    report, verified = run / "report.html", run / "verified.json"
    names = (run / "summary.json", about, run / "manifest.json", verified)
    kept = {path: path.read_text() for path in names}

    def edited(path: Path, *, cut: bool = False, **changes: Any) -> None:
        """Written as if by hand: what is not told stays, the seal too unless it is cut out."""
        content = {**json.loads(kept[path]), **changes}
        path.write_text(json.dumps({k: v for k, v in content.items() if k != SEAL or not cut}))

    def restore(path: Path) -> None:
        path.write_text(kept[path])

    summary = json.loads(kept[names[0]])
    rows = [row | {"nll": row["nll"] / 2} for row in summary["rows"]]
    without = [{k: v for k, v in row.items() if k != "nll"} for row in summary["rows"]]
    for changes in ({"rows": rows}, {"rows": without}, {"alarms": []}, {"of": {}}):
        for cut in (False, True):
            if changes.get("alarms") == summary["alarms"] and not cut:
                continue
            edited(names[0], cut=cut, **changes)
            code, printed = alphaspin("report", run)
            assert code == EXIT_INPUT and "summary.json: it is not as it was written" in printed
    other = sealed({**summary, "of": {**summary["of"], "run": "0" * 64}})
    names[0].write_text(json.dumps(other))
    assert "it is summary.json of another run" in alphaspin("report", run)[1]
    restore(names[0])

    for cut in (False, True):
        edited(about, cut=cut, prompts=5000)
        code, printed = alphaspin("report", run)
        assert code == 0 and "is left out" in printed and "about.json: it is not as" in printed
        assert "5000" not in report.read_text() and "5,000" not in report.read_text()
        code, printed = alphaspin("export", run, f"--to={run.parent / f'out{cut}'}", "--vllm")
        assert code == 0 and "about.json: it is not as it was written" in printed
        card = (run.parent / f"out{cut}" / "README.md").read_text()
        assert "5000" not in card and card.count("Held-out measures") == 1
    assert alphaspin("evaluate", run, "--judge.kind=verifiable")[0] == 0
    assert about.read_text() == kept[about]

    manifest = json.loads(kept[names[2]])
    for command in (["report", run], ["evaluate", run], ["export", run, "--to=out", "--vllm"]):
        edited(names[2], cut=True, config={**manifest["config"], "control": "none"})
        code, printed = alphaspin(*command)
        assert code == EXIT_INPUT and "manifest.json: was edited" in printed, command
    restore(names[2])

    edited(verified, packed="because I say so")
    code, printed = alphaspin("evaluate", run, "--judge.kind=verifiable")
    assert code == 0
    assert "verified.json:itisnotasitwaswritten" in "".join(printed.split())


def test_metrics_that_are_lost_or_edited_are_told(run: Path, alphaspin: Command) -> None:
    file, page = run / "metrics.jsonl", run / "report.html"
    lines = file.read_text().splitlines(keepends=True)
    assert alphaspin("report", run)[0] == 0
    whole = page.read_text()
    assert "were edited" not in whole
    nth = next(k for k, line in enumerate(lines) if '"train/1"' in line)
    record = json.loads(lines[nth])
    one = json.dumps({**record, "loss": record["loss"] / 2}) + "\n"
    for changed, stages in (
        ([*lines[:nth], one, *lines[nth + 1 :]], "train/1"),
        (lines[:nth] + lines[nth + 1 :], "train/1"),
        ([line for line in lines if "control/0" not in line], "control/0"),
        (None, "train/0, train/1, control/0, control/1"),
    ):
        file.unlink() if changed is None else file.write_text("".join(changed))
        assert alphaspin("report", run)[0] == 0
        told = f"metrics.jsonl: the records of {stages} are missing or were edited"
        assert told in " ".join(page.read_text().split())
    # The run's own command cannot bring them back either, and does not hide it.
    job.run(Played.open(run).config.model_copy(update={"output": str(run)}))
    summary = json.loads((run / "summary.json").read_text())
    assert told in summary["alarms"][0] and summary["rows"]
    file.write_text("".join(lines))
    assert alphaspin("report", run)[0] == 0


# Tasks of lm-evaluation-harness

CHOICE = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GENERATE = """
task: sums_said
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["<|end|>"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_harness_tasks(
    world: Path, run: Path, alphaspin: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracies and log-likelihoods by hand from PEFT and transformers; greedy answers too."""
    harness = pytest.importorskip("lm_eval.evaluator")
    monkeypatch.setattr(harness, "add_env_info", lambda results: None)  # lists packages: seconds
    tasks = importlib.import_module("lm_eval.tasks")  # its index of 14,000 tasks: more seconds
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(run.parent / "cache"))
    folder = run.parent / "tasks"
    folder.mkdir()
    questions = [
        {"question": f"add {k} and {k + 2}:", "choices": ["it is 7", "yes", "12"], "gold": k % 3}
        for k in range(9)
    ]
    rows = write_rows(folder / "rows.jsonl", questions)
    for name, text in (("sums", CHOICE), ("said", GENERATE)):
        (folder / f"{name}.yaml").write_text(text.format(rows=rows))
    command = ["evaluate", run, "--tasks", "sums", "sums_said", f"--include_path={folder}"]
    code, printed = alphaspin(*command, "--iterations=1")
    assert code == 0, printed
    found = evaluations(run, "tasks")
    assert sorted(found) == ["1", "base", "sft 1"]
    tokenizer = make_tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    seen: set[float] = set()
    for name in ("base", "1"):
        model = AutoModelForCausalLM.from_pretrained(world / "model")
        if name != "base":
            model = PeftModel.from_pretrained(model, run / "iterations/1/adapter")
        model.eval()
        hits = 0
        for sample in found[name]["samples"]["sums"]:
            question = sample["doc"]
            scores: list[float] = []
            for choice in question["choices"]:
                start, whole = ids(question["question"]), ids(f"{question['question']} {choice}")
                with torch.no_grad():
                    logp = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
                at = range(len(start), len(whole))
                scores.append(sum(logp[i - 1, whole[i]].item() for i in at))
            reported = [float(response[0]) for response in sample["filtered_resps"]]
            assert reported == pytest.approx(scores, abs=1e-4)
            seen.add(round(scores[0], 3))
            hits += int(np.argmax(scores)) == question["gold"]
        assert found[name]["results"]["sums"]["acc,none"] == pytest.approx(hits / 9)
        for sample in found[name]["samples"]["sums_said"]:
            prompt = torch.tensor([ids(sample["doc"]["question"])])
            said = model.generate(
                input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=0
            )
            expected = tokenizer.decode(said[0, prompt.shape[1] :], skip_special_tokens=True)
            assert sample["filtered_resps"][0] == expected
    assert len(seen) > 9  # the adapter moved them
    page = (run / "report.html").read_text()
    assert "lm-evaluation-harness" in page and "sums_said" in page
    code, printed = alphaspin(*command[:2], "--tasks", "no_such_task")
    assert code == EXIT_INPUT and "knows no such task" in printed
    code, printed = alphaspin(*command[:2], "--tasks", "sums", "--include_path=nowhere")
    assert code == EXIT_INPUT and "include_path = nowhere: no such folder" in printed


# Export


def logits(model: Any, seed: int = 0) -> torch.Tensor:
    ids = torch.from_numpy(np.random.default_rng(seed).integers(5, 300, (3, 12)))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def test_export_merged(world: Path, run: Path, alphaspin: Command) -> None:
    code, printed = alphaspin("export", run, "--to=out", "--merge", "--iteration=0")
    assert code == 0 and "the adapter added, in float32" in printed, printed
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    apart = logits(base)
    wanted = logits(PeftModel.from_pretrained(base, run / "iterations/0/adapter"))
    merged = AutoModelForCausalLM.from_pretrained("out")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-4)
    assert (wanted - apart).abs().max() > 0.01
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert merged.generation_config.eos_token_id in (1, [1])
    card = ModelCard.load(Path("out/README.md"))
    assert card.data.library_name == "transformers" and card.data.license is None
    manifest = json.loads((run / "manifest.json").read_text())
    for digest in (*manifest["adapters"].values(), manifest["identity"]["base"]):
        assert digest in card.text
    assert "2 iterations of SPIN" in card.text and "wins vs base %" in card.text
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    again = Config.model_validate(recipe)
    assert again.identity() == for_others(Played.open(run).config).identity()
    assert card.data.base_model is None  # a path is no id
    code, printed = alphaspin("export", run, "--to=out", "--merge")
    assert code == EXIT_INPUT and "to = out: exists already" in printed
    code, printed = alphaspin("export", run, "--to=other", "--vllm", "--iteration=7")
    assert code == EXIT_INPUT and "iteration 7: not finished" in printed
    code, printed = alphaspin("export", run, "--to=other", "--merge", "--vllm")
    assert code == EXIT_INPUT and "choose one of --merge and --vllm" in printed
    assert not Path("other").exists()


def test_export_for_vllm(world: Path, run: Path, alphaspin: Command) -> None:
    """What vLLM's PEFTHelper and LoRAModel ask of the files; PEFT loads them."""
    assert alphaspin("evaluate", run, *LONGER)[0] == 0
    code, printed = alphaspin("export", run, "--to=sub/out", "--vllm")
    assert code == 0, printed
    config = json.loads(Path("sub/out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (2, 32, "none")
    assert config["base_model_name_or_path"] == "model"
    assert not config["modules_to_save"] and not config["use_dora"]
    state = load_file(f"sub/out/{WEIGHTS}")
    for name in state:
        module, kind, last = name.removeprefix("base_model.model.").rsplit(".", 2)
        assert last == "weight" and kind in ("lora_A", "lora_B") and name != module
        assert module in config["target_modules"]
    assert len(state) == 2 * len(config["target_modules"])
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    wanted = logits(PeftModel.from_pretrained(base, run / "iterations/1/adapter"))
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    assert torch.equal(logits(PeftModel.from_pretrained(base, "sub/out")), wanted)
    text = Path("sub/out/README.md").read_text()
    assert "--max-lora-rank 8" in text and "judge callable:judge_of_length:longer" in text
    assert "at equal length %" in text
    assert sorted(p.name for p in Path("sub").iterdir()) == ["out"]


@pytest.mark.parametrize("family", ["gemma", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_ties_and_precision(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Each weight is the rounded exact sum; embeddings are untouched and stay tied."""
    save_model(tmp_path / "model", family)
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").to(dtype).save_pretrained(
        tmp_path / "model"
    )
    backbone, tokenizer = load_base(
        str(tmp_path / "model"), dtype="fp32", device=torch.device("cpu")
    )
    backbone.add_adapter("policy", LoraConfig(r=3, alpha=5), seed=0, iteration=0)
    torch.manual_seed(0)
    state = {k: 0.1 * torch.randn_like(v) for k, v in backbone.adapter_state("policy").items()}
    backbone.set_adapter_state("policy", state)
    (tmp_path / "adapter").mkdir()
    backbone.save_adapter("policy", tmp_path / "adapter")
    chat = ChatFormat.create(tokenizer)
    told = exporting._write_merged(backbone.path, tmp_path / "adapter", chat, tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert after.dtype == dtype and str(dtype).removeprefix("torch.") in told
    tied = before.config.tie_word_embeddings
    assert tied == family.startswith("gemma")
    assert (after.lm_head.weight is after.model.embed_tokens.weight) == tied
    old, new = before.state_dict(), after.state_dict()
    exact: dict[str, torch.Tensor] = {}
    moved = lost = 0.0
    for name in old:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        exact[name] = old[name].double()
        if f"{key}.lora_A.weight" in state:
            product = (
                state[f"{key}.lora_B.weight"].double() @ state[f"{key}.lora_A.weight"].double()
            )
            exact[name] = exact[name] + product * 5 / 3
            moved += (product * 5 / 3).square().sum().item()
            lost += (new[name].double() - exact[name]).square().sum().item()
        torch.testing.assert_close(
            new[name],
            exact[name].to(dtype),
            rtol=1e-6 if dtype == torch.float32 else 2**-7,
            atol=1e-7,
        )
    assert sum(not torch.equal(old[name], new[name]) for name in old) == len(state) // 2
    share = 100 * (lost / moved) ** 0.5
    if dtype == torch.float32:
        assert share < 1e-3 and "rounding" not in told
    else:
        assert float(told.split("update by ")[1].split(" ")[0]) == pytest.approx(share, rel=0.1)
        assert share > 0.1
    wanted = PeftModel.from_pretrained(before.float(), tmp_path / "adapter")
    tolerance = 1e-4 if dtype == torch.float32 else 0.03 * logits(wanted).abs().max().item()
    torch.testing.assert_close(logits(after.float()), logits(wanted), rtol=0, atol=tolerance)


def test_the_card_names_a_base_of_the_hub(run: Path) -> None:
    played = Played.open(run)
    hub = played.config.model_copy(update={"model": "someone/base-7b"})
    played = Played(run, hub, played.manifest)
    card = ModelCard(exporting._card(played, played.policies()[1], "x", False, "an adapter"))
    assert card.data.base_model == "someone/base-7b" and card.data.library_name == "peft"
    assert "vllm serve someone/base-7b" in card.text


def test_the_embedded_model_too(tmp_path: Path, alphaspin: Command) -> None:
    config = load_config("tiny").model_dump(mode="json")
    config |= {"output": str(tmp_path / "tiny"), "control": "none", "heldout": None}
    config["selfplay"] |= {"iterations": 1, "prompts": [8]}
    config["evaluate"] |= {"prompts": 0}
    config["train"] |= {"batch_size": 4, "lr": [1e-2]}
    job.run(Config.model_validate(config))
    assert alphaspin("export", "tiny", "--to=merged", "--merge")[0] == 0
    assert alphaspin("export", "tiny", "--to=adapter", "--vllm")[0] == 0
    base, merged = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (packaged("tiny/model"), "merged")
    )
    before = logits(base)
    wanted = logits(PeftModel.from_pretrained(base, "adapter"))
    assert (wanted - before).abs().max() > 20 * (logits(merged) - wanted).abs().mean()
    code, printed = alphaspin("evaluate", "tiny")
    assert code == EXIT_INPUT and "this run held out nothing; give --heldout" in printed
