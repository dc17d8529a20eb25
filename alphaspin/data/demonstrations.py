"""Demonstrations: from a file, a folder or the hub to prompt and response tokens.

Rows become conversations (`load_messages`), conversations become text and text becomes tokens
(`ChatFormat`, the one place for that, in training and in sampling), tokens become `Demonstration`s
(`load_demonstrations`). What a user can get wrong is an `InputError` with the file and line.
"""

import hashlib
import json
import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, cast

import jinja2
import numpy as np

from alphaspin.data.settings import TextConfig
from alphaspin.errors import InputError
from alphaspin.foundation import rng

log = logging.getLogger(__name__)

Messages = list[dict[str, str]]
Tokens = np.ndarray[tuple[int], np.dtype[np.int32]]

PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '### ' ~ m['role'] | capitalize ~ ':\n' ~ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' }}{{ '\n\n' }}{% endfor %}"
    "{{ '### Assistant:\n' if add_generation_prompt }}"
)
PROBE = "quokka"  # an answer that no template contains and no normaliser changes
SUFFIXES = (".jsonl", ".json", ".parquet")
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


@dataclass(frozen=True, slots=True, eq=False)
class ChatFormat:
    """A tokenizer with its chat template; built by `create`.

    A prompt's tokens never depend on the answer, so that a sample and a demonstration follow the
    same ones. An answer's tokens are what the *whole* text has after the prompt's: SentencePiece
    puts a space marker before a text that stands alone, and whole texts are what models are trained
    on. Where the whole text does not begin with the prompt's tokens (a merge over the seam, as of
    a final space with the first word) the answer is tokenised apart.
    """

    tokenizer: Any  # of transformers
    template: str | None  # Jinja source; None is the tokenizer's own
    end_token_id: int  # the last token of a complete response
    stop_token_ids: frozenset[int]  # where generation stops; has the end token
    renders_end: bool = False  # whether the template has the end token; otherwise it is appended
    bos: tuple[int, ...] = ()  # put before a prompt that lacks the BOS its tokenizer wants
    context: tuple[int, ...] = ()  # a prompt to decode after: decoders trim the start of a text
    wrapping: tuple[str, str] = ("", "")  # what the template has around an answer, decoded

    @classmethod
    def create(
        cls, tokenizer: Any, template: str = "auto", extra_stop_ids: Iterable[int] = ()
    ) -> "ChatFormat":
        """The format of a tokenizer under `text.template`.

        The end token is found behind the answer of a probe conversation: the first token there that
        is a stop token (the tokenizer's EOS or one of `extra_stop_ids`, the model's generation
        config), else the last special token; a template without one gets the EOS appended.

        Raises:
            InputError: no such template file; a template that fails, or renders conversations
                not as continuations of its generation prompt; no end token.
        """
        eos, bos = (cast("int | None", i) for i in (tokenizer.eos_token_id, tokenizer.bos_token_id))
        stops = frozenset(extra_stop_ids) | frozenset(() if eos is None else (eos,))
        adds_bos = bos is not None and tokenizer(PROBE)["input_ids"][:1] == [bos]
        chat = cls(tokenizer, _template_source(tokenizer, template), -1, stops)
        texts = chat.render(_turns("Hello", "user") + _turns(PROBE, "assistant"))
        if PROBE not in texts[1]:
            raise InputError("text.template: the template leaves out what the assistant says")
        special = set(tokenizer.all_special_ids)
        special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        tail = chat._tokens([texts[1].rpartition(PROBE)[2]])[0]
        ends = [i for i in tail if i in stops][:1] or [i for i in tail if i in special][-1:]
        end = ends[0] if ends else eos
        if end is None:
            raise InputError("no end token: set the tokenizer's eos_token, or use a text.template")
        chat = replace(chat, end_token_id=end, stop_token_ids=stops | {end}, renders_end=bool(ends))
        chat = replace(chat, bos=(bos,) if adds_bos else ())
        ((prompt, response),) = chat.tokenise([texts])
        chat = replace(chat, context=tuple(prompt))
        head, _, rest = chat.decode(chat.close(response)).partition(PROBE)
        return replace(chat, wrapping=(head, rest))

    def render(self, messages: Messages) -> tuple[str, str]:
        """Texts of the prompt and of the last assistant turn, with all that the template adds.

        Raises:
            InputError: the template refuses the conversation, or renders its last turn as something
                else than a continuation of the generation prompt.
        """
        prompt, full = self._render(messages[:-1], True), self._render(messages, False)
        if full.startswith(prompt):
            return prompt, full[len(prompt) :]
        raise InputError(
            "text.template: the template does not render a conversation as a continuation of its "
            f"generation prompt, which ends with {prompt[-40:]!r}; the conversation ends with "
            f"{full[-60:]!r}: set it to `plain` or to a Jinja file that does"
        )

    def tokenise(self, texts: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Ids of rendered (prompt, response) pairs; responses still have to be closed."""
        prompts = self._tokens([prompt for prompt, _ in texts])
        wholes = self._tokens([prompt + response for prompt, response in texts])
        pairs: list[tuple[list[int], list[int]]] = []
        for ids, whole, (_, text) in zip(prompts, wholes, texts, strict=True):
            in_place = whole[: len(ids)] == ids
            response = whole[len(ids) :] if in_place else self._tokenise_apart(text)
            pairs.append((self._with_bos(ids), response))
        return pairs

    def close(self, response: list[int]) -> list[int]:
        """A tokenised response with the end token at its end, once, and nothing after it.

        Raises:
            InputError: nothing before the end token, or a stop token, which no sample can have.
        """
        end, body = self.end_token_id, list(response)
        if self.renders_end and end in body:
            del body[len(body) - body[::-1].index(end) :]
        while body and body[-1] == end:  # data sets often have the end token's text in the answer
            body.pop()
        if not body:
            raise InputError("the assistant's answer has no tokens")
        for stop in self.stop_token_ids.intersection(body):
            text = self._text([stop], skip=False)
            raise InputError(f"the assistant's answer has {text!r}, where generation would stop")
        return [*body, end]

    def encode(self, messages: Messages) -> tuple[list[int], list[int]]:
        """Prompt ids, and response ids of the last assistant turn, which end with the end token.

        Raises:
            InputError: as `render` and `close`.
        """
        ((prompt, response),) = self.tokenise([self.render(messages)])
        return prompt, self.close(response)

    def encode_prompt(self, messages: Messages) -> list[int]:
        """The same prompt ids, for messages without the last assistant turn."""
        return self._with_bos(self._tokens([self._render(messages, True)])[0])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a response up to its first stop token, as the assistant's turn would have it.

        Special tokens and what the template has around an answer (a space, an empty `<think>`
        block) are left out.
        """
        body = [int(i) for i in takewhile(lambda i: i not in self.stop_token_ids, ids)]
        before, whole = self._text(self.context), self._text([*self.context, *body])
        text = whole.removeprefix(before) if whole.startswith(before) else self._text(body)
        return text.removeprefix(self.wrapping[0]).removesuffix(self.wrapping[1])

    def _render(self, messages: Messages, generation: bool) -> str:
        options: dict[str, Any] = {"chat_template": self.template, "tokenize": False}
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=generation, **options
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(f"text.template: the template refuses this: {error}") from error

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        # No attention masks or type ids; `verbose` would warn of texts beyond the model's length.
        masks = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return self.tokenizer(texts, add_special_tokens=False, **masks)["input_ids"]

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if tuple(ids[:1]) == self.bos else [*self.bos, *ids]

    def _tokenise_apart(self, text: str) -> list[int]:
        """Ids of a text in the middle of another: of several ways, what decodes there best."""
        wanted = self._text(self.context, skip=False) + text
        best, most = [], -1
        for anchor in ("", "\n", ":", "a"):  # after a plain character, no space marker is added
            start, whole = self._tokens([anchor, anchor + text])
            ids = whole[len(start) :]
            decoded = self._text([*self.context, *ids], skip=False)
            right = sum(takewhile(bool, map(str.__eq__, decoded, wanted)))
            if whole[: len(start)] == start and right > most:
                best, most = ids, right
        return best

    def _text(self, ids: Sequence[int], skip: bool = True) -> str:
        options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(list(ids), **options)


def load_messages(source: str, split: str = "train") -> Iterator[tuple[Messages, str]]:
    """Checked conversations and their origins, in order, from any source.

    Args:
        source: a JSONL, JSON (list of rows, or JSON lines) or Parquet file; a folder of such files
            at any depth, or from `datasets.save_to_disk`; a hub id `name` or `name:config`.
        split: split of a `datasets` folder or a hub data set; other files have none.

    Raises:
        InputError: while iterating: nothing to read, or a row that is no conversation.
    """
    for row, origin in _rows(source, split):
        with _located(origin):
            messages = _conversation(row)
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
            with _located(origin):
                texts.append(chat.render(messages))
        for (messages, origin), (prompt, raw) in zip(batch, chat.tokenise(texts), strict=True):
            with _located(origin):
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


def _template_source(tokenizer: Any, template: str) -> str | None:
    own = template == "auto" and bool(tokenizer.chat_template)
    plain = not own and template in ("auto", "plain")
    log.info("chat template: %s", "the tokenizer's own" if own else "plain" if plain else template)
    if own or plain:
        return None if own else PLAIN_TEMPLATE
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        hint = f"{error.strerror}; expected auto, plain, or the path of a Jinja file"
        raise InputError(f"text.template = {template}: {hint}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"text.template = {template}: not UTF-8 at byte {error.start}") from None


@contextmanager
def _located(origin: str) -> Generator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error.__cause__


def _rows(source: str, split: str) -> Iterator[tuple[Any, str]]:
    path = Path(source).expanduser()
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if path.is_dir() and not saved:
        inside = (f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        # Hidden files and folders are other programs' caches.
        names = (file.relative_to(path) for file in inside)
        files = sorted(n for n in names if not any(part.startswith(".") for part in n.parts))
        if not files:
            raise InputError(f"{source}: no {', '.join(SUFFIXES)} file in this folder")
        for file in files:
            yield from _file_rows(path / file)
    elif saved or not (path.exists() or path.suffix in SUFFIXES or source[:1] in "./~"):
        yield from _dataset_rows(source, split, saved)
    else:
        yield from _file_rows(path)


def _file_rows(path: Path) -> Iterator[tuple[Any, str]]:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: a data file ends with one of {', '.join(SUFFIXES)}")
    empty = True
    try:
        for row in _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path):
            empty = False
            yield row
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if empty:
        raise InputError(f"{path}: no rows")


def _json_rows(path: Path) -> Iterator[tuple[Any, str]]:
    with path.open("rb") as file:
        offset = 3 if file.peek(3).startswith(b"\xef\xbb\xbf") else 0  # byte order mark
        file.seek(offset)
        # A .json file is a list of rows or, as is common, JSON lines under another name.
        listed = path.suffix == ".json" and file.peek(1).lstrip().startswith(b"[")
        for number, line in enumerate([file.read()] if listed else file, 1):
            if line.strip():
                value = _parse(line, path, number, offset)
                rows = cast("list[Any]", value) if listed else [value]
                for index, row in enumerate(rows):
                    yield row, f"{path}[{index}]" if listed else f"{path}:{number}"
            offset += len(line)


def _parse(data: bytes, path: Path, line: int, offset: int) -> Any:
    """JSON from bytes that begin at this line and byte offset of the file."""
    try:
        return json.loads(data.decode().rstrip())  # an error at the end belongs to the last line
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        reason = f"not UTF-8 at byte {offset + error.start} of the file"
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        reason = f"broken JSON at column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:  # endless digits, or thousands of brackets
        reason = f"broken JSON: {error}"
    raise InputError(f"{path}:{line}: {reason}")


def _parquet_rows(path: Path) -> Iterator[tuple[Any, str]]:
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    yield row, f"{path}[{number}]"
                    number += 1
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}[{number}] or later: broken Parquet: {error}") from None


def _dataset_rows(source: str, split: str, saved: bool) -> Iterator[tuple[Any, str]]:
    datasets = import_module("datasets")  # takes a second, and few sources need it
    try:
        if saved:
            data = datasets.load_from_disk(str(Path(source).expanduser()))
            data = cast(Any, data)[split] if isinstance(data, dict) else data
        else:
            name, _, config = source.partition(":")
            data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # offline, not found, gated, no such split: an open set
        what = "" if saved else "no such file or folder, and not from the hub: "
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{source} (split {split}): {what}{reason}") from error
    if not len(data):
        raise InputError(f"{source} (split {split}): no rows")
    yield from ((row, f"{source}:{split}[{number}]") for number, row in enumerate(data))


def _conversation(row: Any) -> Messages:
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
    return _checked(_turns(question, "user") + _turns(columns[rest[0]], "assistant"))


def _turns(value: Any, role: str) -> list[Any]:
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
