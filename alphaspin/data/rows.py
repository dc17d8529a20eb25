"""Rows of any known format to conversations, checked: what a row says is kept or refused by name.

Whether a chat template honours what a turn says beside its content is for `chat` to find out.
"""

import contextlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from alphaspin.errors import InputError

Messages = list[dict[str, Any]]
"""Turns: `role` and `content`, both text, and whatever else a chat template may look at."""

FORMATS = (  # columns of a row; the first match counts
    ("messages",),
    ("real",),  # SPIN's own files, whose other column is an old opponent's answer
    ("conversations",),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("instruction", "output"),
    ("question", "answer"),
    ("question", "response"),
    ("chosen",),
)
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
SPELT = (("role", "from"), ("content", "value"))  # OpenAI's names, ShareGPT's
FIRST_ROLES = ("system", "developer")
TOOL_ROLES = ("tool", "function", "ipython", "observation")
SYSTEM = ("system", "system_prompt")
THINKING = ("reasoning_content", "reasoning", "thinking")
ANSWERED = (*THINKING, "tool_calls")  # what a turn may say beside its content
WEIGHTS = ("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight")
"""Of a turn: 0 or false where it is not trained on."""
OWN = ("role", "from", "content", "value", *WEIGHTS)  # what is understood here
FLAG = re.compile("mask|ignore|skip|train|loss|weight|learn|supervis", re.IGNORECASE)
"""Of a turn: what may be such a flag under another name, which would say nobody knows what."""
REFUSED = {  # columns that change what a row means, and what to do about them
    "images": "only text is trained on",
    "image": "only text is trained on",
    "videos": "only text is trained on",
    "audios": "only text is trained on",
    "audio": "only text is trained on",
    "documents": "put them into the prompt",
    "functions": "name the column tools, and its calls tool_calls",
    "chat_template_kwargs": "set text.template_options, for all rows alike",
}
ASIDE = ("input", "context", "choices", "options")  # more of the question, beside a prompt
UNTOLD = ("train_detail", *REFUSED)  # of a turn
FIELDS = frozenset({*OWN, *ANSWERED, *UNTOLD, "function_call"})
OTHERS = (*ASIDE, "history", "tools", "label", *WEIGHTS)
COLUMNS = frozenset({*sum(FORMATS, ()), *SYSTEM, *THINKING, *REFUSED, *OTHERS})
"""All columns that are looked at; others are not read."""
PREFERRED = "rows of preferences: chosen is the demonstration, rejected is not read"
UNWANTED = "rows left out: their label is false, the completion is not wanted"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row, checked."""

    messages: Messages
    ends: tuple[int, ...]  # how many turns there are up to each answer that is to be learnt
    tools: list[Any] | None = None  # descriptions, for the template
    note: str | None = None  # what is to be said of the row
    unread: frozenset[str] = frozenset()  # columns, and fields of turns, that nobody looks at

    @property
    def answered(self) -> bool:
        """Whether the last turn is an answer."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"


def conversation(row: Any, answers: bool = True, fields: Collection[str] = FIELDS) -> Conversation:
    """The conversation of a row in any of `FORMATS`; no `ends` where there is nothing to learn.

    Args:
        row: columns by name.
        answers: whether there must be one; otherwise a prompt alone will do.
        fields: what is kept of turns beside role and content.

    Raises:
        InputError: it is none, or says what cannot be honoured.
    """
    if not isinstance(row, dict):
        raise InputError(f"expected an object of columns, found {kind_of(row)}")
    columns = {name: _listwise(value) for name, value in cast("dict[str, Any]", row).items()}
    names = _format(columns, answers)
    if _unwanted(columns.get("label"), names):
        return Conversation([], (), note=UNWANTED)
    for name, hint in REFUSED.items():
        if columns.get(name):
            raise InputError(f"column {name}: cannot be honoured: {hint}")
    for name in WEIGHTS:
        number = _flag(value := columns.get(name))
        if number == 0 or (name == "weight" and value not in (None, "") and number != 1):
            raise InputError(f"column {name} = {value!r}: rows cannot be weighted")
    turns = _turns(columns, names, answers)
    unread = (columns.keys() - COLUMNS) | _unused(columns, names)
    messages, counted = _checked([*_before(columns, turns), *turns], answers, fields, unread)
    tools = _listed(columns.get("tools") or None, "tools", "descriptions") or None
    _check_whole(tools, "tools")
    note = PREFERRED if names[-1] == "chosen" else None
    return Conversation(messages, counted, tools, note, frozenset(unread - {note and "rejected"}))


