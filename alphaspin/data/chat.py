"""Conversations to tokens: a tokenizer with its chat template, in training and in sampling."""

import inspect
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, cast

import jinja2

from alphaspin.data.rows import ANSWERED, FIELDS, THINKING, TOOL_ROLES, Messages, turns_of
from alphaspin.data.settings import TextConfig
from alphaspin.errors import InputError

log = logging.getLogger(__name__)

PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '### ' ~ m['role'] | capitalize ~ ':\n' ~ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' }}{{ '\n\n' }}{% endfor %}"
    "{{ '### Assistant:\n' if add_generation_prompt }}"
)
PROBE = "quokka"  # an answer that no template contains and no normaliser changes
CLOCK = "strftime_now"  # how a template asks for the date
TAGS = re.compile(r"(</?[\w|]+>|\[/?[A-Z_]+\])")
"""Marks around which templates lay out white space anew, as `</think>` and `[/THINK]`."""
OPENING = re.compile(r"(<(think|thinking|thought|reasoning)>|\[THINK\])\s*\Z")
"""What a prompt ends with that has opened the thinking."""
CLOSING = re.compile(r"</\w+>|\[/[A-Z]+\]")
LEFT_OUT = (
    "the template leaves this out: set text.template to one that renders it, or take it out of the "
    "data"
)
EARLIER = "demonstrations whose prompts lack the thinking of earlier turns, as the template has it"


