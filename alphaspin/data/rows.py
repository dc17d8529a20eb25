"""Rows of any known format to conversations, checked."""

from typing import Any, cast

from alphaspin.errors import InputError

Messages = list[dict[str, str]]

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
FORMATS = (  # columns of a row; the first match counts
    ("messages",),
    ("real",),  # SPIN's own files, whose other column is an old opponent's answer
    ("conversations",),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("question", "answer"),
)


def conversation(row: Any) -> Messages:
    """The messages of a row in any of `FORMATS`, checked."""
    if not isinstance(row, dict):
        raise InputError(f"expected an object of columns, found {_kind(row)}")
    columns = cast("dict[str, Any]", row)
    # Where formats are mixed, a Parquet file fills the others' columns with null.
    filled = [f for f in FORMATS if all(columns.get(name) is not None for name in f)]
    present = filled or [f for f in FORMATS if columns.keys() >= set(f)]
    if not present:
        accepted = ", ".join("+".join(names) for names in FORMATS)
        raise InputError(f"found columns {', '.join(columns)}; expected one of {accepted}")
    first, *rest = present[0]
    if not rest:
        return _checked(columns[first])
    question = columns[first]
    if first == "instruction" and columns.get("input"):
        parts = (_checked_text(columns[name], name) for name in (first, "input"))
        question = "\n\n".join(parts)
    return _checked(turns_of(question, "user") + turns_of(columns[rest[0]], "assistant"))


def turns_of(value: Any, role: str) -> list[Any]:
    """A prompt or completion as messages, which TRL's conversational form has already."""
    if isinstance(value, list):
        return cast("list[Any]", value)
    return [{"role": role, "content": value}]


def _checked(turns: Any) -> Messages:
    if not isinstance(turns, list):
        raise InputError(f"expected a list of turns, found {_kind(turns)}")
    messages: Messages = []
    for number, turn in enumerate(cast("list[Any]", turns), 1):
        if not isinstance(turn, dict):
            raise InputError(f"turn {number}: expected role and content, found {_kind(turn)}")
        fields = cast("dict[str, Any]", turn)
        role = fields.get("role", fields.get("from"))
        role = SHAREGPT_ROLES.get(str(role), str(role))
        previous = messages[-1]["role"] if messages else "system"
        expected = "assistant" if previous == "user" else "user"
        if role != expected and (role, number) != ("system", 1):
            order = "an optional system turn, then user and assistant in alternation"
            raise InputError(f"turn {number}: expected {expected}, found {role!r} ({order})")
        content = _checked_text(fields.get("content", fields.get("value")), f"turn {number}")
        if role == "assistant" and not content.strip():
            raise InputError(f"turn {number}: the assistant's answer is empty")
        messages.append({"role": role, "content": content})
    last = messages[-1]["role"] if messages else "no turn"
    if last != "assistant":
        raise InputError(f"the last turn must be the assistant's, found {last}")
    return messages


def _checked_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what}: expected text, found {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what}: half a surrogate pair at character {error.start}") from None
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(cast(object, value)).__name__