def _flag(value: Any) -> float | None:
    """A flag as a number, however a file spells it; None where it is something else."""
    value = {"true": 1, "false": 0}.get(str(value).lower(), value)
    with contextlib.suppress(TypeError, ValueError):
        return float(value)
    return None


def _given(value: Any) -> bool:
    """Whether a cell holds something; 0 is something."""
    return value is not None and value not in ("", [], {})


def _unwanted(label: Any, names: tuple[str, ...]) -> bool:
    """Whether a row says that its completion is not to be learnt, as TRL's unpaired preferences.

    Elsewhere 0 may be the number of a class, and only false says so.
    """
    paired = names in (("prompt", "completion"), ("prompt", "response"))
    return _flag(label) == 0 and (paired or str(label).lower() == "false")


def _unused(columns: Mapping[str, Any], names: tuple[str, ...]) -> set[str]:
    """Columns that some rows are made of, and this one is not."""
    used = {*names, *SYSTEM, *THINKING, *REFUSED, "history", "tools", "weight"}
    used |= {ASIDE[0]} if names[0] == "instruction" else set()
    flags = {name for name in ("label", *WEIGHTS) if _flag(columns.get(name)) == 1}
    return {name for name in COLUMNS - used - flags if _given(columns.get(name))}


def _listwise(value: Any) -> Any:
    """Turns with one list a field, as `datasets` keeps a Sequence of them, as a list of turns."""
    fields = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    if fields and all(isinstance(each, list) for each in fields.values()):
        with contextlib.suppress(ValueError):  # of other lengths: no turns
            rows = zip(*fields.values(), strict=True)
            return [dict(zip(fields, row, strict=True)) for row in rows]
    return value


def turns_of(value: Any, role: str) -> list[Any]:
    """A prompt or completion as messages, which TRL's conversational form has already."""
    if isinstance(value, list):
        return cast("list[Any]", value)
    return [{"role": role, "content": value}]


def kind_of(value: Any) -> str:
    """The type of a value, as JSON's readers call it."""
    return "null" if value is None else type(cast(object, value)).__name__


def _format(columns: Mapping[str, Any], answers: bool) -> tuple[str, ...]:
    """The columns of `FORMATS` that a row has; the last may be missing where no answer need be."""

    def filled(names: Collection[str]) -> bool:
        return all(columns.get(name) is not None for name in names)

    # Where formats are mixed, a Parquet file fills the others' columns with null.
    found = [names for names in FORMATS if filled(names)]
    if not answers:
        found += [names for names in FORMATS if filled(names[:1])]
    found += [names for names in FORMATS if columns.keys() >= set(names)]
    if found:
        return found[0]
    accepted = ", ".join("+".join(names) for names in FORMATS)
    hint = ""
    if "text" in columns:
        hint = "; a text does not say where its answer begins: make it prompt and completion"
    elif any(filled(names[:1]) for names in FORMATS):
        hint = "; prompts alone serve a judge that needs no answers, without `control: sft`"
    elif len(columns) == 1 and re.search(r"[;\t|]", next(iter(columns))):
        hint = "; columns of a CSV file are separated by commas"
    raise InputError(f"found columns {', '.join(columns)}; expected one of {accepted}{hint}")


def _before(columns: Mapping[str, Any], turns: list[Any]) -> list[Any]:
    """The turns of columns that come before those of the format."""
    found: list[Any] = []
    for name in SYSTEM:
        turn = {"role": "system", "content": columns.get(name)}
        if turn["content"] and _said(turn) not in map(_said, (*found, *turns[:1])):
            found.append(turn)
    if [_said(turn)["role"] for turn in (*found, *turns[:1])].count("system") > 1:
        raise InputError(f"two system turns: column {' or '.join(SYSTEM)}, and another")
    for turn in _listed(columns.get("history") or None, "history", "pairs") or []:
        pair = cast("list[Any]", turn)
        if isinstance(turn, dict):
            found.append(turn)
        elif isinstance(turn, list) and len(pair) == 2:
            found += turns_of(pair[0], "user") + turns_of(pair[1], "assistant")
        else:
            raise InputError("history: expected pairs of question and answer, or turns")
    return found


