"""What came from somebody else does nothing but what it is for, and nothing of ours goes out."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    arithmetic,
    http_servers,
    make_tokenizer,
    one_iteration,
    save_model,
    write_rows,
)
from safetensors.torch import load_file

import alphaspin.foundation.locks as locks_module
from alphaspin.api import evaluate, export
from alphaspin.commands import exporting, job
from alphaspin.commands.played import Played
from alphaspin.config import Config, load_config
from alphaspin.data.demonstrations import ChatFormat
from alphaspin.errors import InputError, JudgeError
from alphaspin.foundation.artefacts import commit, intact, sealed
from alphaspin.foundation.paths import for_others, published
from alphaspin.foundation.runs import Run
from alphaspin.foundation.section import flat
from alphaspin.model.load import load_base
from alphaspin.report import page as report

KEY = "sk-s3cret"
EVIL = "{{ 7 * 7 }}${7*7}<script>alert(1)</script>|`` ``` `"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its base and its data, with texts that want to be more than texts."""
    folder = tmp_path_factory.mktemp("secret-place")
    save_model(folder / "base")
    rows = arithmetic(30)
    for row in rows:
        row["prompt"] += EVIL
    write_rows(folder / "rows|<b>.jsonl", rows)
    settings = one_iteration(
        folder / "base", folder / "rows|<b>.jsonl", folder / "run", evaluated=4
    )
    job.run(Config.model_validate(settings))
    evaluate(folder / "run")
    return folder


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world / "run", tmp_path / "run"))


@pytest.mark.parametrize("form", ["merge", "vllm"])
def test_what_is_exported_has_no_paths_of_this_machine(
    world: Path, tmp_path: Path, form: str
) -> None:
    folder = export(world / "run", tmp_path / "out", **{form: True})
    for file in folder.rglob("*"):
        assert b"secret-place" not in file.read_bytes(), file
    card = (folder / "README.md").read_text()
    assert "rows\\|&lt;b&gt;.jsonl" in card and "<b>" not in card.split("## Settings")[0]
    assert "| base | base |" in card, "it says which one, as far as that goes"


def test_the_report_has_no_paths_of_this_machine(world: Path) -> None:
    page = report.write(world / "run").read_text()
    assert "secret-place" not in page and "rows|&lt;b&gt;.jsonl" in page
    assert "{{ 7 * 7 }}" in page and "<script>alert(1)" not in page, "texts stay texts"


def test_what_others_are_told() -> None:
    cache = "/home/me/.cache/hub/models--google--gemma-2b/snapshots/abc"
    assert published(cache) == "google/gemma-2b" and published("a/b") == "a/b"
    assert published("/home/me/base") == published("/base") == "base"
    assert published("set aside from /home/me/rows.jsonl") == "set aside from rows.jsonl"
    judge = {"kind": "server", "url": "http://inner:8000/v1", "model": "/srv/judge"}
    sampling = {"engine": "vllm", "url": "http://inner/v1", "model": "/srv/base"}
    config = Config.model_validate(
        {
            "method": "sppo",
            "model": "/home/me/base",
            "heldout": "/home/me/h.jsonl",
            "text": {"template": "/home/me/chat.jinja"},
            "output": "/home/me/run",
            "judge": judge | {"key_variable": "MINE"},
            "sampling": sampling | {"key_variable": "MINE"},
            "evaluate": {"answer": "/a/(.+)"},
        }
    )
    told = json.dumps([config.recipe(), flat(for_others(config).identity())])
    assert not [word for word in ("/home", "/srv", "inner", "MINE") if word in told]
    assert config.recipe()["evaluate"]["answer"] == "/a/(.+)"
    assert config.model == "/home/me/base", "the run itself knows"


