"""What a person sees while waiting: progress bars, alarm lines, the first sample, the table."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Generator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

STEERING = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")
"""Control characters, but tab and newline: in the texts of others they would steer a terminal."""


ADDRESS = re.compile(r"(\b\w+:)(/*)([^/\s'\"?#@]*@)?([^\s'\"?#]*)([?#])?([^\s'\"]*)")


def without_keys(text: str) -> str:
    """A text whose addresses lack what stands before the host and behind the path.

    There may be passwords and keys, and what is printed may be kept.
    """

    def shown(found: re.Match[str]) -> str:
        scheme, slashes, user, path, mark, rest = (part or "" for part in found.groups())
        if user and not slashes and not re.match(r"localhost|\S*[./]", path):
            return found[0]  # no host behind it: a judge's name:function@hash
        rest = "…" if mark and slashes else rest
        start = f"{scheme}{slashes}" if slashes or not user else ""
        return f"{start}{'…@' * bool(user)}{path}{mark}{rest}"

    return ADDRESS.sub(shown, text)


def forgive(stream: Any) -> None:
    """Let a stream replace the signs that its encoding lacks."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="replace")


def open_streams() -> None:
    """Give a process whose standard streams were closed (`>&-`) some that nobody reads."""
    for name in ("stdin", "stdout", "stderr"):  # each takes the lowest number, which is its own
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def silence(stream: Any) -> None:
    """Print to nobody, where nobody reads: not when Python ends either."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Console(Console):
    """A console that loses signs and readers without a word."""

    def _write_buffer(self) -> None:
        forgive(self.file)
        super()._write_buffer()

    def on_broken_pipe(self) -> None:
        silence(self.file)


console = _Console(highlight=False)


@contextlib.contextmanager
def recorded() -> Generator[list[str]]:
    """Collect the lines that are printed meanwhile."""
    lines: list[str] = []
    console.record = True
    try:
        yield lines
    finally:
        lines += console.export_text().splitlines()
        console.record = False


errors = _Console(stderr=True, highlight=False)

Advance = Callable[[int, int], None]
"""Called with (items done, tokens done) since the last call."""


class _TokenRate(ProgressColumn):
    """Tokens per second of a task, from the `tokens` field that `bar` keeps."""

    def render(self, task: Task) -> Text:
        """The rate, or blanks before the first token."""
        elapsed = task.finished_time or task.elapsed
        if not elapsed or not task.fields["tokens"]:
            return Text("       - tok/s")
        return Text(f"{task.fields['tokens'] / elapsed:8,.0f} tok/s")


@contextlib.contextmanager
def bar(label: str, total: int, unit: str, done: int = 0) -> Generator[Advance]:
    """A progress bar with tokens per second and the time left."""
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn(unit),
        _TokenRate(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total, completed=done, tokens=0)
        tokens_done = 0

        def advance(items: int, tokens: int) -> None:
            nonlocal tokens_done
            tokens_done += tokens
            progress.update(task, advance=items, tokens=tokens_done)

        yield advance


def _plain(text: str) -> str:
    return text.translate(STEERING)


def error(text: str) -> None:
    """Why a command ends."""
    errors.print(Text(f"error: {_plain(without_keys(text))}", style="red"), soft_wrap=True)


def note(text: str) -> None:
    """One line of information."""
    console.print(Text(_plain(without_keys(text)), style="dim"))


def alarm(text: str) -> None:
    """One line that asks for attention."""
    console.print(Text(f"ALARM  {_plain(without_keys(text))}", style="bold yellow"))


def text(line: str) -> None:
    """One line as it is, wrapped by the terminal alone."""
    console.print(Text(_plain(line)), soft_wrap=True)


def sample(prompt: str, trained: str) -> None:
    """A prompt, and behind it the tokens that training is about, in another colour."""
    console.print(
        Text.assemble(
            ("first demonstration: ", "bold"),
            ("prompt ", "cyan"),
            ("trained tokens\n", "green"),
            (_plain(prompt), "cyan"),
            (_plain(trained), "green"),
        )
    )


def table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False
) -> None:
    """A table with right-aligned numbers, or words, behind a first column of names."""
    result = Table(title=Text(_plain(title), style="table.title"), title_justify="left")
    for i, name in enumerate(header):
        justify = "left" if i == 0 or words else "right"
        result.add_column(Text(_plain(name)), justify=justify, overflow="fold")
    for row in rows:
        result.add_row(*(Text(_plain(cell)) for cell in row))
    console.print(result)
