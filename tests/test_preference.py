"""SPPO and RSPO as whole runs: what is trained on, what a failing judge or a kill leaves behind.

The judge is intransitive, keeps a list of what it was asked, and fails on command.
"""

import json
import math
import os
import signal
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_resume
import torch
from faults.forks import fork
from helpers import arithmetic, make_model, make_tokenizer, save_model, tokens, write_rows
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphaspin.commands import job
from alphaspin.config import Config, load_config
from alphaspin.data.chat import ChatFormat
from alphaspin.data.demonstrations import hold_out, load_demonstrations
from alphaspin.errors import EXIT_INPUT, EXIT_RESUMABLE, EXIT_STOPPED, InputError
from alphaspin.foundation.artefacts import HASHES, TEMPORARY, file_hash
from alphaspin.foundation.runs import Run
from alphaspin.model.load import load_base
from alphaspin.model.settings import LoraConfig
from alphaspin.model.stepper import mixture
from alphaspin.sampling.answer import Answer, Draw
from alphaspin.sampling.decode import Request, decode, uniforms
from alphaspin.sampling.settings import SamplingConfig
from alphaspin.schema import explain

JUDGE = '''
import json, os, pathlib, signal, zlib

HERE = pathlib.Path(__file__).parent

def cyclic(pair):
    """Rock, paper, scissors by checksum; `plan` says at which question to do what."""
    log, plan = HERE / "asked", HERE / "plan"
    asked = len(log.read_text().splitlines()) if log.exists() else 0
    if plan.exists():
        number, action = json.loads(plan.read_text())
        if asked == number:
            plan.unlink()
            if action == "error":
                raise ConnectionError("the judge went away")
            if action == "nonsense":
                return 2.0
            os.kill(os.getpid(), getattr(signal, action))
    with log.open("a") as file:
        file.write(json.dumps([pair.prompt.messages, pair.first, pair.second]) + "\\n")
    one, other = (zlib.crc32(text.encode()) % 3 for text in (pair.first, pair.second))
    return [0.5, 0.8, 0.2][(one - other) % 3]
'''

RSPO = ["--method=rspo", "--preference.lam=0.2"]
ETA, K, PROMPTS = 4.0, 4, 8


def arguments(folder: Path, run: Path, *options: str) -> list[str]:
    """A command line with the judge of the working directory."""
    return [
        "train",
        str(folder / "recipe.yaml"),
        f"--model={folder / 'model'}",
        f"--data={folder / 'data.jsonl'}",
        f"--output={run}",
        *options,
    ]


RECIPE = f"""
method: sppo
text: {{max_response_tokens: 8}}
selfplay: {{iterations: 2, prompts: {PROMPTS}}}
judge: {{kind: callable, function: "cyclic_judge:cyclic", both_orders: false}}
preference: {{responses: {K}, eta: {ETA}}}
lora: {{r: 2}}
train: {{batch_size: 4, checkpoint_every: 1, lr: 1e-2}}
sampling: {{shard_size: 9, batch_size: 5}}
evaluate: {{prompts: 3}}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    write_rows(folder / "data.jsonl", arithmetic(20))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def child(folder: Path, *rest: Any) -> None:
    """In a fresh process with `folder` as the working directory."""
    os.chdir(folder)
    test_resume.child(*rest)


def play(
    folder: Path,
    command: list[str],
    plan: tuple[int, str] | None = None,
    event: tuple[str, int] | None = None,
) -> tuple[int, str]:
    """One start of the command; `plan` is for the judge. Exit code and all that was printed."""
    folder.mkdir(exist_ok=True)
    (folder / "cyclic_judge.py").write_text(JUDGE)
    if plan:
        (folder / "plan").write_text(json.dumps(plan))
    log = folder / "log"
    process = fork(child, folder, command, event, "SIGKILL", str(log))
    process.start()
    process.join(180)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode, " ".join(log.read_text().split())


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines()


def result(run: Path) -> dict[str, str]:
    """Hashes of all that must not depend on what went wrong on the way."""
    kinds = ("adapter", "responses", "reference", "evaluation")
    files = [p for kind in kinds for p in run.rglob(f"{kind}/**/*") if p.is_file()]
    found = {str(path.relative_to(run)): file_hash(path) for path in files}
    summary = json.loads((run / "summary.json").read_text())
    for part in ("rows", "adapters", "pairs"):
        found[part] = json.dumps(summary[part])
    assert len(set(summary["adapters"].values())) == 2, "each iterate is a new adapter"
    assert {Path(name).parts[2] for name in found if name.startswith("iter")} == set(kinds)
    return found


@pytest.fixture(scope="module")
def world(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Folder of an undisturbed run of RSPO, which has all phases, and its result."""
    folder = tmp_path_factory.mktemp("world")
    code, printed = play(folder, arguments(inputs, folder / "run", *RSPO))
    assert code == 0, printed
    return folder, result(folder / "run")


