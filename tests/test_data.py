"""Sources, row formats and their errors; tokenisation under every style of chat template."""

import json
import logging
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from alphaspin.data import demonstrations as data
from alphaspin.data.chat import PLAIN_TEMPLATE, ChatFormat
from alphaspin.data.demonstrations import (
    LONG_PROMPT,
    Demonstration,
    load_conversations,
    load_demonstrations,
)
from alphaspin.data.settings import TextConfig
from alphaspin.errors import InputError

CORPUS = [
    "Hello, how many clips did she sell in May? She sold 48/2 = 24 clips altogether.\n\n",
    "### User:\nsort these words: pear, apple\n\n### Assistant:\napple, pear\n\nuser model",
] * 3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # as Qwen3's: an empty block in the last turn only
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = (  # no generation prompt; a space before the answer, and one after it
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
PHI = (  # the turn's token and then, after the last turn, the EOS
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
SPACED = (  # the generation prompt ends with a space, which merges with the answer's first word
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '</s>\n' if m.role == 'assistant' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
    )
    return tokenizer


def sentencepiece(style: str) -> Tokenizer:
    """BPE with byte fallback that marks spaces as Gemma, Llama 2, or Metaspace (first, always)."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200))
    model = json.loads(trained.to_str())["model"]
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            [tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    elif style == "llama2":
        marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(marks)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style, split=False)
    if style != "gemma":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def finished(tokenizer, template, eos, special=(), bos=None, adds_bos=False):
    tokenizer.add_special_tokens([token for token in (bos, eos, *special) if token])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    named = {"bos_token": bos, "eos_token": eos, "chat_template": template}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{key: value for key, value in named.items() if value}
    )


@cache
def tokenizer_of(style: str):
    im, ends = ("<|im_start|>", "<|im_end|>"), ("<start_of_turn>", "<end_of_turn>")
    match style:
        case "chatml":
            return finished(byte_level(), CHATML, "<|endoftext|>", im)
        case "thinking":
            return finished(byte_level(), THINKING, "<|endoftext|>", im)
        case "llama3":
            special = ("<|start|>", "<|stop|>", "<|eot_id|>")
            return finished(byte_level(), LLAMA3, "<|end_of_text|>", special, "<|begin|>", True)
        case "gemma":
            return finished(sentencepiece("gemma"), GEMMA, "<eos>", ends, "<bos>", True)
        case "llama2":
            return finished(sentencepiece("llama2"), LLAMA2, "</s>", (), "<s>", True)
        case "first" | "always":
            return finished(sentencepiece(style), CHATML, "</s>", im, "<s>", True)
        case "spaced":
            return finished(sentencepiece("first"), SPACED, "</s>")
        case "spaced-bytes":
            return finished(byte_level(), SPACED, "</s>")
        case "phi":
            special = ("<|user|>", "<|assistant|>", "<|end|>")
            return finished(byte_level(), PHI, "<|endoftext|>", special)
        case "plain":
            return finished(byte_level(), None, "<|endoftext|>")
        case "plain-bos":
            return finished(sentencepiece("first"), None, "</s>", (), "<s>", True)
    raise AssertionError(style)


@cache
def chat_of(style: str) -> ChatFormat:
    return ChatFormat.create(tokenizer_of(style))


END_OF = {
    "chatml": "<|im_end|>",
    "thinking": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "llama2": "</s>",
    "first": "<|im_end|>",
    "always": "<|im_end|>",
    "spaced": "</s>",
    "spaced-bytes": "</s>",
    "phi": "<|endoftext|>",
    "plain": "<|endoftext|>",
    "plain-bos": "</s>",
}
TRIMS = ("llama3", "gemma")
MARKS = ("llama2", "first", "always", "plain-bos")  # a space, decoded, after special tokens


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load_messages(source: str, split: str = "train") -> list[tuple[list[dict[str, str]], str]]:
    return [(row.messages, origin) for row, origin in load_conversations(source, split)]


def fails(source: str | Path, *parts: str, **options) -> str:
    """The message of the InputError of loading a source, which must have all the parts."""
    with pytest.raises(InputError) as caught:
        load_messages(str(source), **options)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


QA = {"question": "2+2?", "answer": "4"}


# Tokenisation


@pytest.mark.parametrize("style", END_OF)
def test_end_and_stop_tokens(style):
    chat, tokenizer = chat_of(style), tokenizer_of(style)
    end = tokenizer.convert_tokens_to_ids(END_OF[style])
    assert chat.end_token_id == end
    assert chat.stop_token_ids == {end, tokenizer.eos_token_id}
    _, response = chat.encode([user("Hello"), assistant("apple, pear")])
    assert response[-1] == end and response.count(end) == 1


def test_end_token_is_the_first_that_stops_generation():
    tokenizer = tokenizer_of("phi")
    turn_end = tokenizer.convert_tokens_to_ids("<|end|>")
    chat = ChatFormat.create(tokenizer, extra_stop_ids=[turn_end])
    assert chat.end_token_id == turn_end
    assert chat.stop_token_ids == {turn_end, tokenizer.eos_token_id}
    _, response = chat.encode([user("Hello"), assistant("apple")])
    assert tokenizer.decode(response) == "apple<|end|>"


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<"), max_size=40)


@pytest.mark.parametrize("style", END_OF)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(question=text, answer=text)
@example(question="Hello", answer=" two  spaces ")
@example(question="Hello ", answer="\n\nnew lines\n")
@example(question="", answer="\u4f60\u597d \U0001f600 a\u0301")
@example(question="a", answer="\ufeff\x00 0")
def test_round_trip(style, question, answer):
    assume(answer.strip())
    chat, tokenizer = chat_of(style), tokenizer_of(style)
    messages = [user(question), assistant(answer)]
    prompt, response = chat.encode(messages)
    assert prompt == chat.encode_prompt(messages[:-1])
    assert chat.decode(response) == (answer.strip() if style in TRIMS else answer)
    assert response[-1] == chat.end_token_id
    assert chat.stop_token_ids.isdisjoint(response[:-1])
    # Together the tokens are the rendered text up to the end token.
    whole = tokenizer.decode(prompt + response)
    template = PLAIN_TEMPLATE if style.startswith("plain") else None
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
    rendered = rendered.rpartition(END_OF[style])[0] + END_OF[style]
    assert whole == rendered or style in MARKS


@pytest.mark.parametrize("style", ["llama3", "gemma", "llama2", "first", "plain-bos"])
def test_exactly_one_bos(style):
    prompt, _ = chat_of(style).encode([user("Hello"), assistant("apple")])
    bos = tokenizer_of(style).bos_token_id
    assert prompt[0] == bos and prompt.count(bos) == 1


@pytest.mark.parametrize("style", ["plain-bos", "first"])
def test_no_space_marker_before_an_answer_inside_the_text(style):
    _, response = chat_of(style).encode([user("Hello"), assistant("apple")])
    pieces = tokenizer_of(style).convert_ids_to_tokens(response)
    assert not pieces[0].startswith("▁") and "".join(pieces[:-1]) == "apple"


def test_answer_that_merges_with_the_prompt_is_tokenised_apart_without_a_marker():
    chat, tokenizer = chat_of("spaced"), tokenizer_of("spaced")
    prompt, response = chat.encode([user("Hello"), assistant("apple")])
    whole = tokenizer("user: Helloassistant: apple", add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] != prompt  # the case is real: "▁a" is one token
    assert tokenizer.convert_ids_to_tokens(prompt)[-1] == "▁"
    assert tokenizer.decode(response[:-1]) == "apple"
    assert not tokenizer.convert_ids_to_tokens(response)[0].startswith("▁")


def test_natural_tokens_in_place():
    tokenizer = tokenizer_of("chatml")
    messages = [user("Hello"), assistant("apple, pear")]
    prompt, response = chat_of("chatml").encode(messages)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert prompt + response == whole[: len(prompt + response)]
    assert tokenizer.decode(whole[len(prompt + response) :]) == "\n"


def test_think_block_is_in_the_tokens_and_not_in_the_text():
    chat, tokenizer = chat_of("thinking"), tokenizer_of("thinking")
    _, response = chat.encode([user("Hello"), assistant("apple")])
    assert tokenizer.decode(response) == "<think>\n\n</think>\n\napple<|im_end|>"
    assert chat.decode(response) == "apple"
    sampled = tokenizer("pear<|im_end|>apple", add_special_tokens=False)["input_ids"]
    assert chat.decode(np.array(sampled, np.int32)) == "pear"


@pytest.mark.parametrize("style", ["chatml", "plain"])
def test_end_token_in_the_data_is_not_doubled_at_the_end(style):
    chat = chat_of(style)
    assert chat.encode([user("Hello"), assistant("apple" + END_OF[style])]) == chat.encode(
        [user("Hello"), assistant("apple")]
    )


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>"])
def test_stop_token_inside_an_answer_is_an_error(tmp_path, token):
    source = write(tmp_path / "a.jsonl", QA, QA | {"answer": f"4{token} 5"})
    with pytest.raises(InputError) as caught:
        load_demonstrations(source, chat_of("chatml"), TextConfig())
    assert f"{source}:2" in str(caught.value) and token in str(caught.value)


def test_template_without_special_tokens_gets_the_eos(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(
        "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant={% endif %}\n"
    )
    tokenizer = tokenizer_of("chatml")
    chat = ChatFormat.create(tokenizer, str(file))
    prompt, response = chat.encode([user("Hello"), assistant("apple")])
    assert tokenizer.decode(prompt) == "user=Hello;assistant="
    assert tokenizer.decode(response) == "apple;<|endoftext|>"
    assert chat.decode(response) == "apple"


def test_plain_template(caplog):
    with caplog.at_level(logging.INFO, "alphaspin.data.chat"):
        chat = ChatFormat.create(tokenizer_of("plain"))
        ChatFormat.create(tokenizer_of("chatml"))
    assert [record.getMessage() for record in caplog.records] == [
        "chat template: plain",
        "chat template: the tokenizer's own",
    ]
    messages = [user("Hello"), assistant("apple"), user("And?"), assistant("pear")]
    prompt, response = chat.encode([{"role": "system", "content": "Be kind."}, *messages])
    assert tokenizer_of("plain").decode(prompt + response) == (
        "### System:\nBe kind.\n\n### User:\nHello\n\n### Assistant:\napple<|endoftext|>\n\n"
        "### User:\nAnd?\n\n### Assistant:\npear<|endoftext|>"
    )


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}"
         "{{ 'thinking' if add_generation_prompt }}",
         "continuation of its generation prompt"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
         "leaves out"),
        ("{% for m in messages %}", "refuses"),
        ("{{ messages[0].content + 1 }}", "refuses"),
        ("{{ 1 / 0 }}", "refuses this: division by zero"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "refuses this: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses this: maximum recursion"),
        (b"\xff", "not UTF-8 at byte 0"),
        (None, "No such file"),
    ],
)  # fmt: skip
def test_bad_templates(tmp_path, template, part):
    file = tmp_path / "bad.jinja"
    if template is not None:
        file.write_bytes(template if isinstance(template, bytes) else template.encode())
    with pytest.raises(InputError, match=part) as caught:
        ChatFormat.create(tokenizer_of("chatml"), str(file))
    assert "text.template" in str(caught.value)


def test_no_end_token_at_all():
    with pytest.raises(InputError, match="eos_token"):
        ChatFormat.create(finished(byte_level(), None, None))


def test_template_that_refuses_a_row_names_it(tmp_path):
    row = {"messages": [{"role": "system", "content": "Be kind."}, user("a"), assistant("b")]}
    source = write(tmp_path / "a.jsonl", QA, row)
    with pytest.raises(InputError) as caught:
        load_demonstrations(source, chat_of("gemma"), TextConfig())
    assert f"{source}:2: text.template" in str(caught.value)
    assert "System role not supported" in str(caught.value)


# Row formats and sources


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [user("a"), assistant("b")], "prompt": "x", "id": 3},
         [user("a"), assistant("b")]),
        ({"messages": None, **QA}, [user("2+2?"), assistant("4")]),
        ({"prompt": "a", "completion": "b"}, [user("a"), assistant("b")]),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, [user("a"), assistant("b")]),
        ({"prompt": "a", "response": "b"}, [user("a"), assistant("b")]),
        ({"instruction": "a", "input": "c", "output": "b"}, [user("a\n\nc"), assistant("b")]),
        ({"instruction": "a", "input": "", "output": "b"}, [user("a"), assistant("b")]),
        ({"instruction": "a", "output": "b"}, [user("a"), assistant("b")]),
        (QA, [user("2+2?"), assistant("4")]),
        ({"real": [user("a"), assistant("b")], "generated": [user("a"), assistant("z")]},
         [user("a"), assistant("b")]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
         [user("a"), assistant("b")]),
        ({"messages": [{"role": "system", "content": "s"}, user("a"), {"x": 1, **assistant("b")}]},
         [{"role": "system", "content": "s"}, user("a"), assistant("b")]),
    ],
)  # fmt: skip
def test_row_formats(tmp_path, row, messages):
    source = write(tmp_path / "rows.jsonl", row)
    assert load_messages(source) == [(messages, f"{source}:1")]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"text": "a", "label": 1}, ("text, label", "prompt+completion", "question+answer")),
        ([1], ("expected an object", "list")),
        ("x", ("expected an object", "str")),
        (None, ("expected an object", "null")),
        ({"messages": "hi"}, ("list of turns", "str")),
        ({"messages": []}, ("last turn", "no turn")),
        ({"messages": ["hi"]}, ("turn 1", "str")),
        ({"messages": [user("a")]}, ("last turn", "found user")),
        ({"messages": [assistant("a")]}, ("turn 1: expected user", "'assistant'")),
        ({"messages": [user("a"), user("b")]}, ("turn 2: expected assistant", "'user'")),
        ({"messages": [user("a"), assistant("b"), assistant("c")]}, ("turn 3: expected user",)),
        ({"messages": [user("a"), {"role": "system", "content": "s"}]}, ("turn 2", "'system'")),
        ({"messages": [user("a"), {"role": "tool", "content": "s"}]}, ("turn 2", "'tool'")),
        ({"messages": [{"content": "s"}]}, ("turn 1", "'None'")),
        ({"messages": [{"role": ["user"], "content": "s"}]}, ("turn 1", "['user']")),
        ({"messages": [user("a"), assistant(None)]}, ("turn 2: expected text", "null")),
        ({"messages": [user("a"), assistant([{"type": "text"}])]},
         ("turn 2: a part of its content: expected text", "null")),
        ({"question": None, "answer": "4"}, ("turn 1: expected text", "null")),
        ({"instruction": "a", "input": 3, "output": "b"}, ("input: expected text", "int")),
        ({"question": "a", "answer": ""}, ("turn 2", "answer is empty")),
        ({"question": "a", "answer": " \n\t"}, ("turn 2", "answer is empty")),
        ({"question": "a", "answer": "b\ud800"}, ("turn 2", "surrogate", "character 1")),
    ],
)  # fmt: skip
def test_bad_rows_name_file_and_line(tmp_path, row, parts):
    source = write(tmp_path / "rows.jsonl", QA, row)
    message = fails(source, *parts)
    assert message.startswith(f"{source}:2: ") and "\n" not in message


def test_lines_bom_crlf_blank_and_unicode_separators(tmp_path):
    file = tmp_path / "rows.jsonl"
    line = json.dumps({"question": "a\u2028b", "answer": "c"}, ensure_ascii=False).encode()
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n   \n" + line)
    rows = list(load_messages(str(file)))
    assert [origin for _, origin in rows] == [f"{file}:1", f"{file}:4"]
    assert rows[0][0] == [user("a\u2028b"), assistant("c")]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_invalid_utf8_names_line_and_byte(tmp_path, bom):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(bom + b'{"question": "a", "answer": "b"}\n{"question": "\xff"}\n')
    at = file.read_bytes().index(b"\xff")
    fails(file, f"{file}:2: not UTF-8 at byte {at} ")
    listed = tmp_path / "rows.json"
    listed.write_bytes(bom + b'[\n{"question": "a"},\n"\xff"]')
    at = listed.read_bytes().index(b"\xff")
    fails(listed, f"{listed}:3: not UTF-8 at byte {at} ")


@pytest.mark.parametrize("broken", ['{"question": "a"', "{'a': 1}", "[" * 100_000, "9" * 5000])
def test_broken_json_names_the_line(tmp_path, broken):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(QA) + "\n\n" + broken + "\n")
    assert len(fails(file, f"{file}:3: broken JSON")) < 400


def test_json_list_rows_are_numbered_from_zero(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([QA, QA | {"answer": 4}], indent=1))
    fails(file, f"{file}[1]: turn 2: expected text, found int")
    file.write_text(json.dumps([QA, QA]))
    assert [origin for _, origin in load_messages(str(file))] == [f"{file}[0]", f"{file}[1]"]
    file.write_text('[\n{"question": "a"},\n{"question" "b"}]')
    fails(file, f"{file}:3: broken JSON at column 13")
    file.write_text("[]")
    fails(file, f"{file}: no rows")


def test_json_lines_named_json(tmp_path):
    source = write(tmp_path / "rows.json", QA, QA)
    assert [origin for _, origin in load_messages(source)] == [f"{source}:1", f"{source}:2"]


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "rows.parquet"
    talk = {"messages": [user("a"), assistant("b")], "question": None, "answer": None}
    pq.write_table(pa.Table.from_pylist([talk, talk | {"messages": None} | QA]), file)
    assert list(load_messages(str(file))) == [
        ([user("a"), assistant("b")], f"{file}[0]"),
        ([user("2+2?"), assistant("4")], f"{file}[1]"),
    ]
    pq.write_table(pa.Table.from_pylist([QA, QA | {"answer": " "}]), file)
    fails(file, f"{file}[1]: turn 2")
    pq.write_table(pa.Table.from_pylist([], schema=pa.schema([("question", pa.string())])), file)
    fails(file, f"{file}: no rows")
    file.write_bytes(b"PAR1 no PAR1")
    fails(file, f"{file}[0] or later: broken Parquet")


def test_folder_in_sorted_order_without_hidden_files(tmp_path):
    for name in (
        "b.jsonl",
        "a/z.json",
        "a/b.jsonl",
        ".cache/x.jsonl",
        "notes.txt",
        "c.jsonl/d.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, {"question": name, "answer": "b"})
    found = [messages[0]["content"] for messages, _ in load_messages(str(tmp_path))]
    assert found == ["a/b.jsonl", "a/z.json", "b.jsonl", "c.jsonl/d.jsonl"]
    (tmp_path / "b.jsonl").write_text("\n")
    fails(tmp_path, f"{tmp_path / 'b.jsonl'}: no rows")


def test_missing_empty_and_unsupported_sources(tmp_path):
    fails(tmp_path / "no.jsonl", "no.jsonl: no such file or folder")
    fails(tmp_path / "no", "no: no such file or folder")
    fails(tmp_path, str(tmp_path), ".jsonl, .json, .csv, .parquet file in this folder")
    (tmp_path / "a.jsonl").touch()
    fails(tmp_path / "a.jsonl", "a.jsonl: no rows")
    for name in ("a.txt", "a.jsonl.xz", "a.parquet.gz"):
        (tmp_path / name).write_text("question,answer\n")
        fails(tmp_path / name, name, "ends with one of .jsonl, .json, .csv, .parquet")


def test_saved_datasets(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([QA, {"question": "a", "answer": "b"}])
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"dev": rows}).save_to_disk(str(tmp_path / "two"))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert load_messages(one)[1] == ([user("a"), assistant("b")], f"{one}:train[1]")
    assert load_messages(two, "dev")[1][1] == f"{two}:dev[1]"
    fails(two, f"{two}: no split 'train'; it has: dev")


def test_hub(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, config=None, *, split):
        calls.append((name, config, split))
        if name == "some/none":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'some/none' doesn't exist")
        if name == "some/offline":
            raise ConnectionError("Couldn't reach the Hub")
        if name == "some/empty":
            return datasets.Dataset.from_dict({"question": [], "answer": []})
        rows = [QA, {"question": "a"}] if name == "some/set" else [QA]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_messages("gsm8k:main", "test")[0][1] == "gsm8k:main:test[0]"
    assert calls == [("gsm8k", "main", "test")]
    fails("some/set", "some/set:train[1]: turn 2: expected text, found null")
    fails("some/empty", "some/empty (split train): no rows")
    fails("some/none", "some/none (split train)", "DatasetNotFoundError", "doesn't exist")
    fails("some/offline", "some/offline (split train)", "ConnectionError", "reach the Hub")
    fails("./some/set", "some/set: no such file or folder")
    fails("/no/such/folder", "/no/such/folder: no such file or folder")
    fails("no.jsonl", "no.jsonl: no such file or folder")
    assert len(calls) == 5  # no path went to the hub


def test_datasets_and_torch_are_not_imported_for_files():
    code = "import sys, alphaspin.data; print({'datasets', 'pyarrow', 'torch'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# Demonstrations


def test_demonstrations_agree_with_encode_across_batches(tmp_path):
    rows = [{"question": f"sort {i}", "answer": f"{i} apple"} for i in range(1030)]
    source = write(tmp_path / "rows.jsonl", *rows)
    found, dropped = load_demonstrations(source, chat_of("chatml"), TextConfig())
    assert (len(found), dropped) == (1030, {})
    for i, one in enumerate(found):
        prompt, response = chat_of("chatml").encode([user(f"sort {i}"), assistant(f"{i} apple")])
        assert (one.index, one.answer, one.origin) == (i, f"{i} apple", f"{source}:{i + 1}")
        assert one.prompt.dtype == one.response.dtype == np.int32
        assert one.prompt.tolist() == prompt and one.response.tolist() == response
        assert not one.truncated


def test_turns(tmp_path):
    talk = [
        {"role": "system", "content": "s"},
        user("a"),
        assistant("b"),
        user("c"),
        assistant("d"),
    ]
    source = write(tmp_path / "rows.jsonl", {"messages": talk}, {"messages": talk[1:]})
    chat = chat_of("thinking")
    last, _ = load_demonstrations(source, chat, TextConfig())
    every, _ = load_demonstrations(source, chat, TextConfig(turns="all"))
    assert [one.answer for one in last] == ["d", "d"]
    assert [(one.answer, one.index) for one in every] == [("b", 0), ("d", 1), ("b", 2), ("d", 3)]
    assert every[0].prompt.tolist() == chat.encode_prompt(talk[:2])
    assert every[1].prompt.tolist() == last[0].prompt.tolist() == chat.encode_prompt(talk[:4])
    assert [chat.decode(one.response) for one in every] == ["b", "d", "b", "d"]


def test_truncation_at_the_limit(tmp_path):
    source = write(tmp_path / "rows.jsonl", QA | {"answer": "She sold 24 clips"})
    chat = chat_of("chatml")
    _, full = chat.encode([user("2+2?"), assistant("She sold 24 clips")])
    for limit, kept, cut in (
        (len(full), full, False),
        (len(full) - 1, full[:-1], True),
        (2, full[:2], True),
    ):
        (one,), _ = load_demonstrations(source, chat, TextConfig(max_response_tokens=limit))
        assert (one.response.tolist(), one.truncated) == (kept, cut)
        assert (chat.end_token_id in one.response) == (not cut)
        assert one.answer == "She sold 24 clips"


def test_long_prompts(tmp_path):
    source = write(tmp_path / "rows.jsonl", QA, QA | {"question": "Hello " * 9}, QA)
    chat = chat_of("chatml")
    long, short = (len(chat.encode_prompt([user(q)])) for q in ("Hello " * 9, "2+2?"))
    assert len(load_demonstrations(source, chat, TextConfig(max_prompt_tokens=long))[0]) == 3
    with pytest.raises(InputError) as caught:
        load_demonstrations(source, chat, TextConfig(max_prompt_tokens=long - 1))
    for part in (f"{source}:2: ", f"{long} tokens", str(long - 1), "text.max_prompt_tokens"):
        assert part in str(caught.value)
    limits = TextConfig(max_prompt_tokens=short, too_long="drop")
    kept, dropped = load_demonstrations(source, chat, limits)
    assert dropped == {LONG_PROMPT: 1}
    assert [(one.index, one.origin) for one in kept] == [(0, f"{source}:1"), (1, f"{source}:3")]
    with pytest.raises(InputError, match="3 rows dropped: the prompt is longer") as caught:
        load_demonstrations(source, chat, TextConfig(max_prompt_tokens=1, too_long="drop"))
    assert str(caught.value).startswith(source)


# Held-out prompts and lineage


def demonstration(
    index: int, prompt: list[int], response: tuple[int, ...] = (7, 1)
) -> Demonstration:
    ids = np.array(prompt, np.int32), np.array(response, np.int32)
    return Demonstration(index, *ids, False, "", f"x:{index}")


@given(
    prompts=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=30),
    count=st.integers(0, 12),
    seed=st.integers(0, 3),
)
def test_hold_out_keeps_prompts_apart(prompts, count, seed):
    ones = [demonstration(i, prompt) for i, prompt in enumerate(prompts)]
    try:
        train, heldout = data.hold_out(ones, count, seed)
    except InputError:
        sizes = [prompts.count(prompt) for prompt in prompts]
        assert count and (not prompts or min(sizes) > count or len(prompts) <= count)
        return
    assert sorted([*train, *heldout], key=lambda one: one.index) == ones
    for side in (train, heldout):
        assert [one.index for one in side] == sorted(one.index for one in side)
    assert not {tuple(one.prompt) for one in train} & {tuple(one.prompt) for one in heldout}
    assert train or not count
    singles = sum(prompts.count(prompt) == 1 for prompt in prompts)
    assert len(heldout) == count if singles >= count else 0 < len(heldout) <= count


def test_hold_out_is_a_function_of_seed_and_prompts():
    ones = [demonstration(i, [i]) for i in range(200)]

    def chosen(demonstrations, seed):
        return {int(one.prompt[0]) for one in data.hold_out(demonstrations, 20, seed)[1]}

    assert chosen(ones, 0) == chosen(ones[::-1], 0) != chosen(ones, 1)
    assert not chosen(ones, 0) <= set(range(50))  # spread over the set
    assert len(chosen(ones, 0)) == 20


@pytest.mark.parametrize(("size", "count"), [(5, 5), (5, 6), (1, 1)])
def test_hold_out_leaves_something_to_train_on(size, count):
    with pytest.raises(InputError, match=r"evaluate\.prompts"):
        data.hold_out([demonstration(i, [i]) for i in range(size)], count, 0)


def test_fingerprint():
    one, two = demonstration(0, [1, 2], (3, 1)), demonstration(1, [1], (2, 3, 1))
    base = data.fingerprint([one, two])
    assert base == data.fingerprint(iter([one, two])) and len(base) == 64
    others = [[two, one], [one], [demonstration(0, [1, 2], (3, 4)), two], [one, two, two]]
    assert base not in [data.fingerprint(other) for other in others]
    assert data.fingerprint([one]) != data.fingerprint([two])  # the same tokens, cut elsewhere
