"""Chat templates: what they leave out is found, thinking that the prompt opens, options, dates."""

import json

import pytest
from test_data import CHATML, QA, assistant, chat_of, load_messages, tokenizer_of, user, write

from alphaspin.data.chat import EARLIER, ChatFormat
from alphaspin.data.demonstrations import (
    LONG_PROMPT,
    LONG_RESPONSE,
    lengths,
    load_demonstrations,
)
from alphaspin.data.settings import TextConfig
from alphaspin.errors import InputError

SYSTEM = {"role": "system", "content": "Be kind."}
CALL = {"type": "function", "function": {"name": "count", "arguments": {"word": "kite"}}}
TOOLS = [{"type": "function", "function": {"name": "count"}}]
R1 = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}").replace(
    "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"
)
QWEN3 = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set think = m.reasoning_content or '' %}{% set said = m.content %}"
    "{% if '</think>' in said %}{% set think = said.split('</think>')[0].split('<think>')[-1] %}"
    "{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{% if loop.last and m.role == 'assistant' %}<think>\n{{ think.strip() }}\n</think>\n\n"
    "{% endif %}{{ said.lstrip('\n') }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y %H:%M:%S') }}\n" + CHATML


def template(tmp_path, source: str, **options) -> ChatFormat:
    file = tmp_path / "own.jinja"
    file.write_text(source)
    return ChatFormat.create(tokenizer_of("chatml"), str(file), **options)


def text(chat: ChatFormat, messages, tools=None) -> tuple[str, str]:
    return chat.render(messages, tools).texts


# What a template leaves out


THOUGHT = "<think>\nSpell it.\n</think>\n\nkite has 4."


