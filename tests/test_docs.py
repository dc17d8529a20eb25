"""What README and docs name is there, and their commands are read as they stand."""

import re
import shlex
import types
from pathlib import Path

import pytest

from alphaspin import cli
from alphaspin.commands import compare, exporting, gflownet_job, plan
from alphaspin.commands.played import Played
from alphaspin.config import load_config
from alphaspin.report import overview, page

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
PACKAGE = ROOT / "alphaspin"


def blocks(text: str) -> list[str]:
    """Lines of code, fenced or indented, those that go on joined."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    fenced = "\n".join(lines for language, lines in fences if language in ("", "sh"))
    indented = "\n".join(re.findall(r"^(?:    |> {5})(\S.*)$", text, re.M))
    return f"{fenced}\n{indented}".replace("\\\n", " ").splitlines()


LINES = {line.strip(): path.name for path in PAGES for line in blocks(path.read_text())}
COMMANDS = sorted(
    line for line in LINES if re.match(r"(\S+ .*-m alphaspin|alphaspin(-train)? )", line)
)


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 25
    assert {"train", "evaluate", "export", "init", "report"} <= {
        part for line in COMMANDS for part in re.split(r"[ -]", line)[:2]
    }


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_read_as_it_stands(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_module.py").write_text(
        "def prefers(prompt, first, second, reference):\n    ..."
    )
    (tmp_path / "mine.yaml").write_text("seed: 0\n")
    done = types.SimpleNamespace(config=load_config("tiny-sppo"), moved=lambda _: done)
    monkeypatch.setattr(Played, "open", lambda *_: done)
    for module, name in ((compare, "run"), (exporting, "run"), (gflownet_job, "run")):
        monkeypatch.setattr(module, name, lambda *_: None)
    for module in (page, overview):
        monkeypatch.setattr(module, "write", lambda *_: "")
    monkeypatch.setattr(plan, "show", lambda *_: None)
    words = shlex.split(re.split(r"\s[#>|]", line)[0].replace("…", ""))
    program = next(i for i, word in enumerate(words) if word.startswith("alphaspin"))
    if words[program] == "alphaspin-train":
        cli.parse(words[program + 1 :])
        return
    command, rest = words[program + 1], words[program + 2 :]
    if command in ("train", "init"):  # which would run
        cli.parse(rest[command == "init" :])
    else:
        cli._command([command, *rest])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_a_page_names_is_there(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            there = path if not file else path.parent / file
            assert there.exists(), target
            heads = re.findall(r"^#+ (.*)$", there.read_text(), re.M) if anchor else []
            found = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert not anchor or anchor in found, target
    for name in re.findall(r"(?:python|pytest)[ `](?:-\S+ )*((?:[\w-]+/)+[\w.-]+)", text):
        assert (ROOT / name.rstrip(".")).exists(), name
    made = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[0].split()
    for name in re.findall(r"`make ([a-z-]+)", text):
        assert name in made, name


def test_the_layers_are_the_packages() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", text, re.M)
    layers = {name.strip("/") for first, _ in rows for name in re.findall(r"`([\w/]+)`", first)}
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir()} - {"recipes", "__pycache__"}
    files = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    assert layers == folders | files
    for first, said in rows:
        folder = PACKAGE / first.strip("`/")
        modules = {p.stem for p in folder.rglob("*.py")} | {p.name for p in folder.rglob("*/")}
        for name in re.findall(r"`([a-z_]+)/?`", said) if folder.is_dir() else []:
            assert name in modules, f"{first}: {name}"
        if first == "`commands/`":
            assert modules - {"__init__", "__pycache__"} <= {*re.findall(r"`(\w+)`", said)}
