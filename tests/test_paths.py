"""Files and folders as users have them: from other folders, with `~`, through links, moved."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import arithmetic, save_model, write_rows
from transformers import AutoModelForCausalLM, GenerationConfig

from alphaspin import cli
from alphaspin.api import evaluate, export
from alphaspin.commands import gflownet_job, job, sizing
from alphaspin.commands.exporting import writable
from alphaspin.commands.options import EvaluateOptions, ExportOptions, GFlowNetRun
from alphaspin.commands.played import Played
from alphaspin.config import Config, load_config, recipe_names
from alphaspin.errors import EXIT_INPUT, InputError
from alphaspin.foundation.artefacts import sealed
from alphaspin.foundation.runs import Run, relocated
from alphaspin.judges.function import Function
from alphaspin.judges.server import Server

SETTINGS: dict[str, Any] = {
    "text": {"max_response_tokens": 10},
    "selfplay": {"iterations": 1, "prompts": 6},
    "lora": {"r": 2},
    "train": {"batch_size": 6, "lr": 1e-2},
    "evaluate": {"prompts": 4},
}
JUDGE = "def longer(pair):\n    return 0.5\n"

Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project: base, data and a finished run, all given relative to it."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "base")
    write_rows(folder / "rows.jsonl", arithmetic(30))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made = {"model": "base/", "data": "rows.jsonl", "output": "run", **SETTINGS}
        job.run(Config.model_validate(made))
    return folder


@pytest.fixture
def project(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of base and data, which is the working directory."""
    shutil.copytree(world / "base", tmp_path / "project/base")
    shutil.copy(world / "rows.jsonl", tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "project"


@pytest.fixture
def alphaspin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `alphaspin …`; exit code, and all that was printed, in a line."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["alphaspin", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, " ".join((printed.out + printed.err).split())

    return call


def config(**changes: Any) -> Config:
    return Config.model_validate({"model": "base", "data": "rows.jsonl"} | changes)


def test_every_setting_that_is_a_path(project: Path, tmp_path: Path) -> None:
    (project / "chat.jinja").write_text("")
    home = {key: f"~/project/{file}" for key, file in (("model", "base"), ("data", "rows.jsonl"))}
    judge = {"kind": "reward_model", "model": "~/project/base"}
    made = config(
        **home,
        heldout="./rows.jsonl",
        output="../run/",
        text={"template": "chat.jinja"},
        judge=judge,
        method="sppo",
    )
    base, rows = str(project / "base"), str(project / "rows.jsonl")
    assert (made.model, made.data, made.heldout, made.judge.model) == (base, rows, rows, base)
    assert made.output == str(tmp_path / "run")
    assert made.text.template == str(project / "chat.jinja")
    sampler = GFlowNetRun(adapter="~/a", output="o", model="base", data="~/project/rows.jsonl")
    assert (sampler.adapter, sampler.output) == (str(tmp_path / "a"), str(project / "o"))
    assert (sampler.model, sampler.data) == (base, rows)
    options = EvaluateOptions(heldout="rows.jsonl", model="base", data="~/d")
    assert options.heldout == rows
    tasks = EvaluateOptions(tasks=("a",), include_path="~/t", model="base")
    assert tasks.include_path == str(tmp_path / "t")
    assert options.model == base and options.data == str(tmp_path / "d")
    assert ExportOptions(to="~/out", merge=True).to == str(tmp_path / "out")
    with pytest.raises(ValueError, match="no home folder ~nobody-here"):
        config(output="~nobody-here/run")


def test_what_is_no_path_stays(project: Path) -> None:
    (project / "tiny").mkdir()
    (project / "plain").touch()
    made = config(model="tiny", data="someone/data:part", text={"template": "plain"})
    assert (made.model, made.data, made.text.template) == ("tiny", "someone/data:part", "plain")
    assert config(model="./tiny").model == str(project / "tiny")
    assert config(model="./tiny").digest() != config(model="tiny").digest()
    server = Server(model="base", url="http://h/v1")
    assert server.model == "base"  # a name of the server's, whatever lies here
    assert config(data="~/project/missing.jsonl").data == str(project / "missing.jsonl")


def test_spellings_are_one_run(project: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(project / "base")
    (project / "deep").mkdir()
    (tmp_path / "far").symlink_to(project / "deep")
    (project / "link.jsonl").symlink_to("rows.jsonl")
    spelled = ["base/", "./base", "base//", str(project / "base"), "../project/base", "~/link"]
    spelled += [str(tmp_path / "far/../base"), "~/project/deep/../base"]
    folders = {config(model=name).run_folder() for name in spelled}
    rows = ("./rows.jsonl", "link.jsonl", f"{project}/rows.jsonl")
    folders |= {config(data=name).run_folder() for name in rows}
    assert folders == {config().run_folder()}
    assert config(data="link.jsonl").data == str(project / "link.jsonl"), "its name has the suffix"
    assert config(data="deep/../link.jsonl").data == str(project / "link.jsonl")
    shutil.copytree("base", "other")
    assert config(model="other").run_folder() != config().run_folder()


def test_runs_keep_their_names(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of another spelling, the manifest tells.
    old = {**config().model_dump(mode="json"), "model": "./base/", "data": "rows.jsonl"}
    kept = project / "runs/run-01234567"
    kept.mkdir(parents=True)
    (kept / "manifest.json").write_text(json.dumps({"config": old}))
    damaged = project / "runs/run-00000000"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("[")
    assert config(model=str(project / "base")).run_folder() == Path("runs/run-01234567")
    assert config(seed=1).run_folder() not in (Path("runs/run-01234567"), damaged)
    # A project that was moved as a whole goes on with its runs.
    digest = config().digest()
    shutil.move(project, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert config().digest() == digest


def test_recipes_have_no_paths_of_this_machine() -> None:
    for name in recipe_names():
        recipe = load_config(name)
        assert not any(str(v).startswith("/") for v in (recipe.model, recipe.data, recipe.heldout))


def test_the_hash_counts_and_not_the_place(tmp_path: Path) -> None:
    def identity(base: str, model: str, **more: Any) -> dict[str, Any]:
        return {"base": base, "data": "d", "config": {"model": model, "data": model, **more}}

    Run(tmp_path / "run", identity("a", "/old")).close()
    Run(tmp_path / "run", identity("a", "/new")).close()
    with pytest.raises(InputError, match="its base is 'a', not 'b'"):
        Run(tmp_path / "run", identity("b", "/old"))
    with pytest.raises(InputError, match=r"its config\.seed is None, not 1"):
        Run(tmp_path / "run", identity("a", "/new", seed=1))
    # A judge without a hash here: a name of a server's counts.
    one, other = (identity("a", "/old", judge={"model": name}) for name in ("x", "y"))
    assert relocated(other, one) == other


def test_a_run_is_enough_from_anywhere(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alphaspin: Command
) -> None:
    run = tmp_path / "moved"
    shutil.copytree(world / "run", run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["config"]["model"] == str(world / "base")
    adapter = json.loads((run / "iterations/0/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(world / "base")
    code, printed = alphaspin("evaluate", "~/moved")
    assert code == 0, printed
    assert alphaspin("export", "~/moved", "--to=~/out", "--vllm")[0] == 0
    assert "vllm serve base" in (tmp_path / "out/README.md").read_text()
    assert alphaspin("report", "~/moved", "--to", "~/page.html")[0] == 0
    assert (tmp_path / "page.html").exists() and not (tmp_path / "~").exists()
    # The same run, under other names: nothing is made again.
    before = (run / "metrics.jsonl").read_bytes()
    shutil.copytree(world / "base", "base")
    shutil.copy(world / "rows.jsonl", "demos.jsonl")
    settings = {**SETTINGS, "model": "base", "data": "demos.jsonl", "output": "~/moved"}
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(settings))
    code, printed = alphaspin("train", "~/same.yaml")
    assert code == 0, printed
    assert (run / "metrics.jsonl").read_bytes() == before
    with (tmp_path / "demos.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "one more", "completion": "yes"}) + "\n")
    code, printed = alphaspin("train", "~/same.yaml")
    assert code == EXIT_INPUT and "holds another run: its config.data is" in printed


def test_base_and_data_that_moved(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alphaspin: Command
) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    shutil.copytree(world / "base", tmp_path / "new-base")
    shutil.copy(world / "rows.jsonl", tmp_path / "new.jsonl")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run/manifest.json"
    manifest = json.loads(path.read_text())

    def were(model: str, data: str) -> None:
        settings = {**manifest["config"], "model": model, "data": data}
        path.write_text(json.dumps(sealed({**manifest, "config": settings})))

    were("/gone/base", "/gone/rows.jsonl")
    code, printed = alphaspin("evaluate", "run")
    assert code == EXIT_INPUT
    assert "model = /gone/base: no such file or folder" in printed and "--model FOLDER" in printed
    code, printed = alphaspin("export", "run", "--to=out", "--merge")
    assert code == EXIT_INPUT and "/gone/base" in printed and "--model FOLDER" in printed
    assert alphaspin("export", "run", "--to=out", "--vllm", "--model=new-base")[0] == 0
    exported = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert exported["base_model_name_or_path"] == "new-base"
    code, printed = alphaspin("evaluate", "run", "--model=new-base")
    assert code == EXIT_INPUT and "data = /gone/rows.jsonl: no such" in printed
    assert "--data FILE" in printed and "--heldout FILE" in printed
    code, printed = alphaspin("evaluate", "run", "--model=new-base", "--data=new.jsonl")
    assert code == 0, printed
    write_rows(tmp_path / "wrong.jsonl", arithmetic(30, seed=1))
    code, printed = alphaspin("evaluate", "run", "--model=new-base", "--data=wrong.jsonl")
    assert code == EXIT_INPUT and "not the prompts that this run held out" in printed
    # As versions kept them that knew no absolute paths: of use where they were made.
    were("base", "rows.jsonl")
    code, printed = alphaspin("evaluate", "run")
    assert code == EXIT_INPUT and "model = base: no such folder" in printed
    assert "seen from the folder in which the run was started" in printed
    monkeypatch.chdir(world)
    assert alphaspin("evaluate", tmp_path / "run")[0] == 0
    assert Played.open(tmp_path / "run").config.model == str(world / "base")


def test_a_judge_of_the_working_directory(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/judge_from_here.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path / "a")
    judge = Function(function="judge_from_here:longer")
    here = config(judge=judge.model_dump(), method="sppo")
    monkeypatch.chdir(tmp_path / "b")
    there = config(judge=judge.model_dump(exclude={"folder"}), method="sppo")
    assert here.identity() == there.identity(), "verdicts are found again"
    with pytest.raises(InputError, match=f"folder = {tmp_path / 'b'}"):
        there.judge.load(None)
    identity = here.judge.load(None).identity
    assert identity.startswith("callable:judge_from_here:longer@")


def test_a_missing_base_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model = .*/gone: no such file or folder"):
        job.run(config(model=str(tmp_path / "gone")))
    run = GFlowNetRun(adapter=str(tmp_path), output=str(tmp_path / "o"), model="./gone")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(InputError, match=r"model = .*/gone: no such file or folder"):
        gflownet_job.run(run)
    settings = {"kind": "reward_model", "model": "/gone/judge"}
    with pytest.raises(InputError, match=r"judge\.model = /gone/judge: no such"):
        config(judge=settings, method="sppo").judge.load(None)


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"do_sample": True, "temperature": 0.9, "top_p": 0.6}, []),
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, ["temperature", "top_p"]),
        ({"do_sample": True, "top_p": 0.6, "early_stopping": True}, ["early_stopping"]),
        ({"num_beams": 4, "length_penalty": 0.5, "top_k": 5}, ["top_k"]),
        ({"pad_token_id": -1, "max_new_tokens": 7}, ["pad_token_id"]),
    ],
)
def test_generation_settings_that_transformers_will_not_write(
    world: Path, tmp_path: Path, settings: dict[str, Any], left_out: list[str]
) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    file = tmp_path / "base/generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 1, **settings}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.generation_config.eos_token_id = [1]
    found, out = writable(model.generation_config)
    assert [line.split(" = ")[0] for line in out] == left_out
    model.generation_config = found
    model.save_pretrained(tmp_path / "merged")
    saved = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert saved.eos_token_id == [1]
    for key in settings.keys() - set(left_out):
        assert getattr(saved, key) == settings[key]


def test_merging_says_what_it_left_out(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alphaspin: Command
) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    settings = {"eos_token_id": 1, "do_sample": False, "temperature": 0.9}
    (tmp_path / "base/generation_config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    code, printed = alphaspin("export", world / "run", "--to=out", "--merge", "--model=base")
    assert code == 0 and "left out temperature = 0.9" in printed, printed


def test_a_folder_of_something_else_is_refused_with_a_sentence(tmp_path: Path) -> None:
    Run(tmp_path / "run", {"other": 1}).close()
    with pytest.raises(InputError, match="holds another run: its base is None"):
        Run(tmp_path / "run", {"base": "a", "config": {"model": "m"}})


@pytest.mark.parametrize("name", ["gone/", "gone/base/weights", "./gone", "~/gone"])
def test_what_no_hub_has_is_a_path(project: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"model = /.*/gone.*: no such file or folder"):
        job.run(config(model=name))


@pytest.mark.parametrize("key", ["model", "data", "heldout"])
def test_addresses_are_no_sources(key: str) -> None:
    with pytest.raises(ValueError, match="is an address: give a hub id, or a file"):
        config(**{key: "https://user:secret@host/base"})


def test_home_in_python(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(world))
    assert export("~/run", tmp_path / "out", vllm=True) == tmp_path / "out"
    with pytest.raises(InputError, match=r"/gone: is no run folder"):
        evaluate("~/gone")


def test_a_plan_for_gpt2_and_for_what_cannot_be_sized(
    project: Path, alphaspin: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(project / "gpt2", "gpt2")
    options = ["--model=gpt2", "--data=rows.jsonl", "--lora.r=2"]
    code, printed = alphaspin("plan", *options)
    assert code == 0 and "memory, training" in printed

    def odd(*_: object) -> None:
        raise AttributeError("'Odd' object has no attribute 'hidden_size'")

    monkeypatch.setattr(sizing, "target_modules", odd)
    code, printed = alphaspin("plan", *options)
    assert code == EXIT_INPUT and "--plan cannot size this family" in printed
    assert "`hints` section" in printed and "Traceback" not in printed
    numbers = ("parameters", "hidden", "layers", "vocabulary", "adapter_parameters_per_rank")
    numbers += ("demonstrations", "prompt_tokens", "response_tokens")
    code, printed = alphaspin("plan", *options, *(f"--hints.{key}=9" for key in numbers))
    assert code == 0 and "memory, training" in printed