@pytest.mark.parametrize(
    ("source", "messages", "part"),
    [
        (CHATML.replace("m.content", "m.content.split('</think>')[-1]"),
         [user("a"), assistant(THOUGHT)], "leaves out part of the assistant's answer, '<think>'"),
        (CHATML.replace("m.content", "m.content[:20]"),
         [user("a"), assistant("b" * 21)], "leaves out part of the assistant's answer, 'bbb"),
        (CHATML.replace("m.content", "m.content.replace('  ', ' ')"),
         [user("a"), assistant("if x:\n  y")], "leaves out part of the assistant's answer, 'if x"),
        (CHATML.replace("messages %}", "messages if m.role != 'system' %}"),
         [SYSTEM, user("a"), assistant("b")], "turn 1, of role system"),
        (CHATML.replace("messages %}", "messages if m.role != 'tool' %}"),
         [user("a"), assistant("b"), {"role": "tool", "content": "4"}, assistant("c")],
         "turn 3, of role tool"),
        (CHATML.replace("m.content", "m.content[:20]"),
         [user("a" * 21), assistant("b")], "turn 1, of role user"),
        (CHATML, [user("a"), assistant("b") | {"tool_calls": [CALL]}], "turn 2: tool_calls"),
        (CHATML, [user("a"), assistant("b") | {"reasoning_content": "r"}], "turn 2: reasoning_con"),
        (CHATML, [user("a"), assistant("b") | {"thinking": "r"}, user("c"), assistant("d")],
         "turn 2: thinking"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_named_with_the_row(tmp_path, source, messages, part):
    chat = template(tmp_path, source)
    rows = write(tmp_path / "rows.jsonl", QA, {"messages": messages})
    with pytest.raises(InputError) as caught:
        load_demonstrations(rows, chat, TextConfig())
    assert str(caught.value).startswith(f"{rows}:2: ") and part in str(caught.value)


def test_tools_that_a_template_leaves_out_are_refused(tmp_path):
    with pytest.raises(InputError, match="tools: the template leaves this out"):
        text(template(tmp_path, CHATML), [user("a"), assistant("b")], TOOLS)


def test_white_space_at_the_ends_and_around_marks_is_no_loss(tmp_path):
    trims = template(tmp_path, CHATML.replace("m.content", "m.content | trim"))
    assert text(trims, [user(" a\n"), assistant("\n b  c ")])[1].startswith("b  c<|im_end|>")
    chat = template(tmp_path, QWEN3)
    for answer in ("<think>r</think>b", "<think>\n\nr\n</think>\n\n\n\nb"):
        said = text(chat, [user("a"), assistant(answer)])[1]
        assert said.startswith("<think>\nr\n</think>\n\nb<|im_end|>")


def test_what_a_template_honours_is_in_the_tokens(tmp_path):
    chat = template(tmp_path, QWEN3)
    talk = [
        user("a"),
        assistant("") | {"tool_calls": [CALL]},
        {"role": "tool", "content": '{"n": 4}'},
        assistant("b") | {"reasoning_content": "r"},
    ]
    prompt, response = text(chat, talk, TOOLS)
    assert '<call>{"name": "count", "arguments": {"word": "kite"}}</call>' in prompt
    assert prompt.startswith('<|im_start|>tools\n[{"type": "function"') and '{"n": 4}' in prompt
    assert response.startswith("<think>\nr\n</think>\n\nb<|im_end|>")
    rows = write(tmp_path / "rows.jsonl", {"messages": talk, "tools": TOOLS})
    call, answer = load_demonstrations(rows, chat, TextConfig(turns="all"))[0]
    assert call.answer == '<call>{"name": "count", "arguments": {"word": "kite"}}</call>'
    assert answer.answer == "<think>\nr\n</think>\n\nb"


@pytest.mark.parametrize("join", ["+", "~"])
@pytest.mark.parametrize("arguments", [{"word": "kité's"}, '{"word": "kité\'s"}'])
def test_arguments_that_a_template_joins_as_text_are_json(tmp_path, join, arguments):
    """DeepSeek-V3's: `+` fails on an object, and `~` would write it as Python does."""
    calls = (
        "{% if 'tool_calls' in m %}{% for call in m.tool_calls %}{{ '<call>' JOIN "
        "call.function.name JOIN '\n' JOIN call.function.arguments JOIN '</call>' }}{% endfor %}"
        "{% else %} no calls{% endif %}"
    ).replace("JOIN", join)
    chat = template(tmp_path, CHATML.replace("{{ m.content }}", "{{ m.content }}" + calls))
    call = {"type": "function", "function": {"name": "count", "arguments": arguments}}
    talk = [user("a"), assistant("") | {"tool_calls": [call]}]
    rows = write(tmp_path / "rows.jsonl", {"messages": talk})
    (one,), _ = load_demonstrations(rows, chat, TextConfig())
    said = '<call>count\n{"word": "kité\'s"}</call>'
    assert said in text(chat, load_messages(rows)[0][0])[1] and one.answer == said
    more = [*talk, {"role": "tool", "content": "4"}, assistant("b")]
    rows = write(tmp_path / "rows.jsonl", {"messages": more})
    prompt = text(chat, load_messages(rows)[0][0])[0]
    assert said in prompt and "a no calls<|im_end|>" in prompt


def test_a_template_that_refuses_a_turn_without_its_calls_looks_at_them(tmp_path):
    strict = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% set ns = namespace(calls=false) %}"
        "{% for m in messages %}{% if m.tool_calls %}{% set ns.calls = true %}{{ m.tool_calls }}"
        "{% elif m.role == 'tool' and not ns.calls %}{{ raise_exception('no call') }}{% endif %}"
        "{% endfor %}"
    )
    talk = [user("a"), assistant("") | {"tool_calls": [CALL]}]
    talk += [{"role": "tool", "content": "4"}, assistant("b")]
    chat = template(tmp_path, strict + CHATML)
    assert text(chat, talk, TOOLS)[1].startswith("b<|im_end|>")


def test_a_tools_answer_may_be_laid_out_anew(tmp_path):
    doubled = CHATML.replace("{{ m.content }}", "{{ m.content | tojson }}")
    talk = [user("a"), assistant("b"), {"role": "tool", "content": '{"n": 4}'}, assistant("c")]
    assert '{\\"n\\": 4}' in text(template(tmp_path, doubled), talk)[0]


@pytest.mark.parametrize("earlier", [THOUGHT, "kite has 4."])
def test_thinking_of_earlier_turns_may_be_left_out_and_is_told(tmp_path, earlier):
    first = assistant(earlier)
    if earlier != THOUGHT:
        first["reasoning_content"] = "Spell it."
    rows = write(tmp_path / "rows.jsonl", {"messages": [user("a"), first, user("b"), first]})
    (one,), notes = load_demonstrations(rows, template(tmp_path, QWEN3), TextConfig())
    assert notes == {EARLIER: 1}
    prompt = tokenizer_of("chatml").decode(one.prompt)
    assert "Spell" not in prompt and "kite has 4." in prompt


# Prompts that open the thinking


def test_thinking_that_the_prompt_opens_is_the_answers(tmp_path):
    chat = template(tmp_path, R1)
    for turn in (
        assistant("<think>\nr\n</think>\n\nb"),
        assistant("r\n</think>\n\nb"),
        assistant("b") | {"reasoning_content": "r"},
    ):
        prompt, response = text(chat, [user("a"), turn])
        assert prompt.endswith("<|im_start|>assistant\n<think>\n")
        assert response == "r\n</think>\n\nb<|im_end|>\n"
        rows = write(tmp_path / "rows.jsonl", {"messages": [user("a"), turn]})
        (one,), notes = load_demonstrations(rows, chat, TextConfig())
        assert one.answer == chat.decode(one.response) == "<think>\nr\n</think>\n\nb"
        assert one.response[-1] == chat.end_token_id and not notes
        assert one.prompt.tolist() == chat.encode_prompt([user("a")])


@pytest.mark.parametrize(
    "answer",  # what a template makes of the thinking in an answer's text
    [
        "{{ m.content }}",
        "<think>\n{{ m.content.split('<think>')[-1].strip() }}",
        "<think>\n\n</think>\n\n{{ m.content }}",
        "<think>\n{{ m.content.split('</think>')[-1] }}",
    ],
)
def test_thinking_follows_the_mark_whatever_a_template_makes_of_it(tmp_path, answer):
    chat = template(
        tmp_path,
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n" + answer +
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    )  # fmt: skip
    prompt, response = text(chat, [user("a"), assistant("<think>\nr\n</think>\n\nb")])
    assert prompt.endswith("assistant\n<think>\n")
    assert response == "r\n</think>\n\nb<|im_end|>\n"
    with pytest.raises(InputError, match="opens <think>, and this answer has no </think>"):
        text(chat, [user("a"), assistant("b")])


@pytest.mark.parametrize("turn", [assistant("b"), assistant("</think>") | {"tool_calls": [CALL]}])
def test_answers_without_the_thinking_that_the_prompt_opens_are_refused(tmp_path, turn):
    with pytest.raises(InputError, match="<think>"):
        text(template(tmp_path, R1), [user("a"), turn])


# Options


def test_options_reach_training_and_who_renders_elsewhere(tmp_path):
    messages = [user("a"), assistant("b")]
    chat = template(tmp_path, QWEN3, options={"enable_thinking": False})
    assert text(chat, messages)[0].endswith("assistant\n<think>\n\n</think>\n\n")
    assert text(chat, messages)[1].startswith("b<|im_end|>")
    assert chat.decode(chat.encode(messages)[1]) == "b"
    tokenizer = tokenizer_of("chatml")
    there = tokenizer.apply_chat_template(
        messages[:1], chat_template=chat.source, add_generation_prompt=True, tokenize=False
    )
    assert there == text(chat, messages)[0]
    own = ChatFormat.create(tokenizer_of("thinking"))
    assert own.source == tokenizer_of("thinking").chat_template


def test_option_values_are_what_they_were(tmp_path):
    source = "{{ a }}|{{ b + 1 }}|{{ c is true }}|" + CHATML
    options = {"a": 'it\'s "é"\n{{', "b": 2, "c": True}
    chat = template(tmp_path, "\n" + source, options=options)
    assert text(chat, [user("x"), assistant("y")])[0].startswith('\nit\'s "é"\n{{|3|True|')


@pytest.mark.parametrize("name", ["enable_thinkin", "messages", "add_generation_prompt"])
def test_unknown_options_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=rf"text\.template_options\.{name}"):
        template(tmp_path, QWEN3, options={name: False})