def verdict(one: str, other: str) -> float:
    """The judge's table, written again."""
    beats = (zlib.crc32(one.encode()) - zlib.crc32(other.encode())) % 3
    return 0.5 if one == other else {0: 0.5, 1: 0.8, 2: 0.2}[beats]


def texts(folder: Path, run: Path, iteration: int, kind: str = "responses") -> dict[int, list[str]]:
    """The responses of an iteration by example, decoded without the package's reader."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    found: dict[int, list[str]] = {}
    for path in sorted((run / f"iterations/{iteration}/{kind}").rglob("*.safetensors")):
        data = load_file(path)
        parts = np.split(data["tokens"], data["length"].cumsum()[:-1])
        for example, ids in zip(data["example"].tolist(), parts, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            found.setdefault(example, []).append(text)
    return found


def records(run: Path, stage: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [r for r in lines if r["stage"] == stage and "alarm" not in r]


def test_a_run_says_what_it_did(world: tuple[Path, dict[str, str]]) -> None:
    folder, _ = world
    run = folder / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["base", "0", "1"]
    for row in summary["rows"]:
        assert 0 <= row["judged"] <= 1 and 1 <= row["length"] <= 8
        assert math.isfinite(row["kl"])
    assert summary["rows"][0]["judged"] == 0.5 and summary["rows"][0]["kl"] == 0
    judged = summary["paired"]["covariance"]["judged"]
    errors = [row["judged_se"] for row in summary["rows"]]
    assert [judged[k][k] ** 0.5 for k in range(3)] == pytest.approx(errors, abs=1e-9)
    for pairs in summary["pairs"]:
        assert pairs["prompts"] == PROMPTS == pairs["pairs"] + pairs["ties"]
        assert pairs["p_best"] > 0.5 > pairs["p_worst"]
    printed = (folder / "log").read_text()
    for column in ("judge", "KL to", "tokens", "verdicts", "without"):
        assert column in printed
    questions = asked(folder)
    assert len(questions) == len(set(questions)) > 20
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["identity"]["judge"].startswith("callable:cyclic_judge:cyclic@")
    page = (run / "report.html").read_text()
    assert "judged better than base" in page and summary["config"]["method"].upper() in page
    folders = [path.parent for path in run.rglob("*.safetensors")]
    assert all((path / HASHES).is_file() for path in folders)


VARIANTS = {
    "soft": [],
    "single": ["--preference.labels=single"],
    "hard": ["--preference.labels=hard"],
    "reverse_kl": ["--method=rspo"],
    "forward_kl": ["--method=rspo", "--preference.regulariser=forward_kl"],
    "chi2": ["--method=rspo", "--preference.regulariser=chi2", "--preference.clamp=1"],
    "entropy": ["--method=rspo", "--preference.regulariser=entropy", "--preference.lam=0.1"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_at_the_start_is_the_papers(inputs: Path, tmp_path: Path, variant: str) -> None:
    """At t = 0 policy, previous iterate and base are one: what is left are the targets and R."""
    run = tmp_path / "run"
    options = ["--selfplay.iterations=1", "--train.batch_size=64", "--train.lr=1e-3"]
    code, printed = play(tmp_path, arguments(inputs, run, *options, *VARIANTS[variant]))
    assert code == 0, printed
    targets: list[float] = []
    for group in texts(inputs, run, 0).values():
        assert len(group) == K
        rates = [sum(verdict(a, b) for b in group) / K for a in group]
        best, worst = rates.index(max(rates)), rates.index(min(rates))
        if max(rates) > min(rates) + 1e-9:
            p = verdict(group[best], group[worst])
            pair = {"single": (p, 1 - p), "hard": (1.0, 0.0)}.get(
                variant, (rates[best], rates[worst])
            )
            targets += [ETA * (p - 0.5) for p in pair]
    assert len(targets) >= 6
    (first,) = records(run, "train/0")
    expected = float(np.mean(np.square(targets)))
    if variant == "entropy":
        squares = [2 * 0.1 * lp**2 for lp in (first["logps/chosen"], first["logps/rejected"])]
        assert first["loss"] > expected + sum(squares) / 2  # the mean square exceeds the square
    else:
        ratio = 2 * 0.5 if variant in ("forward_kl", "chi2") else 0.0
        assert first["loss"] == pytest.approx(expected + ratio, rel=1e-5)


def test_a_mixture_reference_is_normalised_by_the_responses(inputs: Path, tmp_path: Path) -> None:
    """The first loss at t = 1, from PEFT and transformers: the policy is π_0, π_ref the mixture."""
    run, alpha = tmp_path / "run", 0.6
    options = ["--train.batch_size=64", "--train.epochs=4", "--train.lr=3e-2"]
    code, printed = play(tmp_path, arguments(inputs, run, *options, f"--reference.alpha={alpha}"))
    assert code == 0 and "mean log Z" in printed, printed
    base: Any = AutoModelForCausalLM.from_pretrained(inputs / "model")
    chat = ChatFormat.create(make_tokenizer())
    demos, _ = load_demonstrations(str(inputs / "data.jsonl"), chat, Config().text)
    demos, _ = hold_out(demos, 3, 0)
    answers: dict[int, list[Any]] = {}
    for path in (run / "iterations/1/responses").rglob("*.safetensors"):
        data = load_file(path)
        parts = np.split(data["tokens"], data["length"].cumsum()[:-1])
        for example, ids in zip(data["example"].tolist(), parts, strict=True):
            answers.setdefault(example, []).append(ids)

    def logps(model: Any) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for e, group in answers.items():
            values: list[float] = []
            for answer in group:
                ids = torch.from_numpy(np.concatenate([demos[e].prompt, answer])).long()
                with torch.no_grad():
                    table = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
                at = torch.arange(len(ids) - len(answer), len(ids))
                values.append(table[at - 1, ids[at]].sum().item())
            found[e] = np.array(values)
        return found

    lp_base = logps(base)
    lp = logps(PeftModel.from_pretrained(base, run / "iterations/0/adapter").eval())
    losses: list[float] = []
    shifts: list[float] = []
    for e, group in texts(inputs, run, 1).items():
        log_w = (1 - alpha) * (lp_base[e] - lp[e])  # drawn from π_0
        log_z = math.log(np.exp(log_w).mean())
        rates = [sum(verdict(a, b) for b in group) / K for a in group]
        sides = (rates.index(max(rates)), rates.index(min(rates)))
        if max(rates) > min(rates) + 1e-9:
            shifts.append(log_z)
            for k in sides:
                reference = alpha * lp[e][k] + (1 - alpha) * lp_base[e][k] - log_z
                losses.append((lp[e][k] - reference - ETA * (rates[k] - 0.5)) ** 2)
    assert max(map(abs, shifts)) > 0.05, "too small a shift for this test to see"
    first = records(run, "train/1")[0]
    assert first["loss"] == pytest.approx(float(np.mean(losses)), rel=1e-3)


def test_training_moves_towards_the_targets(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--selfplay.iterations=1", "--train.epochs=20", "--preference.labels=hard"]
    assert play(tmp_path, arguments(inputs, run, *options))[0] == 0
    done = records(run, "train/0")
    assert done[-1]["loss"] < done[0]["loss"] / 2
    assert done[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert done[-1]["rewards/margins"] > 0.4  # in units of P̂: aims at ½ - -½


def test_responses_do_not_depend_on_how_the_work_is_cut(inputs: Path, tmp_path: Path) -> None:
    cuts = (["--sampling.batch_size=3"], ["--sampling.batch_size=64", "--sampling.shard_size=64"])
    found: list[dict[int, list[str]]] = []
    for number, cut in enumerate(cuts):
        folder = tmp_path / str(number)
        options = ["--selfplay.iterations=1", "--evaluate.prompts=3"]
        assert play(folder, arguments(inputs, folder / "run", *options, *cut))[0] == 0
        found.append(texts(inputs, folder / "run", 0))
    assert found[0] == found[1]
    assert sum(len(set(group)) == K for group in found[0].values()) > PROMPTS / 2


def test_a_judge_without_a_preference_teaches_nothing(inputs: Path, tmp_path: Path) -> None:
    """A random model is never right: all prompts tie, which is counted, shown and survived."""
    recipe = tmp_path / "ties.yaml"
    recipe.write_text(
        RECIPE.replace(
            'callable, function: "cyclic_judge:cyclic", both_orders: false', "verifiable"
        )
    )
    command = arguments(inputs, tmp_path / "run")
    code, printed = play(tmp_path, [command[0], str(recipe), *command[2:]])
    assert code == 0, printed
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert [(p["pairs"], p["ties"]) for p in summary["pairs"]] == [(0, PROMPTS)] * 2
    assert [row["judged"] for row in summary["rows"]] == [0.5] * 3
    assert summary["rows"][2]["kl"] == 0
    assert any("no pair with a difference" in alarm for alarm in summary["alarms"])


# What goes wrong


@pytest.mark.parametrize(
    ("share", "action", "code", "told"),
    [
        (0.2, "error", 1, "the judge went away"),
        (0.7, "nonsense", EXIT_STOPPED, "verdict 2.0 is not a number in [0, 1]"),
        (0.5, "SIGKILL", -signal.SIGKILL, ""),
        (0.6, "SIGTERM", EXIT_RESUMABLE, "goes on from here"),
    ],
)
def test_no_verdict_is_asked_twice(
    world: tuple[Path, dict[str, str]],
    inputs: Path,
    tmp_path: Path,
    share: float,
    action: str,
    code: int,
    told: str,
) -> None:
    whole, expected = world
    command = arguments(inputs, tmp_path / "run", *RSPO)
    number = int(share * len(asked(whole)))
    found, printed = play(tmp_path, command, (number, action))
    assert found == code and told in printed, printed
    assert number <= len(asked(tmp_path)) <= number + 1  # a signal lets a question be answered
    code, printed = play(tmp_path, command)
    assert code == 0, printed
    assert asked(tmp_path) == asked(whole)  # in all, each once, in the same order
    assert result(tmp_path / "run") == expected
    assert not list((tmp_path / "run").rglob(f"{TEMPORARY}*"))


@pytest.mark.parametrize(
    ("kind", "share"), [("sampling", 0.6), ("training", 0.7), ("scoring", 0.9)]
)
def test_killed_in_any_phase(
    world: tuple[Path, dict[str, str]],
    inputs: Path,
    tmp_path: Path,
    kind: str,
    share: float,
) -> None:
    whole, expected = world
    events = json.loads((whole / "log.events").read_text())
    command = arguments(inputs, tmp_path / "run", *RSPO)
    code, _ = play(tmp_path, command, event=(kind, round(share * events[kind])))
    assert code == -signal.SIGKILL
    assert play(tmp_path, command)[0] == 0
    assert asked(tmp_path) == asked(whole)
    assert result(tmp_path / "run") == expected


# Nash-MD


def test_the_mixture_is_with_the_base(inputs: Path, tmp_path: Path) -> None:
    """Every sampled token against logits of PEFT and transformers, without cache or batch."""
    base = make_model()
    base.load_state_dict(AutoModelForCausalLM.from_pretrained(inputs / "model").state_dict())
    backbone, _ = load_base(str(inputs / "model"), dtype="fp32", device=torch.device("cpu"))
    backbone.add_adapter("policy", LoraConfig(r=4), seed=0, iteration=0)
    state = backbone.adapter_state("policy")
    torch.manual_seed(1)
    backbone.set_adapter_state("policy", {k: 0.3 * torch.randn_like(v) for k, v in state.items()})
    (tmp_path / "adapter").mkdir()
    backbone.save_adapter("policy", tmp_path / "adapter")
    policy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(inputs / "model"), tmp_path / "adapter"
    ).eval()
    random = np.random.default_rng(0)
    prompts = [tokens(random, 2, 9) for _ in range(12)]
    draws = [uniforms(0, 0, "test", i, 10) for i in range(len(prompts))]
    found: dict[float, list[Answer]] = {}
    for m in (0.0, 0.4, 1.0):
        found[m] = decode(
            backbone,
            [
                Request(prompt, mixture("policy", 1 - m), 10, Draw(0, 0, "test", i))
                for i, prompt in enumerate(prompts)
            ],
            stop_ids=frozenset(range(1, 60)),  # so that rows leave the batch early
            config=SamplingConfig(batch_size=6),
        )
        for prompt, noise, answer in zip(prompts, draws, found[m], strict=True):
            ids = torch.from_numpy(np.concatenate([prompt, answer.tokens])).long()[None]
            with torch.no_grad():
                ours, theirs = policy(input_ids=ids).logits[0], base.eval()(input_ids=ids).logits[0]
            assert (ours - theirs).abs().mean() > 0.1, "a mixture of the policy with itself"
            mixed = ((1 - m) * ours + m * theirs).double().softmax(-1)
            for k, token in enumerate(answer.tokens.tolist()):
                below = mixed[len(prompt) - 1 + k].cumsum(-1)
                assert below[token] - mixed[len(prompt) - 1 + k, token] <= noise[k] + 1e-5
                assert noise[k] <= below[token] + 1e-5
    lengths = {len(answer.tokens) for answer in found[0.4]}
    assert len(lengths) > 2
    same = [np.array_equal(a.tokens, b.tokens) for a, b in zip(found[0.0], found[1.0], strict=True)]
    assert not all(same)


NASH = ["--method=nash_md", "--preference.tau=0.2", "--preference.mixture=0.3"]


def test_nash_md(inputs: Path, tmp_path: Path) -> None:
    """The first loss by hand; then a judge that fails in the second iteration."""
    recipe = tmp_path / "nash.yaml"
    recipe.write_text(RECIPE.replace(f"preference: {{responses: {K}, eta: {ETA}}}", ""))

    def command(run: Path) -> list[str]:
        given = arguments(inputs, run, *NASH, "--train.batch_size=64")
        return [given[0], str(recipe), *given[2:]]

    whole = tmp_path / "whole"
    code, printed = play(whole, command(whole / "run"))
    assert code == 0, printed
    summary = json.loads((whole / "run/summary.json").read_text())
    assert [pairs["pairs"] for pairs in summary["pairs"]] == [PROMPTS] * 2
    assert all(math.isfinite(row["kl"]) for row in summary["rows"])

    model = AutoModelForCausalLM.from_pretrained(inputs / "model").eval()
    demos, _ = load_demonstrations(
        str(inputs / "data.jsonl"), ChatFormat.create(make_tokenizer()), Config().text
    )
    demos, _ = hold_out(demos, 3, 0)
    opposed = texts(inputs, whole / "run", 0, "opponents")
    losses: list[float] = []
    for path in (whole / "run/iterations/0/responses").rglob("*.safetensors"):
        data = load_file(path)
        parts = np.split(data["tokens"], data["length"].cumsum()[:-1])
        for example, answer in zip(data["example"].tolist(), parts, strict=True):
            ids = torch.from_numpy(np.concatenate([demos[example].prompt, answer])).long()
            with torch.no_grad():
                logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            steps = range(len(ids) - len(answer), len(ids))
            lp = sum(logps[i - 1, ids[i]].item() for i in steps)
            (text,) = texts(inputs, whole / "run", 0)[example]
            losses.append(-lp * (verdict(text, opposed[example][0]) - 0.5))
    (first,) = records(whole / "run", "train/0")
    assert len(losses) == PROMPTS and any(losses)
    assert first["loss"] == pytest.approx(float(np.mean(losses)), rel=1e-4)

    count = len(asked(whole))
    broken = tmp_path / "broken"
    for number, action in ((count // 3, "error"), (count - 2, "SIGKILL")):
        assert play(broken, command(broken / "run"), (number, action))[0] in (1, -signal.SIGKILL)
    assert play(broken, command(broken / "run"))[0] == 0
    assert asked(broken) == asked(whole)
    one, other = (
        {str(p.relative_to(f)): file_hash(p) for p in f.rglob("*.safetensors")}
        for f in (whole / "run", broken / "run")
    )
    assert one == other and len(one) >= 8


def test_another_judge_is_another_run(world: tuple[Path, dict[str, str]], inputs: Path) -> None:
    whole, expected = world
    more = [*RSPO, "--judge.both_orders"]
    code, printed = play(whole, arguments(inputs, whole / "run", *more))
    assert code == EXIT_INPUT and "its config.judge.both_orders is False, not True" in printed
    assert result(whole / "run") == expected


def test_settings_that_would_have_no_effect_are_refused() -> None:
    def said(**fields: Any) -> str:
        with pytest.raises(ValueError) as error:
            Config.model_validate(fields)
        return explain(error.value, Config)  # pyright: ignore[reportArgumentType]

    for fields, message in (
        ({"method": "sppo", "loss": {"beta": 0.5}}, "loss.beta = (0.5,) has no effect with method"),
        ({"method": "nash_md", "reference": {"alpha": 0.9}}, "reference.alpha = 0.9 has no effect"),
        (
            {"method": "sppo", "reference": {"alpha": 0.9}, "sampling": {"top_k": 5}},
            "needs sampling.temperature = 1",
        ),
        ({"method": "sppo", "selfplay": {"history": 2}}, "selfplay.history = 2 has no effect"),
        ({"preference": {"eta": 5.0}}, "preference.eta = 5 has no effect with method = spin"),
        ({"judge": {"kind": "pairrm"}}, "judge.kind = 'pairrm' has no effect with method = spin"),
        ({"method": "sppo", "preference": {"lam": 1.0}}, "preference.lam = 1 has no effect"),
        ({"method": "sppo", "judge": {"kind": "server"}}, "server needs judge.url"),
        ({"method": "sppo", "judge": {"kind": "callable"}}, "callable needs judge.function"),
        ({"method": "sppo", "judge": {"kind": "reward_model"}}, "needs judge.model"),
        ({"method": "sppo", "judge": {"model": "x"}}, "judge.model = 'x' has no effect with judge"),
        ({"method": "sppo", "preference": {"responses": 1}}, "needs a number >= 2"),
        ({"method": "dpo"}, "spin, sppo, rspo"),
        ({"method": "nash_md", "preference": {"eta": 5.0}}, "preference.eta = 5 has no effect"),
        ({"method": "nash_md", "train": {"epochs": 2}}, "nash_md needs train.epochs = 1"),
    ):
        assert message in said(**fields)


def test_runs_of_earlier_versions_are_found_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest of a version in which every section had the settings of all kinds."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/tiny-036378f6"
    folder.mkdir(parents=True)
    old = json.loads((Path(__file__).parent / "old_manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(old))
    config = load_config("tiny")
    assert config.run_folder() == Path("runs/tiny-036378f6")
    identity = {**old["identity"], "config": config.identity()}
    Run(folder, identity, job.renewed).close()
    with pytest.raises(InputError, match=r"holds another run: its config\.seed"):
        other = config.model_copy(update={"seed": 3}).identity()
        Run(folder, {**identity, "config": other}, job.renewed)
    digests = [Config(method=m).digest() for m in ("spin", "sppo", "rspo", "nash_md")]
    assert all(a != b for a, b in pairwise(sorted(digests)))
