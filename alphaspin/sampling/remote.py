"""Answers from an OpenAI-compatible server: vLLM, SGLang, or `transformers serve`.

Prompts go to `/completions`, one request an answer. What a request says differs by engine:

- `vllm`, `sglang`: prompts and answers as token ids (`return_token_ids`). Adapters are loaded while
  the server runs, from the run's folders, which it must see under the same path, and under a name
  made of their hash. vLLM needs `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, SGLang
  `--enable-lora`.
- `transformers`: prompts and answers as text, because the server takes nothing else: a prompt must
  survive decoding and encoding, and an answer's tokens are those of its text, which may not be
  those that were sampled. It has no adapters: it serves the base.

Each request has a seed of its own, a function of (seed, iteration, purpose, example). How far a
server honours it is up to the server (`transformers serve` does with `workers: 1`), so a run that
is resumed repeats whole shards and may find other answers in the one it was killed in. No server's
log-probs are used: what needs them is scored here.
"""

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from alphaspin.data.chat import ChatFormat
from alphaspin.errors import InputError, ServerError
from alphaspin.foundation import rng
from alphaspin.foundation.openai_api import Client, key_of, parsed
from alphaspin.foundation.section import short
from alphaspin.model.backbone import Backbone
from alphaspin.model.stepper import components
from alphaspin.sampling.answer import Answer
from alphaspin.sampling.decode import Request, decode
from alphaspin.sampling.settings import SamplingConfig

Engine = Callable[..., list[Answer]]


def engine(config: SamplingConfig, chat: ChatFormat) -> Engine:
    """What answers requests under `sampling.engine`; called as `sampling.decode` is.

    Raises:
        InputError: an address that is none, or a key that is not set.
    """
    return decode if config.engine == "local" else ServerSampler(config, chat).decode


