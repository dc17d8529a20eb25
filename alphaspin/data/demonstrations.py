"""Demonstrations: from a file, a folder or the hub to prompt and response tokens.

`files` has rows, `rows` makes conversations of them, `chat` makes text of these and tokens of text;
here tokens become `Demonstration`s. What a user can get wrong is an `InputError` with the file and
line.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from alphaspin.data.chat import ChatFormat
from alphaspin.data.files import located, read_rows
from alphaspin.data.rows import Messages, conversation
from alphaspin.data.settings import TextConfig
from alphaspin.errors import InputError
from alphaspin.foundation import rng

log = logging.getLogger(__name__)

Tokens = np.ndarray[tuple[int], np.dtype[np.int32]]


@dataclass(frozen=True, slots=True, eq=False)
class Demonstration:
    """A prompt with the answer to learn from, as int32 token ids."""

    index: int  # position in the loaded data set: the example's identity for all randomness
    prompt: Tokens  # [P], ends where generation starts
    response: Tokens  # [R], ends with the end token unless truncated
    truncated: bool  # cut at text.max_response_tokens
    answer: str  # the assistant turn's text as given
    origin: str  # file:line of JSON lines; file[row] or hub-id:split[row], from 0, elsewhere
    messages: Messages = field(default_factory=list[dict[str, str]])  # the turns before the answer


def load_messages(source: str, split: str = "train") -> Iterator[tuple[Messages, str]]:
    """Checked conversations and their origins, in order, from any source.

    Args:
        source: a JSONL, JSON (list of rows, or JSON lines) or Parquet file; a folder of such files
            at any depth, or from `datasets.save_to_disk`; a hub id `name` or `name:config`.
        split: split of a `datasets` folder or a hub data set; other files have none.

    Raises:
        InputError: while iterating: nothing to read, or a row that is no conversation.
    """
    for row, origin in read_rows(source, split):
        with located(origin):
            messages = conversation(row)
        yield messages, origin


def load_demonstrations(
    source: str, chat: ChatFormat, text: TextConfig, split: str = "train"
) -> tuple[list[Demonstration], int]:
    """Tokenised demonstrations of a source, the i-th with index i, and how many were dropped.

    `text.turns = all` makes one of each assistant turn, whose prompt is all before it. A response
    beyond `text.max_response_tokens`, end token included, is cut there.

    Raises:
        InputError: as `load_messages` and `ChatFormat`; a prompt beyond `text.max_prompt_tokens`
            (with `text.too_long = drop` only if no shorter one is left).
    """
    found: list[Demonstration] = []
    dropped = 0
    turns = _demonstrated(load_messages(source, split), text.turns == "all")
    while batch := list(islice(turns, 1024)):  # fast tokenizers work on a batch in parallel
        texts: list[tuple[str, str]] = []
        for messages, origin in batch:
            with located(origin):
                texts.append(chat.render(messages))
        for (messages, origin), (prompt, raw) in zip(batch, chat.tokenise(texts), strict=True):
            with located(origin):
                response = chat.close(raw)
                if not prompt:
                    raise InputError("the prompt has no tokens: nothing precedes the answer")
                if len(prompt) > text.max_prompt_tokens and text.too_long == "error":
                    raise InputError(
                        f"the prompt has {len(prompt)} tokens, text.max_prompt_tokens is "
                        f"{text.max_prompt_tokens}: raise it, or set text.too_long to drop"
                    )
            if len(prompt) > text.max_prompt_tokens:
                dropped += 1
                continue
            ids = np.array(response[: text.max_response_tokens], np.int32)
            cut = len(ids) < len(response)
            tokens = np.array(prompt, np.int32), ids
            answer = messages[-1]["content"]
            found.append(Demonstration(len(found), *tokens, cut, answer, origin, messages[:-1]))
    if not found:
        limit = f"text.max_prompt_tokens = {text.max_prompt_tokens}"
        raise InputError(f"{source}: all {dropped} prompts are longer than {limit}")
    cuts = sum(one.truncated for one in found)
    log.info("%s: %d demonstrations (%d cut), %d dropped", source, len(found), cuts, dropped)
    return found, dropped


def hold_out(
    demonstrations: Sequence[Demonstration], count: int, seed: int
) -> tuple[list[Demonstration], list[Demonstration]]:
    """Training and held-out demonstrations, both in the order given.

    Those with the same prompt tokens stay together, so that no held-out prompt is trained on; fewer
    than `count` are held out where groups do not fit. The choice depends on the seed and the set of
    prompts, not on their order.

    Raises:
        InputError: nothing would be left to train on, or nothing can be held out.
    """
    groups: dict[bytes, list[int]] = {}
    for position, one in enumerate(demonstrations):
        groups.setdefault(one.prompt.tobytes(), []).append(position)

    def rank(prompt: bytes) -> int:
        identity = int.from_bytes(hashlib.sha256(prompt).digest(), "little")
        return rng.key(seed, 0, "heldout", identity)

    chosen: set[int] = set()
    for prompt in sorted(groups, key=rank):
        if len(chosen) + len(groups[prompt]) <= count:
            chosen.update(groups[prompt])
    if count and len(chosen) in (0, len(demonstrations)):
        raise InputError(
            f"{count} held-out prompts cannot be set aside from {len(demonstrations)} "
            f"demonstrations of {len(groups)} prompts: lower evaluate.prompts, or give --heldout"
        )
    sides: tuple[list[Demonstration], list[Demonstration]] = ([], [])
    for position, one in enumerate(demonstrations):
        sides[position in chosen].append(one)
    return sides


def fingerprint(demonstrations: Iterable[Demonstration]) -> str:
    """SHA-256, in hex, of all prompt and response tokens in order."""
    digest = hashlib.sha256()
    for one in demonstrations:
        for ids in (one.prompt, one.response):
            digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes())
    return digest.hexdigest()


def _demonstrated(
    conversations: Iterable[tuple[Messages, str]], every: bool
) -> Iterator[tuple[Messages, str]]:
    """Conversations up to their last assistant turn, or up to each of them."""
    for messages, origin in conversations:
        ends = [n for n, turn in enumerate(messages, 1) if turn["role"] == "assistant"]
        yield from ((messages[:end], origin) for end in (ends if every else ends[-1:]))
