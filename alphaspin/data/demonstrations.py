"""Demonstrations: from a file, a folder or the hub to prompt and response tokens.

`files` has rows, `rows` makes conversations of them, `chat` makes text of these and tokens of text;
here tokens become `Demonstration`s. What a user can get wrong is an `InputError` with the file and
line.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from alphaspin.data.chat import ChatFormat, Rendered
from alphaspin.data.files import located, read_rows
from alphaspin.data.rows import ANSWERED, FIELDS, Conversation, Messages, conversation
from alphaspin.data.settings import TextConfig
from alphaspin.errors import InputError
from alphaspin.foundation import rng

Tokens = np.ndarray[tuple[int], np.dtype[np.int32]]
UNREAD = "rows have what is not read: {}"
POSING = "prompts have the text {!r}, which becomes a special token as the template's own do"
LONG_PROMPT = "rows dropped: the prompt is longer than text.max_prompt_tokens"
EMPTY_PROMPT = "rows dropped: a turn of the user's is empty"
LONG_RESPONSE = "rows dropped: the response is longer than text.max_response_tokens"


@dataclass(frozen=True, slots=True, eq=False)
class Demonstration:
    """A prompt with the answer to learn from, as int32 token ids."""

    index: int  # position in the loaded data set: the example's identity for all randomness
    prompt: Tokens  # [P], ends where generation starts
    response: Tokens  # [R], ends with the end token unless truncated; empty without an answer
    truncated: bool  # cut at text.max_response_tokens
    answer: str | None  # the assistant turn's text; None where the row has a prompt alone
    origin: str  # file:line of JSON lines; file[row] or hub-id:split[row], from 0, elsewhere
    messages: Messages = field(default_factory=list[dict[str, Any]])  # the turns before the answer
    whole: int = 0  # tokens of the response before it was cut

    @property
    def names(self) -> tuple[bytes, bytes]:
        """Prompts are one where one of these is: the tokens; the turns, but for white space and
        how letters are composed."""
        turns = [
            (turn["role"], unicodedata.normalize("NFC", turn["content"]).split())
            for turn in self.messages
        ]
        tokens = self.prompt.tobytes()
        return tokens, repr(turns).encode() if turns else tokens


def load_conversations(
    source: str,
    split: str = "train",
    *,
    answers: bool = True,
    fields: Collection[str] = FIELDS,
    notes: Counter[str] | None = None,
) -> Iterator[tuple[Conversation, str]]:
    """Checked conversations and their origins, in order, from any source.

    Args:
        source: as `read_rows` has it.
        split: of a folder or a hub data set.
        answers: whether each row must have one.
        fields: what is kept of turns beside role and content.
        notes: gets what is to be said, with counts.

    Raises:
        InputError: while iterating: nothing to read, or a row that is no conversation or says what
            cannot be honoured.
    """
    notes = Counter() if notes is None else notes
    unread: Counter[str] = Counter()
    for row, origin in read_rows(source, split, fields, notes):
        with located(origin):
            found = conversation(row, answers, fields)
        notes.update(filter(None, [found.note]))
        unread.update(found.unread)
        if found.messages:
            yield found, origin
    if unread:
        notes[UNREAD.format(", ".join(sorted(unread)))] += max(unread.values())


def load_demonstrations(
    source: str, chat: ChatFormat, text: TextConfig, split: str = "train", *, answers: bool = True
) -> tuple[list[Demonstration], Counter[str]]:
    """Tokenised demonstrations of a source, the i-th with index i, and what is to be said of them.

    `text.turns = all` makes one of each assistant turn, whose prompt is all before it. A response
    beyond `text.max_response_tokens`, end token included, is cut there, or dropped. A text of more
    characters than any that is short enough is not tokenised: a row costs its own length.

    Returns:
        The demonstrations; sentences, with the number of rows that each is about.

    Raises:
        InputError: as `load_conversations` and `ChatFormat`; a prompt beyond
            `text.max_prompt_tokens` (with `text.too_long = drop` only if no shorter one is left).
    """
    found: list[Demonstration] = []
    notes: Counter[str] = Counter()
    rows = load_conversations(source, split, answers=answers, fields=chat.fields, notes=notes)
    widest = max(map(len, chat.tokenizer.get_vocab()))  # characters of a token, or more
    special = chat.special_texts()
    turns = _demonstrated(rows, text, widest, notes)
    while batch := list(islice(turns, 1024)):  # fast tokenizers work on a batch in parallel
        rendered: list[Rendered] = []
        for row, end, origin in batch:
            with located(origin):
                one = _rendered(chat, row, end)
            notes.update(filter(None, [one.note]))
            asked = "\n".join(turn["content"] for turn in row.messages[:end])
            # A user's <|im_end|> closes the turn, and what follows it may pose as another's.
            notes.update(POSING.format(text) for text in special if text in asked)
            room = 2 * widest * (text.response_limit + 1)
            rendered.append(one._replace(response=one.response[:room]))
        tokens = chat.tokenise([one.texts for one in rendered])
        for (row, end, origin), (prompt, raw) in zip(batch, tokens, strict=True):
            answer = row.messages[end] if end < len(row.messages) else None
            with located(origin):
                response = chat.close(raw) if answer else []
                if not prompt:
                    raise InputError("the prompt has no tokens: nothing precedes the answer")
            one = Demonstration(
                len(found),
                np.array(prompt, np.int32),
                np.array(response, np.int32),
                False,
                _answer(chat, answer, response),
                origin,
                row.messages[:end],
                len(response),
            )
            found += within([one], text, notes)
    if not found:
        said = "; ".join(f"{count} {note}" for note, count in notes.items())
        raise InputError(f"{source}: no demonstration is left: {said}")
    return found, notes


def within(
    demonstrations: Sequence[Demonstration], text: TextConfig, notes: Counter[str]
) -> list[Demonstration]:
    """Demonstrations under the limits of `text`; what is left out is counted in `notes`.

    Raises:
        InputError: a prompt beyond `text.max_prompt_tokens`, without `text.too_long = drop`.
    """
    kept: list[Demonstration] = []
    for one in demonstrations:
        cut = one.whole > text.response_limit
        if len(one.prompt) > text.prompt_limit:
            if text.too_long == "error":
                raise InputError(f"{one.origin}: {_too_long(f'{len(one.prompt)} tokens', text)}")
            notes[LONG_PROMPT] += 1
        elif cut and text.overlong == "drop":
            notes[LONG_RESPONSE] += 1
        else:
            ids = one.response[: text.response_limit].copy() if cut else one.response
            kept.append(replace(one, response=ids, truncated=cut))
    return kept


def _demonstrated(
    rows: Iterable[tuple[Conversation, str]], text: TextConfig, widest: int, notes: Counter[str]
) -> Iterator[tuple[Conversation, int, str]]:
    """Conversations, how many turns are the prompt, and their origins.

    Rows with an empty turn of the user's are left out, unless `text.empty_prompt` keeps them.
    Prompts of more characters than `text.max_prompt_tokens` tokens can have are left out, and not
    even rendered: the prompts of all turns of a long conversation would cost its square.
    """
    for row, origin in rows:
        ends = [end - 1 for end in row.ends]
        ends += [] if row.answered else [len(row.messages)]
        size = place = empty = 0
        for end in ends if text.turns == "all" else ends[-1:]:
            for number, turn in enumerate(row.messages[place:end], place + 1):
                size += len(turn["content"])
                if turn["role"] == "user" and not turn["content"].strip():
                    empty = number
            place = end
            if empty and text.empty_prompt == "error":
                raise InputError(
                    f"{origin}: turn {empty}: the user's is empty: give it a text, or set "
                    "text.empty_prompt to drop or keep"
                )
            if empty and text.empty_prompt == "drop":
                notes[EMPTY_PROMPT] += 1
            elif size <= widest * text.prompt_limit:
                yield row, end, origin
            elif text.too_long == "error":
                raise InputError(f"{origin}: {_too_long(f'{size} characters', text)}")
            else:
                notes[LONG_PROMPT] += 1


def _too_long(size: str, text: TextConfig) -> str:
    return (
        f"the prompt has {size}, text.max_prompt_tokens is {text.max_prompt_tokens}: raise it, or "
        "set text.too_long to drop"
    )


def _rendered(chat: ChatFormat, row: Conversation, end: int) -> Rendered:
    """The text of a conversation up to its answer behind the first `end` turns, if there is one."""
    if end < len(row.messages):
        return chat.render(row.messages[: end + 1], row.tools)
    return chat.render_prompt(row.messages, row.tools)


def _answer(chat: ChatFormat, turn: dict[str, Any] | None, response: Sequence[int]) -> str | None:
    """An answer as given or, where it is more than its content, as the model would say it."""
    if turn and (chat.opening or any(turn.get(name) for name in ANSWERED)):
        return chat.decode(response)
    return turn["content"] if turn else None


def hold_out(
    demonstrations: Sequence[Demonstration], count: int, seed: int
) -> tuple[list[Demonstration], list[Demonstration]]:
    """Training and held-out demonstrations, both in the order given.

    Those with the same prompt stay together, so that no held-out prompt is trained on; fewer than
    `count` are held out where groups do not fit. The choice depends on the seed and the set of
    prompts, not on their order.

    Raises:
        InputError: nothing would be left to train on, or nothing can be held out.
    """
    groups: dict[bytes, list[int]] = {}
    known: dict[bytes, bytes] = {}
    for position, one in enumerate(demonstrations):
        tokens, turns = one.names
        groups.setdefault(known.setdefault(tokens, turns), []).append(position)

    def rank(positions: list[int]) -> int:
        prompt = min(demonstrations[position].prompt.tobytes() for position in positions)
        identity = int.from_bytes(hashlib.sha256(prompt).digest(), "little")
        return rng.key(seed, 0, "heldout", identity)

    chosen: set[int] = set()
    for positions in sorted(groups.values(), key=rank):
        if len(chosen) + len(positions) <= count:
            chosen.update(positions)
    if count and len(chosen) in (0, len(demonstrations)):
        raise InputError(
            f"{count} held-out prompts cannot be set aside from {len(demonstrations)} "
            f"demonstrations of {len(groups)} prompts: lower evaluate.prompts, or give --heldout"
        )
    sides: tuple[list[Demonstration], list[Demonstration]] = ([], [])
    for position, one in enumerate(demonstrations):
        sides[position in chosen].append(one)
    return sides


def shared(
    demonstrations: Iterable[Demonstration], heldout: Iterable[Demonstration]
) -> list[tuple[Demonstration, Demonstration]]:
    """Held-out demonstrations whose prompts are also trained on, each with one that has its own."""
    trained = {name: one for one in demonstrations for name in one.names}
    found = ((one, [name for name in one.names if name in trained]) for one in heldout)
    return [(one, trained[names[0]]) for one, names in found if names]


def lengths(demonstrations: Sequence[Demonstration]) -> str:
    """Percentiles of the tokens of prompts and whole responses, and how many of these were cut."""
    parts: list[str] = []
    sizes = {"prompts": [len(one.prompt) for one in demonstrations]}
    sizes["responses"] = [one.whole for one in demonstrations if one.answer is not None]
    for name, values in sizes.items():
        if values:
            middle, high, higher = np.percentile(values, (50, 95, 99), method="higher")
            shown = f"50 % ≤ {middle}, 95 % ≤ {high}, 99 % ≤ {higher}, all ≤ {max(values)} tokens"
            parts.append(f"{name} {shown}")
    cuts = sum(one.truncated for one in demonstrations)
    return "; ".join(parts) + f"; {cuts} of {len(demonstrations)} demonstrations cut" * (cuts > 0)


def fingerprint(demonstrations: Iterable[Demonstration]) -> str:
    """SHA-256, in hex, of all prompt and response tokens in order."""
    digest = hashlib.sha256()
    for one in demonstrations:
        for ids in (one.prompt, one.response):
            digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes())
    return digest.hexdigest()