def _said(turn: Any) -> dict[str, Any]:
    """Role and content of what may be a turn, to be compared."""
    fields = cast("dict[str, Any]", turn) if isinstance(turn, dict) else {}
    role, content = (fields.get(one, fields.get(other)) for one, other in SPELT)
    content = content.strip() if isinstance(content, str) else content
    return {"role": SHAREGPT_ROLES.get(str(role), role), "content": content}


def _turns(columns: Mapping[str, Any], names: tuple[str, ...], answers: bool) -> list[Any]:
    """The turns of the columns of a format."""
    first, *rest = names
    value = columns[first]
    thinking = {name: text for name in THINKING if (text := columns.get(name))}
    if not rest:
        if first == "chosen" and isinstance(value, str):
            raise InputError("chosen: a text without its prompt: add a column prompt")
        turns = _listed(value, first, "turns")
        if turns is None:
            raise InputError(f"{first}: expected a list of turns, found null")
    elif columns.get(rest[0]) is None and not answers:
        turns = turns_of(_asked(columns, first), "user")
    else:
        prompt = turns_of(_asked(columns, first), "user")
        turns = turns_of(columns[rest[0]], "assistant")
        if isinstance(columns[rest[0]], str):
            return [*prompt, turns[0] | thinking]
        # TRL's implicit prompts: the whole conversation, which `prompt` repeats or begins.
        if rest == ["chosen"] and turns and _said(turns[0])["role"] != "assistant":
            whole, start = ([_said(turn) for turn in one] for one in (turns, prompt))
            repeated = all(turn in whole for turn in start)
            if not repeated and any(turn in whole or turn["role"] == "user" for turn in start[-1:]):
                raise InputError("prompt and chosen: both have the prompt, and not the same one")
            prompt = [] if repeated else prompt
        turns = prompt + turns
    if thinking:
        raise InputError(f"column {min(thinking)}: put it into the turn to which it belongs")
    return turns


def _asked(columns: Mapping[str, Any], first: str) -> Any:
    """The prompt of a format of two columns, with what stands in others."""
    for name in ASIDE[first == "instruction" :]:
        if _given(columns.get(name)):
            raise InputError(f"column {name}: cannot be honoured: put it into the prompt")
    if first != "instruction" or not _given(columns.get("input")):
        return columns[first]
    return "\n\n".join(_text(columns[name], name) for name in (first, "input"))


def _listed(value: Any, what: str, members: str) -> list[Any] | None:
    """A list, perhaps written as JSON text, as in CSV.

    Raises:
        InputError: it is something else.
    """
    found = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            found = json.loads(value)
    if found is not None and not isinstance(found, list):
        raise InputError(f"{what}: expected a list of {members}, found {kind_of(value)}")
    return cast("list[Any] | None", found)