class Rendered(NamedTuple):
    """A conversation as text."""

    prompt: str
    response: str  # the last turn, with all that the template adds
    note: str | None = None  # what is to be said of it

    @property
    def texts(self) -> tuple[str, str]:
        """What becomes tokens."""
        return self.prompt, self.response


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
    opening: str = ""  # with which the generation prompt ends, if it opens the thinking
    options: str = ""  # sets the template's variables
    words: frozenset[str] = frozenset()  # all names that the template may look at, and more
    dates: str = ""  # tells a template that asks for the date what the date is

    @classmethod
    def of(
        cls,
        text: TextConfig,
        tokenizer: Any,
        extra_stop_ids: Iterable[int] = (),
        clock: str | None = None,
    ) -> "ChatFormat":
        """The format that settings say; see `create`."""
        options = text.template_options
        return cls.create(tokenizer, text.template, extra_stop_ids, options=options, clock=clock)

    @classmethod
    def create(
        cls,
        tokenizer: Any,
        template: str = "auto",
        extra_stop_ids: Iterable[int] = (),
        *,
        options: Mapping[str, Any] | None = None,
        clock: str | None = None,
    ) -> "ChatFormat":
        """The format of a tokenizer under `text.template` and `text.template_options`.

        A template that prints the date is told `clock`, in ISO 8601, whenever it asks; or now.

        The end token is found behind the answer of a probe conversation: the first token there that
        is a stop token (the tokenizer's EOS or one of `extra_stop_ids`, the model's generation
        config), else the last special token; a template without one gets the EOS appended.

        Raises:
            InputError: no such template file; a template that fails, lacks a variable, or renders
                conversations not as continuations of its generation prompt; no end token.
        """
        eos, bos = (cast("int | None", i) for i in (tokenizer.eos_token_id, tokenizer.bos_token_id))
        stops = frozenset(extra_stop_ids) | frozenset(() if eos is None else (eos,))
        adds_bos = bos is not None and tokenizer(PROBE)["input_ids"][:1] == [bos]
        source = _template_source(tokenizer, template)
        words = frozenset(re.findall(r"\w+", source or str(tokenizer.chat_template)))
        chat = cls(tokenizer, source, -1, stops, words=words)
        chat = replace(chat, options=chat._setting(options or {}))
        if CLOCK in words:
            every = source or str(tokenizer.chat_template)
            moment = datetime.fromisoformat(clock) if clock else datetime.now()
            chat = replace(chat, dates=_dates(every, moment))
        hello = turns_of("Hello", "user") + turns_of(PROBE, "assistant")
        prompt, full = chat._render(hello[:1], True), chat._render(hello, False)
        if PROBE not in full:
            raise InputError("text.template: the template leaves out what the assistant says")
        if opening := OPENING.search(prompt):  # what is rendered may lack it, or have no thinking
            chat = replace(chat, opening=opening.group())
            texts = Rendered(prompt, PROBE + full.rpartition(PROBE)[2])
        else:
            texts = chat.render(hello)
        special = _special(tokenizer)
        ids = chat._tokens([texts.response.rpartition(PROBE)[2]])[0]
        ends = [i for i in ids if i in stops][:1] or [i for i in ids if i in special][-1:]
        end = ends[0] if ends else eos
        if end is None:
            raise InputError("no end token: set the tokenizer's eos_token, or use a text.template")
        chat = replace(chat, end_token_id=end, stop_token_ids=stops | {end}, renders_end=bool(ends))
        chat = replace(chat, bos=(bos,) if adds_bos else ())
        ((context, response),) = chat.tokenise([texts.texts])
        chat = replace(chat, context=tuple(context))
        head, _, rest = chat.decode(chat.close(response)).partition(PROBE)
        return replace(chat, wrapping=(head.removeprefix(chat.opening), rest))

    def render(self, messages: Messages, tools: list[Any] | None = None) -> Rendered:
        """The prompt and the last turn, the assistant's, which holds all that the row says of it.

        Raises:
            InputError: the template refuses the conversation, leaves out part of it, or renders its
                last turn as something else than a continuation of the generation prompt.
        """
        prompt, full = (
            self._render(messages[:-1], True, tools),
            self._render(messages, False, tools),
        )
        continued = full.startswith(prompt)
        response = full[len(prompt) :] if continued else ""
        if self.opening and prompt.endswith(self.opening):
            response = self._thought(messages, response, tools)
        elif continued:
            if lost := _lost(messages[-1]["content"], response):
                raise InputError(
                    "text.template: the template leaves out part of the assistant's answer, "
                    f"{lost!r}: set it to a Jinja file that renders all of it, or to `plain`"
                )
        else:
            raise InputError(
                "text.template: the template does not render a conversation as a continuation of "
                f"its generation prompt, which ends with {prompt[-40:]!r}; the conversation ends "
                f"with {full[-60:]!r}: set it to `plain` or to a Jinja file that does"
            )
        note = self._check_prompt(messages[:-1], prompt, tools)
        return Rendered(prompt, response, self._check_fields(messages, full, tools) or note)

    def special_texts(self) -> list[str]:
        """What becomes a special token wherever it is written, in a user's text too."""
        return sorted(filter(str.strip, _special(self.tokenizer).values()))

    @property
    def source(self) -> str:
        """The template in Jinja, with its options set: for those who render elsewhere."""
        return self.options + self.tokenizer.get_chat_template(self.template)

    @property
    def fields(self) -> frozenset[str]:
        """What is read of a turn: what has a meaning for any template, and what this one names."""
        return FIELDS | self.words

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
        ((prompt, response),) = self.tokenise([self.render(messages).texts])
        return prompt, self.close(response)

    def render_prompt(self, messages: Messages, tools: list[Any] | None = None) -> Rendered:
        """The text of messages without the last assistant turn.

        Raises:
            InputError: the template refuses the conversation, or leaves out part of it.
        """
        prompt = self._render(messages, True, tools)
        note = self._check_prompt(messages, prompt, tools)
        fields = self._check_fields(messages, prompt, tools, generation=True)
        return Rendered(prompt, "", fields or note)

    def encode_prompt(self, messages: Messages) -> list[int]:
        """The same prompt ids, for messages without the last assistant turn."""
        return self._with_bos(self._tokens([self.render_prompt(messages).prompt])[0])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a response up to its first stop token, as the assistant's turn would have it.

        Special tokens and what the template has around an answer (a space, an empty `<think>`
        block) are left out.
        """
        body = [int(i) for i in takewhile(lambda i: i not in self.stop_token_ids, ids)]
        before, whole = self._text(self.context), self._text([*self.context, *body])
        text = whole.removeprefix(before) if whole.startswith(before) else self._text(body)
        return self.opening + text.removeprefix(self.wrapping[0]).removesuffix(self.wrapping[1])

    def _render(self, messages: Messages, generation: bool, tools: Any = None) -> str:
        """What the template makes of messages.

        Arguments of calls are objects, as most templates want them, or, where it joins them as
        text (DeepSeek-V3's), JSON.
        """
        written = [a for turn in messages for a in _arguments(turn)]
        try:
            text = self._applied(messages, generation, tools)
            if not any(a and str(a) in text for a in written):  # Python's own spelling
                return text
        except InputError as error:
            if not (written and isinstance(error.__cause__, TypeError)):
                raise
        texts = [
            turn | {"tool_calls": [_with_json(call) for call in calls]}
            if (calls := turn.get("tool_calls"))
            else turn
            for turn in messages
        ]
        return self._applied(texts, generation, tools)

    def _applied(self, messages: Messages, generation: bool, tools: Any) -> str:
        template = self.template
        if preamble := self.options + self.dates:
            template = preamble + self.tokenizer.get_chat_template(template, tools)
        options: dict[str, Any] = {"chat_template": template, "tools": tools, "tokenize": False}
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=generation, **options
            )
        except Exception as error:  # a template is a program, which may raise anything
            said = str(error) or type(error).__name__
            raise InputError(f"text.template: the template refuses this: {said}") from error

    def _setting(self, options: Mapping[str, Any]) -> str:
        """Jinja that sets variables of the template.

        Raises:
            InputError: it has no such variable.
        """
        taken = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, "messages"}
        for name in options:
            if name not in self.words or name in taken:
                raise InputError(f"text.template_options.{name}: the template has no such variable")
        # A template's environment takes one line break after a block away.
        values = ((name, json.dumps(value)) for name, value in options.items())
        return "".join(f"{{% set {name} = {value} %}}\n" for name, value in values)

    def _thought(self, messages: Messages, rendered: str, tools: Any) -> str:
        """The response where the prompt opens the thinking: rendered, if it is all there, or as the
        row has it, as some templates drop it or begin another.

        Raises:
            InputError: there is no thinking.
        """
        answer, tag = messages[-1], self.opening.strip()
        closing, space = f"{tag[0]}/{tag[1:]}", self.opening[len(self.opening.rstrip()) :]
        content = str(answer["content"])
        thinking = [str(text) for name in THINKING if (text := answer.get(name))]
        if thinking:
            content = f"{thinking[0].strip()}\n{closing}\n\n{content}"
        elif closing in content:
            content = content.lstrip().removeprefix(tag).removeprefix(space)
        else:
            raise InputError(
                f"text.template: the generation prompt opens {tag}, and this answer has no "
                f"{closing}: give demonstrations with their thinking, or let the prompt not open it"
                ", by text.template_options if the template has one for that"
            )
        first = content.partition(closing)[0].strip()
        if rendered.lstrip().startswith(first) and not _lost(content, rendered):
            return rendered
        if answer.get("tool_calls"):
            raise InputError(f"tool_calls: not after thinking that the prompt opens ({tag})")
        probe = [*messages[:-1], *turns_of(PROBE, "assistant")]
        return content + self._render(probe, False, tools).rpartition(PROBE)[2]

    def _check_prompt(self, messages: Messages, prompt: str, tools: Any) -> str | None:
        """Whether a prompt has all turns, and what is to be said of it.

        Thinking of earlier turns may be left out: so it is when the model answers.

        Raises:
            InputError: it lacks a turn, or part of one.
        """
        place, note = 0, None
        for number, turn in enumerate(messages, 1):
            content = str(turn["content"]).strip()
            if (found := prompt.find(content, place)) >= 0:
                place = found + len(content)
            elif not _lost(content, prompt):
                continue  # elsewhere, as a system turn in the last user turn
            elif turn["role"] == "assistant" and CLOSING.split(content)[-1].strip() in prompt:
                note = EARLIER
            else:
                other = [*messages[: number - 1], turn | {"content": PROBE}, *messages[number:]]
                # A template may lay out a tool's JSON anew.
                tool = turn["role"] in TOOL_ROLES
                if not tool or not self._differs(other, prompt, tools, True):
                    what = f"turn {number}, of role {turn['role']}"
                    raise InputError(f"text.template: the template leaves out (part of) {what}")
        return note

    def _check_fields(
        self, messages: Messages, text: str, tools: Any, generation: bool = False
    ) -> str | None:
        """Whether a rendered text depends on what is said beside role and content.

        Raises:
            InputError: on something it does not.
        """
        note = None
        if tools and not self._differs(messages, text, None, generation):
            raise InputError(f"tools: {LEFT_OUT}")
        for number, turn in enumerate(messages, 1):
            for name in ANSWERED:
                last = number == len(messages)
                if not turn.get(name) or (last and self.opening and name in THINKING):
                    continue
                without = {key: value for key, value in turn.items() if key != name}
                others = [*messages[: number - 1], without, *messages[number:]]
                if self._differs(others, text, tools, generation):
                    continue
                reads = self.opening or not self.words.isdisjoint(THINKING)
                if last or not (reads and name in THINKING):
                    raise InputError(f"turn {number}: {name}: {LEFT_OUT}")
                note = EARLIER
        return note

    def _differs(self, messages: Messages, text: str, tools: Any, generation: bool) -> bool:
        """Whether messages do not give a text; a template that refuses them has looked at them."""
        try:
            return self._render(messages, generation, tools) != text
        except InputError:
            return True

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


def _special(tokenizer: Any) -> dict[int, str]:
    """Special tokens and their texts, by id."""
    known = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    added = tokenizer.added_tokens_decoder.items()
    return known | {i: token.content for i, token in added if token.special}


def _arguments(turn: dict[str, Any]) -> list[Any]:
    """Arguments of a turn's calls that are objects."""
    calls = [call.get("function") or call for call in turn.get("tool_calls", ())]
    return [a for call in calls if isinstance(a := call.get("arguments"), dict)]


def _with_json(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose arguments are JSON."""
    if isinstance(inner := call.get("function"), dict):
        return call | {"function": _with_json(cast("dict[str, Any]", inner))}
    return call | {"arguments": json.dumps(call.get("arguments"), ensure_ascii=False)}


def _lost(content: str, text: str) -> str | None:
    """The first part of a turn that a text lacks; white space at its ends and at marks may go."""
    place = 0
    for part in filter(None, map(str.strip, TAGS.split(content))):
        if (found := text.find(part, place)) < 0:
            return part if len(part) <= 60 else f"{part[:57]}..."
        place = found + len(part)
    return None


def _dates(template: str, clock: datetime) -> str:
    """Jinja that answers a template's question for the date with one, in all its formats."""
    texts = (value for _, kind, value in jinja2.Environment().lex(template) if kind == "string")
    dates = {text[1:-1]: clock.strftime(text[1:-1]) for text in texts if "%" in text}
    unknown = "raise_exception('a date in a format that is computed')"
    said = f"{json.dumps(dates)}.get(format) or {unknown}"
    return f"{{% macro {CLOCK}(format) %}}{{{{ {said} }}}}{{% endmacro %}}\n"


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