def test_a_key_stays_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("MINE", KEY)
    with http_servers() as new:
        url, asked = new(lambda path, body, number: (400, f"bad key {KEY}".encode(), {}))
        config = load_config("tiny-sppo").model_dump(mode="json")
        config |= {"output": str(tmp_path / "run"), "control": "none", "heldout": None}
        config["selfplay"] |= {"iterations": 1, "prompts": [4]}
        config["text"] |= {"max_response_tokens": 4}
        config["preference"] |= {"responses": 2}
        config["evaluate"] |= {"prompts": 2}
        config["train"] |= {"batch_size": 4}
        config["judge"] = {"kind": "server", "url": url, "model": "m", "key_variable": "MINE"}
        with pytest.raises(JudgeError, match="bad key …") as error:
            job.run(Config.model_validate(config))
    assert asked[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(error.value) + "".join(capsys.readouterr())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3 and not any(KEY.encode() in path.read_bytes() for path in files)


def link_file(run: Path, aside: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(aside)


def link_lock(run: Path, aside: Path) -> None:
    (run / "lock").unlink()
    (run / "lock").symlink_to(aside)


def link_folder(run: Path, aside: Path) -> None:
    (run / "iterations/0/checkpoints").symlink_to(aside.parent)


def link_to_nothing(run: Path, aside: Path) -> None:
    (run / "verdicts").unlink(missing_ok=True)
    (run / "verdicts").symlink_to(aside.with_name("new"))


@pytest.mark.parametrize("make", [link_file, link_lock, link_folder, link_to_nothing])
def test_links_in_a_run_folder_are_not_followed(
    run: Path, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    aside = tmp_path / "aside/thesis.txt"
    aside.parent.mkdir()
    aside.write_text("years of work")
    make(run, aside)
    identity = json.loads((run / "manifest.json").read_text())["identity"]
    uses: list[Callable[[], Any]] = [
        lambda: Run(run, identity),
        lambda: evaluate(run),
        lambda: export(run, tmp_path / "out", merge=True),
        lambda: report.write(run),
    ]
    for use in uses:
        with pytest.raises(InputError, match="is a link, which a run folder must not hold"):
            use()
    assert aside.read_text() == "years of work"
    assert [path.name for path in aside.parent.iterdir()] == ["thesis.txt"]


def test_a_run_folder_may_be_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    assert Played.open(tmp_path / "link").policies()


def test_links_to_nothing_are_told(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for place in ("link", "link/deeper"):
        with pytest.raises(InputError, match=r"link: is a link to .*gone, where nothing is: make"):
            Run(tmp_path / place, {})
    with pytest.raises(InputError, match="link: exists already"):
        export(run, tmp_path / "link", vllm=True)
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("stage", ["train/../../x", "train/-1", "control/", "train/0/../../.."])
def test_a_manifest_names_no_other_folders(run: Path, stage: str) -> None:
    file = run / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["adapters"][stage] = "0" * 64
    file.write_text(json.dumps(sealed(manifest)))
    with pytest.raises(InputError, match="damaged at adapter"):
        Played.open(run).policies()


def test_settings_that_are_not_those_of_the_run(run: Path) -> None:
    """Sealed anew by whoever edited them; and a summary whose manifest is gone."""
    path = run / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["sampling"]["temperature"] = 0.1
    path.write_text(json.dumps(sealed(manifest)))
    with pytest.raises(InputError, match=r"was edited.*config\.sampling\.temperature is 1"):
        Played.open(run)
    path.unlink()
    with pytest.raises(InputError, match=r"manifest\.json: missing"):
        report.write(run)


def test_a_file_in_the_place_of_an_artefact(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("")
    with commit(tmp_path / "adapter") as folder:
        (folder / "x").write_text("1")
    assert intact(tmp_path / "adapter") and len([*tmp_path.iterdir()]) == 1


def test_names_that_are_ways() -> None:
    for name in ("../x", "a/b", "..", "a\\b", "/x", "a\nb"):
        with pytest.raises(ValueError, match="name"):
            Config(name=name)


def changed(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def own_code(folder: Path) -> None:
    changed(folder / "config.json", auto_map={"AutoConfig": "evil.C"}, model_type="evil")


def own_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    changed(file, auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T")


def pickled(folder: Path) -> None:
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()


def odd(folder: Path) -> None:
    changed(folder / "config.json", hidden_size="x")


def no_tokens(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (own_code, "needs code from its own folder, which is never run"),
        (own_tokenizer, "needs code from its own folder, which is never run"),
        (pickled, "pickles"),
        (odd, "cannot be loaded"),
        (no_tokens, "cannot be loaded"),
    ],
)
def test_model_folders_run_no_code(
    world: Path, tmp_path: Path, make: Callable[[Path], None], said: str
) -> None:
    folder = Path(shutil.copytree(world / "base", tmp_path / "base"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    make(folder)
    with pytest.raises(InputError, match=said) as error:
        load_base(str(folder), dtype="fp32", device=torch.device("cpu"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_templates_reach_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jinja").write_text(template)
    with pytest.raises(InputError, match=r"text\.template"):
        ChatFormat.create(make_tokenizer(), str(tmp_path / "chat.jinja"))
    assert not (tmp_path / "owned").exists()


def test_the_fence_of_a_card_holds(world: Path) -> None:
    played = Played.open(world / "run")
    evil = played.config.evaluate.model_copy(update={"answer": "(\n```\n# owned)"})
    config = played.config.model_copy(update={"evaluate": evil})
    played = Played(played.path, config, played.manifest)
    card = exporting._card(played, played.policies()[1], "x", True, "weights")
    fence = card.split("yaml\n")[0].rpartition("\n")[2]
    inside = card.split(f"{fence}yaml\n")[1].split(f"\n{fence}\n")[0]
    assert len(fence) > 3 and "owned" in inside


def test_a_system_without_file_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows imports everything, and says at a run what is missing."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delitem(sys.modules, "alphaspin.foundation.locks")
    locks = import_module("alphaspin.foundation.locks")
    monkeypatch.setitem(sys.modules, "alphaspin.foundation.locks", locks_module)
    with (tmp_path / "lock").open("w") as file, pytest.raises(InputError, match="WSL"):
        locks.take(file, shared=False)