def _checked(
    turns: list[Any], answers: bool, kept: Collection[str], unread: set[str]
) -> tuple[Messages, tuple[int, ...]]:
    """The turns as messages, and how many there are up to each answer that counts.

    What nobody looks at is added to `unread`.
    """
    messages: Messages = []
    counted: list[int] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise InputError(f"turn {number}: expected role and content, found {kind_of(turn)}")
        fields = cast("dict[str, Any]", turn)
        role = fields.get("role", fields.get("from"))
        role = SHAREGPT_ROLES.get(str(role), str(role))
        for one, other in SPELT:
            values = [fields[name] for name in (one, other) if fields.get(name) is not None]
            if len({SHAREGPT_ROLES.get(str(v), str(v)) for v in values}) > 1:
                raise InputError(f"turn {number}: {one} and {other} differ: leave one of them out")
        _check_order(messages, role, number)
        message = {"role": role, "content": ""} | {
            key: value
            for key, value in fields.items()
            if value is not None and key in kept and key not in OWN
        }
        for name in fields:
            if name in kept or name in OWN:
                continue
            if fields[name] is not None and FLAG.search(name):
                raise InputError(
                    f"turn {number}: {name}: not known: whether a turn is trained on is told by "
                    "`weight`, 0 or 1"
                )
            unread.add(f"{name} of turns")
        for name in UNTOLD:
            if message.get(name):
                raise InputError(f"turn {number}: {name}: cannot be honoured")
        for name in THINKING:
            if message.get(name):
                _text(message[name], f"turn {number}: {name}")
        if calls := message.pop("tool_calls", None):
            listed = _listed(calls, f"turn {number}: tool_calls", "calls") or []
            if calls := [_call(call, number) for call in listed]:
                message["tool_calls"] = calls
        _check_whole(calls, f"turn {number}: tool_calls")
        if message.get("function_call"):
            raise InputError(f"turn {number}: function_call: write it as tool_calls")
        content = fields.get("content", fields.get("value"))
        if content is not None or not message.get("tool_calls"):
            message["content"] = _content(content, f"turn {number}")
        if role == "assistant":
            if not message["content"].strip() and not message.get("tool_calls"):
                raise InputError(f"turn {number}: the assistant's answer is empty")
            if _weight(fields, number):
                counted.append(number)
        messages.append(message)
    last = messages[-1]["role"] if messages else "no turn"
    if last != "assistant" and (answers or last not in ("user", *TOOL_ROLES)):
        raise InputError(f"the last turn must be the assistant's, found {last}")
    if last == "assistant" and not counted:
        raise InputError("no turn to train on: all of the assistant's have weight 0")
    return messages, tuple(counted)


def _check_order(messages: Messages, role: str, number: int) -> None:
    """Whether a turn may follow those before it."""
    previous = messages[-1]["role"] if messages else "system"
    expected = "assistant" if previous in ("user", *TOOL_ROLES) else "user"
    if role == expected or (number == 1 and role in FIRST_ROLES):
        return
    if role in TOOL_ROLES and previous in ("assistant", *TOOL_ROLES):
        return
    order = (
        "an optional system turn, then user and assistant in alternation; tool turns follow an "
        "assistant's"
    )
    raise InputError(f"turn {number}: expected {expected}, found {role!r} ({order})")


def _weight(fields: Mapping[str, Any], number: int) -> bool:
    """Whether a turn of the assistant's is to be learnt."""
    for name in WEIGHTS:
        if (value := fields.get(name)) is not None and value not in (0, 1):
            raise InputError(f"turn {number}: {name} = {value!r}: only 0 and 1 can be honoured")
    return all(fields.get(name) in (None, 1) for name in WEIGHTS)


def _call(call: Any, number: int) -> Any:
    """A tool call as templates want it: arguments that are JSON text, OpenAI's form, as objects."""
    if not isinstance(call, dict):
        raise InputError(f"turn {number}: tool_calls: expected objects, found {kind_of(call)}")
    fields = cast("dict[str, Any]", call)
    inner = fields.get("function")
    if isinstance(inner, dict):
        return fields | {"function": _call(inner, number)}
    if isinstance(arguments := fields.get("arguments"), str):
        try:
            return fields | {"arguments": json.loads(arguments or "{}")}
        except ValueError as error:
            raise InputError(f"turn {number}: tool_calls: arguments: {error}") from None
    return fields


def _content(value: Any, what: str) -> str:
    """The text of a turn, whose parts are joined."""
    if not isinstance(value, list):
        return _text(value, what)
    texts: list[str] = []
    for part in cast("list[Any]", value):
        fields = cast("dict[str, Any]", part) if isinstance(part, dict) else {"text": part}
        if (kind := fields.get("type", "text")) != "text":
            raise InputError(f"{what}: a part of type {kind!r}: only text is trained on")
        texts.append(_text(fields.get("text"), f"{what}: a part of its content"))
    return "".join(texts)


def _check_whole(value: Any, what: str) -> None:
    """Whether all texts in a value of JSON are whole."""
    if value:
        _text(json.dumps(value, ensure_ascii=False, default=str), what)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what}: expected text, found {kind_of(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what}: half a surrogate pair at character {error.start}") from None
    return value
