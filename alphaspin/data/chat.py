"""Conversations to tokens: a tokenizer with its chat template, in training and in sampling."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import jinja2

from alphaspin.data.rows import Messages, turns_of
from alphaspin.errors import InputError

log = logging.getLogger(__name__)

PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '### ' ~ m['role'] | capitalize ~ ':\n' ~ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' }}{{ '\n\n' }}{% endfor %}"
    "{{ '### Assistant:\n' if add_generation_prompt }}"
)
PROBE = "quokka"  # an answer that no template contains and no normaliser changes


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
        texts = chat.render(turns_of("Hello", "user") + turns_of(PROBE, "assistant"))
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
