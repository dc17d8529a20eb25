"""Whatever a file or a command line holds, it is read or refused in words; nothing else is raised.

Examples are drawn from a fixed seed and shrunk by hypothesis; 2,000 with ALPHASPIN_SWEEP=1.
"""

import bz2
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import arithmetic, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alphaspin.cli import parse
from alphaspin.config import Config, load_config, recipe_names
from alphaspin.data.chat import ChatFormat
from alphaspin.data.demonstrations import load_demonstrations
from alphaspin.data.settings import TextConfig
from alphaspin.errors import InputError
from alphaspin.foundation.paths import packaged

EXAMPLES = 500 if os.environ.get("ALPHASPIN_SWEEP") else 60
seeded = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

WORDS = """
messages prompt completion chosen rejected instruction input output system history tools
role content user assistant tool text type name value from human gpt weight tool_calls
function arguments reasoning_content question answer response label
""".split()  # noqa: SIM905
TEXTS = st.one_of(st.sampled_from(WORDS), st.text(max_size=8))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.sampled_from(["\ud800", "\0"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(TEXTS, inner, max_size=4),
        st.fixed_dictionaries({"role": TEXTS, "content": inner}),
    ),
    max_leaves=8,
)
ROWS = st.one_of(
    VALUES,
    st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=5),
    st.fixed_dictionaries(
        {"messages": st.lists(st.fixed_dictionaries({"role": TEXTS, "content": VALUES}))}
    ),
)


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat.create(make_tokenizer())


def read(path: Path, chat: ChatFormat, answers: bool = True) -> None:
    """Either rows, or words about what is wrong."""
    try:
        found, _ = load_demonstrations(str(path), chat, TextConfig(), answers=answers)
        assert all(len(demo.prompt) for demo in found)
    except InputError as error:
        assert str(error).strip()


@seeded
@given(rows=st.lists(ROWS, max_size=3), answers=st.booleans())
def test_rows(rows: list[Any], answers: bool, chat: ChatFormat, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(arithmetic(1)[0])
    path.write_text("\n".join([good, *map(json.dumps, rows)]) + "\n", encoding="utf-8")
    read(path, chat, answers)


def packed(kind: str) -> bytes:
    """A good file of two rows."""
    rows = [{"prompt": "what is 1 + 1?", "completion": "2"}, {"prompt": "and", "completion": "3"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes()
    if kind == "jsonl.zst":
        out = pa.BufferOutputStream()
        with pa.CompressedOutputStream(out, "zstd") as stream:
            stream.write(lines)
        return out.getvalue().to_pybytes()
    if kind == "csv":
        return b"prompt,completion\nwhat is 1 + 1?,2\nand,3\n"
    if kind == "json":
        return json.dumps(rows).encode()
    return {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "jsonl.bz2": bz2.compress(lines)}[
        kind
    ]


@seeded
@given(
    kind=st.sampled_from(["parquet", "jsonl", "json", "csv", "jsonl.gz", "jsonl.bz2", "jsonl.zst"]),
    at=st.floats(0, 1),
    drop=st.integers(0, 40),
    put=st.binary(max_size=12),
)
def test_broken_files(
    kind: str, at: float, drop: int, put: bytes, chat: ChatFormat, tmp_path: Path
) -> None:
    content = packed(kind)
    start = int(at * len(content))
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(content[:start] + put + content[start + drop :])
    read(path, chat)


RECIPES = [packaged(f"{name}.yaml").read_text() for name in recipe_names()]


@seeded
@given(
    source=st.sampled_from(RECIPES),
    at=st.floats(0, 1),
    drop=st.integers(0, 30),
    put=st.one_of(
        st.text(max_size=12),
        st.sampled_from(["!!python/object:os.system x", "&a [*a]", "{", "- ", "? ", "1e400", "\t"]),
    ),
)
def test_broken_recipes(source: str, at: float, drop: int, put: str, tmp_path: Path) -> None:
    start = int(at * len(source))
    path = tmp_path / "recipe.yaml"
    path.write_text(source[:start] + put + source[start + drop :], "utf-8", "surrogatepass")
    try:
        assert isinstance(load_config(str(path)), Config)
    except InputError as error:
        assert "pydantic" not in str(error) and "recipe.yaml" in str(error), error


KEYS = """
model data output seed text.max_prompt_tokens text.template selfplay.iterations
loss.kind selfplay.prompts loss.beta reference.alpha reference.kind lora.r lora.targets
train.lr train.batch_size train.schedule sampling.url sampling.temperature judge.kind
method control evaluate.answer selfplay.opponent log.trackers plan
""".split()  # noqa: SIM905


@seeded
@given(
    words=st.lists(
        st.tuples(
            st.one_of(st.sampled_from(KEYS), st.text(max_size=6)),
            st.one_of(
                st.none(),
                st.text(max_size=8),
                st.integers().map(str),
                st.floats().map(str),
                st.sampled_from(["true", "none", "inf", "-1", "[]", "{}", "a b", "spin", "ema"]),
            ),
            st.booleans(),
        ),
        max_size=4,
    )
)
def test_command_lines(words: list[tuple[str, str | None, bool]]) -> None:
    line: list[str] = []
    for key, value, joined in words:
        flag = f"--{key}"
        line += [flag] if value is None else [f"{flag}={value}"] if joined else [flag, value]
    if {"-h", "--help"} & {*line}:
        return
    try:
        assert isinstance(parse(["tiny", *line])[0], Config)
    except InputError as error:
        assert "pydantic" not in str(error) and str(error).strip()