class ServerSampler:
    """Sampling from one server."""

    def __init__(
        self,
        config: SamplingConfig,
        chat: ChatFormat,
        *,
        attempts: int = 5,
        backoff: float = 1.0,
        timeout: float = 600.0,
    ):
        """Nothing is sent yet.

        Args:
            config: `engine`, `url`, `model`, `key_variable`, `workers`.
            chat: its tokenizer is the server's.
            attempts: tries per request.
            backoff: first pause between tries, in seconds.
            timeout: of one try, in seconds.
        """
        assert config.url is not None and config.model is not None
        self._engine, self._model, self._chat = config.engine, config.model, chat
        self._client = Client(
            config.url,
            setting="sampling.url",
            key=key_of(config.key_variable, "sampling.key_variable"),
            workers=config.workers,
            attempts=attempts,
            backoff=backoff,
            timeout=timeout,
        )

    def decode(
        self,
        backbone: Backbone,
        requests: Sequence[Request],
        *,
        stop_ids: frozenset[int],
        config: SamplingConfig,
        progress: Callable[[int, int], None] = lambda answers, tokens: None,
    ) -> list[Answer]:
        """One answer per request, as `sampling.decode`, without records.

        Raises:
            InputError: a mixture of policies, an adapter that the server cannot have, or a prompt
                that it cannot be told.
            ServerError: a request failed for good.
        """
        policies = [components(request.policy) for request in requests]
        for policy in dict.fromkeys(policies):
            if len(policy) > 1:
                raise InputError(
                    f"sampling.engine = {self._engine}: a server samples from one adapter at a "
                    f"time, not from the mixture {dict(policy)}: set it to local"
                )
        names = [policy[0][0] for policy in policies]
        models = {name: self._served(backbone, name) for name in dict.fromkeys(names)}
        answers: list[Answer | None] = [None] * len(requests)
        size = backbone.head.weight.shape[0]
        work = [(r, models[name]) for r, name in zip(requests, names, strict=True)]

        def ask(item: tuple[Request, str], stop: threading.Event) -> Answer | None:
            request, model = item
            body = self._body(request, model, stop_ids, config)

            def read(reply: bytes) -> Answer:
                choice: dict[str, Any] = parsed(
                    reply, "completion", lambda r: dict(r["choices"][0])
                )
                return self._answer(request, choice, stop_ids, size)

            address = f"{self._client.url}/completions"
            return self._client.post(address, body, read, wanted="answer", stop=stop)

        for number, answer in self._client.each(work, ask):
            answers[number] = answer
            progress(1, len(answer.tokens))
        return [answer for answer in answers if answer is not None]

    def _served(self, backbone: Backbone, adapter: str | None) -> str:
        """The name under which the server has a policy, which it may have to load first."""
        if adapter is None:
            return self._model
        if self._engine == "transformers":
            raise InputError(
                "sampling.engine = transformers: `transformers serve` has no adapters, only the "
                "base can play: use vllm, sglang or local"
            )
        name = f"alphaspin-{backbone.adapter_ids[adapter][:16]}"
        root = self._client.url
        if self._engine == "sglang":
            root = root.removesuffix("/v1")
        folder = str(backbone.adapter_folders[adapter].resolve())
        body = {"lora_name": name, "lora_path": folder}
        try:
            self._client.post(f"{root}/load_lora_adapter", body, bytes, wanted="adapter")
        except ServerError as error:
            # The name is the hash of the weights: one that is there already is the same one.
            if error.status != 400 or "already" not in str(error):
                raise
        return f"{self._model}:{name}" if self._engine == "sglang" else name

    def _body(
        self, request: Request, model: str, stop_ids: frozenset[int], config: SamplingConfig
    ) -> dict[str, Any]:
        """What is asked. Everything that a server might have another default for is said."""
        temperature, seed = request.temperature or config.temperature, 0
        if request.draw is None:
            temperature = 0.0
        else:
            seed = rng.key(*request.draw) % 2**31
        body = {"model": model, "max_tokens": request.max_tokens, "seed": seed}
        stops = sorted(stop_ids)
        if self._engine == "transformers":
            settings = {
                "do_sample": temperature > 0,
                "temperature": temperature or 1.0,
                "top_p": config.top_p,
                "top_k": config.top_k,
                "eos_token_id": stops,
                "pad_token_id": stops[0],
                "max_new_tokens": request.max_tokens,
            }
            return body | {
                "prompt": self._text(request.prompt.tolist()),
                "generation_config": json.dumps(settings),
            }
        body |= {
            "prompt": request.prompt.tolist(),
            "temperature": temperature,
            "top_p": config.top_p,
            "top_k": config.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": stops,
            "return_token_ids": True,
        }
        return body

    def _text(self, prompt: list[int]) -> str:
        """A text that the server's tokenizer turns into these tokens, with or without its BOS."""
        tokenizer = self._chat.tokenizer
        for start in (0, 1):
            text = tokenizer.decode(
                prompt[start:], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            if tokenizer(text)["input_ids"] == prompt:
                return text
        raise InputError(
            "sampling.engine = transformers: takes prompts as text, and no text gives the tokens "
            f"of {tokenizer.decode(prompt[-20:])!r}: use vllm, sglang or local"
        )

    def _answer(
        self, request: Request, choice: dict[str, Any], stop_ids: frozenset[int], size: int
    ) -> Answer:
        """The tokens of a completion, with the end token that some servers cut off.

        Raises:
            ValueError: no tokens, too many, any behind an end token, or any that is none of the
                vocabulary, which has `size`.
        """
        stopped = choice.get("finish_reason") == "stop"
        if self._engine == "transformers":
            prompt = self._text(request.prompt.tolist())
            text = choice.get("text")
            if not isinstance(text, str):
                raise ValueError("no text in the reply")
            ids = self._chat.tokenise([(prompt, text)])[0][1]
            ids = ids[: request.max_tokens - stopped]
        else:
            ids = choice.get("token_ids")
            if not isinstance(ids, list):
                raise ValueError("no token_ids in the reply: the server does not know them")
            if not all(type(i) is int and 0 <= i < size for i in ids):
                raise ValueError(f"token_ids that the model has not: {short(ids)}")
        if stopped and not stop_ids.intersection(ids[-1:]):
            told = choice.get("stop_reason", choice.get("matched_stop"))
            end = told if isinstance(told, int) and told in stop_ids else self._chat.end_token_id
            ids = [*ids, end]
        if not ids or len(ids) > request.max_tokens or stop_ids.intersection(ids[:-1]):
            raise ValueError(f"not 1 to {request.max_tokens} tokens with one end: {ids[:20]}")
        return Answer(np.array(ids, np.int32), ids[-1] not in stop_ids)