# Dates


def test_a_template_is_told_one_date(tmp_path):
    first = template(tmp_path, DATED, clock="2026-01-02T03:04:05")
    assert text(first, [user("a"), assistant("b")])[0].startswith("02 Jan 2026 03:04:05\n")
    assert first.dates and not template(tmp_path, CHATML).dates
    fallback = '{% if strftime_now is defined %}{% set d = strftime_now("%Y") %}{% endif %}{{ d }}'
    told = template(tmp_path, fallback + CHATML, clock="1999-01-01T00:00:00")
    assert text(told, [user("a"), assistant("b")])[0].startswith("1999<|im_start|>")
    assert "1999" not in told.source  # elsewhere it is today
    with pytest.raises(InputError, match="a format that is computed"):
        template(tmp_path, "{{ strftime_now('%' ~ 'Y') }}" + CHATML)


# Length


def test_cut_and_dropped_demonstrations_are_counted(tmp_path):
    rows = [QA | {"answer": "She sold 24 clips " * n} for n in (1, 1, 20)]
    source, chat = write(tmp_path / "rows.jsonl", *rows), chat_of("chatml")
    size = len(chat.encode([user("2+2?"), assistant(rows[0]["answer"])])[1])
    found, notes = load_demonstrations(source, chat, TextConfig(max_response_tokens=size))
    assert [one.truncated for one in found] == [False, False, True] and not notes
    assert f"50 % ≤ {size}, 95 % ≤ {found[2].whole}" in lengths(found)
    assert lengths(found).endswith("; 1 of 3 demonstrations cut")
    assert found[2].whole > size == len(found[2].response)
    text = TextConfig(max_response_tokens=size, overlong="drop")
    found, notes = load_demonstrations(source, chat, text)
    assert (len(found), notes) == (2, {LONG_RESPONSE: 1})
    assert "cut" not in lengths(found)


