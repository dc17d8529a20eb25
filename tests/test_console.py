"""What others' consoles and others' texts do to what is printed."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.forks import fork

from alphaspin import cli
from alphaspin.foundation import console

PLAN = "import sys; from alphaspin import cli; sys.argv = ['alphaspin', {}]; cli.main()"


def run(command: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, "-c", PLAN.format(", ".join(map(repr, command.split())))]
    return subprocess.run(words, **options, check=False)  # pyright: ignore


def printing(log: Path, encoding: str) -> None:
    """`alphaspin plan tiny` where the locale has this encoding."""
    sys.stdout = sys.stderr = log.open("w", encoding=encoding)
    sys.argv = ["alphaspin", "plan", "tiny"]
    try:
        cli.main()
    finally:
        sys.stdout.flush()


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_console_that_lacks_signs(encoding: str, tmp_path: Path) -> None:
    process = fork(printing, tmp_path / "log", encoding)
    process.start()
    process.join(180)
    printed = (tmp_path / "log").read_text(encoding)
    assert process.exitcode == 0, printed
    assert "memory, training" in printed


@pytest.mark.parametrize(
    ("command", "code"), [("train --help-all", 141), ("train --help", 0), ("recipes", 0)]
)
def test_nobody_reads(command: str, code: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    found = run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert found.returncode == code and b"rror" not in found.stderr, found.stderr


def test_help_does_not_wait_for_what_only_training_needs() -> None:
    """torch comes with the losses; its friends take thrice as long, and no option needs them."""
    late = ["transformers", "peft", "accelerate", "datasets", "matplotlib", "triton"]
    code = f"import sys, alphaspin.cli; print([m for m in {late} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code]) == b"[]\n"


def test_printing_goes_on_where_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="latin-1") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        for _ in range(2):
            console.text("β" * 100_000)
        with console.bar("training", 2, "steps") as advance:
            advance(1, 1)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("x = 'https://u:pw@h.org/a?key=pw#pw': no", "x = 'https://…@h.org/a?…': no"),
        ("/here/https:/u:pw@h/a?pw: no such file", "/here/https:/…@h/a?… no such file"),
        ("me:pw@x/y is none", "…@x/y is none"),
        ("https://pw@h", "https://…@h"),
        ("http://h:8000/v1/completions: HTTP 400", "http://h:8000/v1/completions: HTTP 400"),
        ("rows.jsonl:3: turn 2: a#b? is no@one", "rows.jsonl:3: turn 2: a#b? is no@one"),
    ],
)
def test_keys_in_addresses_are_not_told(
    said: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream, tell in (("stderr", console.error), ("stdout", console.note)):
        monkeypatch.setattr(sys, stream, io.StringIO())
        tell(said)
        assert kept in getattr(sys, stream).getvalue()


def test_texts_of_others_do_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stream in (("stdout", io.StringIO()), ("stderr", io.StringIO())):
        monkeypatch.setattr(sys, name, stream)
    evil = "\x1b]0;owned\x07\x1b[2J\x9b1m[bold]x[/bold]"
    console.text(evil)
    console.note(evil)
    console.alarm(evil)
    console.sample(evil, evil)
    console.table(evil, [evil], [[evil]])
    console.error(evil)
    printed = sys.stdout.getvalue() + sys.stderr.getvalue()  # pyright: ignore
    assert printed.count("owned") == 9 and "[bold]x" in printed
    assert not {"\x1b", "\x07", "\x9b"} & {*printed}
