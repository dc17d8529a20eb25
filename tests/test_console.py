"""What others' consoles and others' texts do to what is printed."""

import io
import os
import subprocess
import sys

import pytest

from alphaspin.foundation import console

PLAN = "import sys; from alphaspin import cli; sys.argv = ['alphaspin', {}]; cli.main()"


def run(command: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, "-c", PLAN.format(", ".join(map(repr, command.split())))]
    return subprocess.run(words, **options, check=False)  # pyright: ignore


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_console_that_lacks_signs(encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    found = run("plan tiny", env=environment, capture_output=True)
    assert found.returncode == 0, found.stderr
    assert "memory, training" in found.stdout.decode(encoding)


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