def test_a_long_row_costs_its_own_length(tmp_path, monkeypatch):
    """What is too long for certain is neither rendered nor tokenised."""
    talk = [user("Hello " * 50), assistant("She sold 24 clips.")] * 400
    source = write(tmp_path / "rows.jsonl", {"messages": talk}, {"messages": talk[:2]})
    chat, sizes = chat_of("chatml"), []
    tokens = ChatFormat._tokens
    monkeypatch.setattr(
        ChatFormat,
        "_tokens",
        lambda self, texts: sizes.extend(map(len, texts)) or tokens(self, texts),
    )
    limits = TextConfig(turns="all", too_long="drop", max_prompt_tokens=400, max_response_tokens=9)
    found, notes = load_demonstrations(source, chat, limits)
    assert len(found) + notes[LONG_PROMPT] == 401 and len(found) > 2
    widest = max(map(len, chat.tokenizer.get_vocab()))
    assert max(sizes) < 2 * widest * 400
    answer = "x" * 200_000
    source = write(tmp_path / "long.jsonl", QA | {"answer": answer}, QA)
    sizes.clear()
    cut, _ = load_demonstrations(source, chat, limits)
    assert max(sizes) < 2 * widest * 20 and cut[0].truncated and cut[0].answer == answer
    limits = TextConfig(max_prompt_tokens=400)
    source = write(tmp_path / "ask.jsonl", QA | {"question": answer})
    with pytest.raises(InputError, match=r":1: the prompt has 200000 characters, text\.max_prompt"):
        load_demonstrations(source, chat, limits)


def test_prompts_alone_are_rendered_as_prompts(tmp_path):
    chat = template(tmp_path, QWEN3)
    source = write(tmp_path / "rows.jsonl", {"prompt": "a", "tools": json.dumps(TOOLS)}, QA)
    (one, other), _ = load_demonstrations(source, chat, TextConfig(), answers=False)
    assert (one.answer, other.answer, one.response.size) == (None, "4", 0)
    assert (
        tokenizer_of("chatml").decode(one.prompt).endswith("a<|im_end|>\n<|im_start|>assistant\n")
    )
    with pytest.raises(InputError, match=r"rows\.jsonl:1: tools"):
        load_demonstrations(source, chat_of("chatml"), TextConfig(), answers=False)
