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
from alphaspin.foundation import console, rng
from alphaspin.foundation.openai_api import Client, key_of, parsed
from alphaspin.foundation.section import short
from alphaspin.foundation.vllm import Vllm
from alphaspin.model.backbone import Backbone
from alphaspin.model.scoring import logps
from alphaspin.model.stepper import components
from alphaspin.model.tree import Tree
from alphaspin.sampling.answer import Answer
from alphaspin.sampling.decode import Request
from alphaspin.sampling.settings import SamplingConfig

PROBE = 8
"""Answers of a policy by whose log-probs it is told whether the server has the same one."""
FAR, NOISE = 0.1, 0.01
"""Nats a token between the server's log-probs and ours: another model's, and what rounding does."""


class ServerSampler:
    """Sampling from one server."""

    BASE = "base"
    """Name under which a vLLM of one's own has the base."""

    def __init__(
        self,
        config: SamplingConfig,
        chat: ChatFormat,
        own: Vllm | None = None,
        *,
        attempts: int = 5,
        backoff: float = 1.0,
        timeout: float = 600.0,
    ):
        """Nothing is sent yet.

        Args:
            config: `engine`, `url`, `model`, `key_variable`, `workers`.
            chat: its tokenizer is the server's.
            own: what is asked in the place of `url`, when it is there.
            attempts: tries per request.
            backoff: first pause between tries, in seconds.
            timeout: of one try, in seconds.
        """
        self._engine, self._chat, self._own = config.engine, chat, own
        self._workers, self._timeout = config.workers, timeout
        self._checked: set[str] = set()
        if own:
            self._engine, self._model = "vllm", self.BASE
            return
        assert config.url is not None and config.model is not None
        self._model = config.model
        self._client = Client(
            config.url,
            setting="sampling.url",
            key=key_of(config.key_variable, "sampling.key_variable"),
            workers=config.workers,
            attempts=attempts,
            backoff=backoff,
            timeout=timeout,
        )

    def check(self, longest: int) -> None:
        """Whether the server has the model and a context of `longest` tokens, should it tell.

        Raises:
            InputError: it has not.
            ServerError: it does not answer.
        """
        if self._engine == "transformers":  # tells of what is on the disk, not of what it serves
            return
        address = f"{self._client.url}/models"

        def read(reply: bytes) -> list[dict[str, Any]]:
            return parsed(reply, "list of models", lambda r: [dict(m) for m in r["data"]])

        try:
            models = self._client.send(address, None, read, wanted="list of models") or []
        except ServerError as error:
            if error.status in (404, 405, 501):
                return
            raise
        names = {str(model.get("id")): model for model in models}
        if self._model not in names:
            raise InputError(
                f"sampling.model = {self._model}: {address} has {', '.join(names) or 'none'}"
            )
        context = names[self._model].get("max_model_len")
        if isinstance(context, int) and context < longest:
            raise InputError(
                f"sampling.url: the server's context is {context} tokens, and the longest prompt "
                f"with a full answer has {longest}: start it with --max-model-len {longest}"
            )

    def forget(self) -> None:
        """The server may be another one: what was found of it does not hold."""
        self._checked.clear()

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
            ServerError: a request failed for good, or the server has another policy.
        """
        if self._own:
            self._client = self._own.client(workers=self._workers, timeout=self._timeout)
        policies = [components(request.policy) for request in requests]
        for policy in dict.fromkeys(policies):
            if len(policy) > 1:
                raise InputError(
                    f"sampling.engine = {self._engine}: a server samples from one adapter at a "
                    f"time, not from the mixture {dict(policy)}: set it to local"
                )
        names = [policy[0][0] for policy in policies]
        answers: list[Answer | None] = [None] * len(requests)
        size = backbone.head.weight.shape[0]
        told: dict[int, float | None] = {}
        probes = [
            number
            for name in dict.fromkeys(names)
            if self._engine == "vllm" and backbone.adapter_ids[name] not in self._checked
            for number in [n for n, other in enumerate(names) if other == name][:PROBE]
        ]

        def ask(number: int, stop: threading.Event) -> Answer | None:
            request, model = requests[number], models[names[number]]
            body = self._body(request, model, stop_ids, config)
            if number in probes:
                body["logprobs"] = 0

            def read(reply: bytes) -> Answer:
                choice: dict[str, Any] = parsed(
                    reply, "completion", lambda r: dict(r["choices"][0])
                )
                if number in probes:
                    told[number] = _logp(choice)
                return self._answer(request, choice, stop_ids, size)

            address = f"{self._client.url}/completions"
            return self._client.send(address, body, read, wanted="answer", stop=stop)

        def ask_all() -> None:
            # A policy at a time: on CPUs vLLM 0.32 takes the base's rows in an adapter's batch for
            # the adapter's.
            for name in models:
                left = [n for n, known in enumerate(answers) if known is None and names[n] == name]
                for place, answer in self._client.each(left, ask):
                    answers[left[place]] = answer
                    progress(1, len(answer.tokens))

        try:
            models = {name: self._served(backbone, name) for name in dict.fromkeys(names)}
            ask_all()
        except ServerError as error:
            if self._own is None or error.status is not None:
                raise
            console.note(f"{error}; asking again when vLLM is there")
            self._own.revive(error)
            self.forget()
            try:
                models = {name: self._served(backbone, name) for name in dict.fromkeys(names)}
                ask_all()
            except ServerError as again:
                raise self._own.failure(f"failed twice ({again})") from None
        found = [answer for answer in answers if answer is not None]
        for name in dict.fromkeys(names[number] for number in probes):
            mine = [number for number in probes if names[number] == name]
            self._compare(backbone, name, [(requests[n], found[n], told.get(n)) for n in mine])
        return found

    def _compare(
        self,
        backbone: Backbone,
        adapter: str | None,
        answers: Sequence[tuple[Request, Answer, float | None]],
    ) -> None:
        """Whether the server's log-probs of its answers are those of our policy.

        The mean of log q(y) - log π(y), a token, over y from the server's policy q is KL(q ‖ π).

        Raises:
            ServerError: they are not, or they are the base's.
        """
        self._checked.add(backbone.adapter_ids[adapter])
        kept = [(r, a, logp) for r, a, logp in answers if logp is not None]
        if not kept:
            console.note("the server tells no log-probs: its policy is not compared with ours")
            return
        trees = [Tree(request.prompt, (answer.tokens,)) for request, answer, _ in kept]
        total = sum(len(answer.tokens) for _, answer, _ in kept)

        def far(policy: str | None) -> float:
            ours = logps(backbone, policy, trees, PROBE)
            return (
                sum(abs(logp - own[0]) for (*_, logp), own in zip(kept, ours, strict=True)) / total
            )

        distance = far(adapter)
        who = "the base" if adapter is None else adapter
        said = f"log-probs of {len(kept)} answers of {who} differ from ours by {distance:.2g} nats"
        said += " a token"
        if distance > FAR:
            raise ServerError(f"{self._client.url}: {said}: behind it is another model than ours")
        if adapter is not None and distance > max(NOISE, 2 * far(None)):
            raise ServerError(
                f"{self._client.url}: {said}, and less from the base's: the adapter is not applied"
            )
        console.note(f"{self._engine}: {said}")

    def _served(self, backbone: Backbone, adapter: str | None) -> str:
        """The name under which the server has a policy, which it may have to load first."""
        hash = backbone.adapter_ids[adapter]
        if adapter is None and (adapter := backbone.route.start) is None:
            return self._model
        if self._engine == "transformers":
            raise InputError(
                "sampling.engine = transformers: `transformers serve` has no adapters, only the "
                "base can play: use vllm, sglang or local"
            )
        name = f"alphaspin-{hash[:16]}"
        root = self._client.url
        if self._engine == "sglang":
            root = root.removesuffix("/v1")
        folder = str(backbone.adapter_folders[adapter].resolve())
        body = {"lora_name": name, "lora_path": folder}
        try:
            self._client.send(f"{root}/load_lora_adapter", body, bytes, wanted="adapter")
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
            "ignore_eos": True,
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
            if ids and not stopped and len(ids) < request.max_tokens and ids[-1] not in stop_ids:
                raise ValueError(
                    f"cut at {len(ids)} of {request.max_tokens} tokens: no more context"
                )
        if stopped and not stop_ids.intersection(ids[-1:]):
            told = choice.get("stop_reason", choice.get("matched_stop"))
            end = told if isinstance(told, int) and told in stop_ids else self._chat.end_token_id
            ids = [*ids, end]
        if not ids or len(ids) > request.max_tokens or stop_ids.intersection(ids[:-1]):
            raise ValueError(f"not 1 to {request.max_tokens} tokens with one end: {ids[:20]}")
        return Answer(np.array(ids, np.int32), ids[-1] not in stop_ids)


def _logp(choice: dict[str, Any]) -> float | None:
    """The log-prob of a completion; None where it is not told token by token."""
    told = choice.get("logprobs")
    values = told.get("token_logprobs") if isinstance(told, dict) else None
    if not isinstance(values, list) or len(values) != len(choice.get("token_ids") or ()):
        return None
    return sum(values) if all(isinstance(value, float | int) for value in values) else None
