"""Sampling from servers: one that fails in the ways servers do, and a real `transformers serve`."""

import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import arithmetic, http_servers, make_tokenizer, save_model, write_rows
from pydantic import ValidationError

from alphaspin.commands.job import run
from alphaspin.config import Config
from alphaspin.data.chat import ChatFormat
from alphaspin.errors import InputError, ServerError
from alphaspin.foundation.artefacts import file_hash
from alphaspin.foundation.paths import packaged
from alphaspin.model.backbone import Backbone
from alphaspin.model.load import load_base
from alphaspin.model.settings import LoraConfig
from alphaspin.model.stepper import mixture
from alphaspin.model.tree import Tokens
from alphaspin.sampling.answer import Draw
from alphaspin.sampling.decode import Request, decode
from alphaspin.sampling.remote import ServerSampler
from alphaspin.sampling.settings import SamplingConfig

CPU = torch.device("cpu")
END = 1  # of the tests' tokenizer
Reply = dict[str, Any] | int | bytes | tuple[int, str]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Start a server; `reply(path, body)` gives a choice, a status, (status, text), raw bytes."""
    monkeypatch.setenv("no_proxy", "*")

    def start(reply: Callable[[str, dict[str, Any]], Reply]) -> tuple[str, list[dict[str, Any]]]:
        def respond(path: str, body: Any, number: int) -> tuple[int, bytes, dict[str, str]]:
            answer = reply(path, body)
            status, told = answer if isinstance(answer, tuple) else (answer, "trouble")
            if isinstance(status, int):
                return status, told.encode(), {}
            if isinstance(status, dict):
                status = json.dumps({"choices": [status]}).encode()
            return 200, status, {}

        return new(respond, serial=True)

    with http_servers() as new:
        yield start


def sampled(body: dict[str, Any]) -> dict[str, Any]:
    """What a server might sample: a function of all that the request says."""
    told = {key: body[key] for key in ("model", "prompt", "seed", "temperature", "max_tokens")}
    random = np.random.default_rng(list(json.dumps(told).encode()))
    ids = random.integers(5, 300, random.integers(1, body["max_tokens"] + 1)).tolist()
    if len(ids) == body["max_tokens"]:
        return {"token_ids": ids, "finish_reason": "length"}
    return {"token_ids": [*ids, END], "finish_reason": "stop"}


def engine_like(path: str, body: dict[str, Any]) -> Reply:
    if path.endswith("/load_lora_adapter"):
        assert (Path(body["lora_path"]) / "adapter_config.json").is_file()
        return b"Success: LoRA adapter added."
    return sampled(body)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("remote") / "model")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    backbone, _ = load_base(str(folder), dtype="fp32", device=CPU)
    backbone.add_adapter("fresh", LoraConfig(r=2), seed=0, iteration=0)
    adapter = folder.parent / "adapter"
    adapter.mkdir()
    backbone.save_adapter("fresh", adapter)
    backbone.load_adapter("iterate-0", adapter)
    return backbone


CHAT = ChatFormat.create(make_tokenizer())


def sampler(url: str, engine: str = "vllm", **options: Any) -> ServerSampler:
    config = SamplingConfig.model_validate(
        {"engine": engine, "url": url, "model": "base", "workers": 4} | options
    )
    return ServerSampler(config, CHAT, attempts=3, backoff=0.001)


def make_requests(count: int, adapter: str | None) -> list[Request]:
    return [
        Request(
            np.array([5, 6 + i], np.int32),
            {adapter: 1.0},
            4 + i % 3,
            None if i == 3 else Draw(0, 1, "sample", i),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_token_engines(
    serve: Callable[..., Any], backbone: Backbone, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    url, requests = serve(engine_like)
    server = sampler(url, engine, key_variable="SECRET", temperature=0.7, top_p=0.9, top_k=7)
    config = SamplingConfig(temperature=0.7, top_p=0.9, top_k=7)
    asked = make_requests(12, "iterate-0") + make_requests(2, None)
    done: list[int] = []
    answers = server.decode(
        backbone,
        asked,
        stop_ids=frozenset({END, 299}),
        config=config,
        progress=lambda answers, tokens: done.append(tokens),
    )
    name = f"alphaspin-{backbone.adapter_ids['iterate-0'][:16]}"
    loads = [r for r in requests if "lora_name" in r]
    assert [r["lora_name"] for r in loads] == [name]
    assert loads[0]["path"] == ("/v1" if engine == "vllm" else "") + "/load_lora_adapter"
    model = name if engine == "vllm" else f"base:{name}"
    bodies = {(*r["prompt"], r["model"]): r for r in requests if "prompt" in r}
    assert len(bodies) == len(asked) == len(requests) - 1
    for request, answer in zip(asked, answers, strict=True):
        plain = request.policy == {None: 1.0}
        body = bodies[(*request.prompt.tolist(), "base" if plain else model)]
        assert body["path"] == "/v1/completions"
        assert body["headers"]["Authorization"] == "Bearer s3cret"
        assert body["max_tokens"] == request.max_tokens
        assert (body["top_p"], body["top_k"], body["stop_token_ids"]) == (0.9, 7, [END, 299])
        assert body["temperature"] == (0.7 if request.draw else 0)
        expected = sampled(body)
        assert answer.tokens.tolist() == expected["token_ids"]
        assert answer.truncated == (expected["finish_reason"] == "length")
        assert answer.tokens.dtype == np.int32 and answer.logps is None
    assert {answer.truncated for answer in answers} == {True, False}
    assert sorted(done) == sorted(len(answer.tokens) for answer in answers)
    drawn = [r["seed"] for r in requests if "prompt" in r and r["temperature"]]
    assert len(set(drawn)) == 11, "a seed for each (seed, iteration, purpose, example)"
    again = server.decode(backbone, asked, stop_ids=frozenset({END, 299}), config=config)
    assert [a.tokens.tolist() for a in again] == [a.tokens.tolist() for a in answers]


def one(url: str, backbone: Backbone, adapter: str | None = None, engine: str = "vllm") -> Tokens:
    request = Request(np.array([5, 6], np.int32), {adapter: 1.0}, 4, Draw(0, 0, "sample", 0))
    server = sampler(url, engine, workers=1)
    stops = frozenset({END, 299})
    return server.decode(backbone, [request], stop_ids=stops, config=SamplingConfig())[0].tokens


def test_what_may_pass_is_asked_again(serve: Callable[..., Any], backbone: Backbone) -> None:
    good = {"token_ids": [7, END], "finish_reason": "stop"}
    for bad in (503, 429, b"<html>", {"text": "seven"}, {**good, "token_ids": [7] * 5}):
        replies: list[Reply] = [bad, 500, good]
        url, requests = serve(lambda path, body, replies=replies: replies.pop(0))
        assert one(url, backbone).tolist() == [7, END]
        assert requests[0]["seed"] == requests[1]["seed"] == requests[2]["seed"]


@pytest.mark.parametrize(
    ("reply", "attempts", "message"),
    [
        ((404, "no such model: base"), 1, "/v1/completions: HTTP 404: no such model: base"),
        (500, 3, "/v1/completions: no answer in 3 attempts; last: HTTP 500"),
        ({"text": "seven"}, 3, "no token_ids in the reply"),
        (b'{"error": "busy"}', 3, "not a completion: .*busy"),
        (b'{"choices": ["x"]}', 3, "not a completion"),
        ({"token_ids": [300], "finish_reason": "stop"}, 3, r"the model has not: \[300\]"),
        ({"token_ids": [-1], "finish_reason": "stop"}, 3, "the model has not"),
        ({"token_ids": [2**70], "finish_reason": "stop"}, 3, "the model has not"),
        ({"token_ids": [7.5], "finish_reason": "stop"}, 3, "the model has not"),
        ({"token_ids": [True], "finish_reason": "stop"}, 3, "the model has not"),
        ({"token_ids": [math.nan], "finish_reason": "stop"}, 3, "not a completion"),
        (
            {"token_ids": [7, 8], "finish_reason": "length"},
            3,
            "cut at 2 of 4 tokens: no more context",
        ),
        ({"token_ids": [], "finish_reason": "length"}, 3, r"not 1 to 4 tokens with one end: \[\]"),
        (
            {"token_ids": [7, END, 8], "finish_reason": "stop"},
            3,
            r"not 1 to 4 tokens with one end: \[7, 1, 8",
        ),
    ],
)
def test_errors_say_what_came_back(
    serve: Callable[..., Any], backbone: Backbone, reply: Reply, attempts: int, message: str
) -> None:
    url, requests = serve(lambda path, body: reply)
    with pytest.raises(ServerError, match=message):
        one(url, backbone)
    assert len(requests) == attempts


def test_nobody_at_the_address(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(ServerError, match=r"127.0.0.1:9.*3 attempts.*refused"):
        one("http://127.0.0.1:9/v1", backbone)
    with pytest.raises(ValidationError, match="begins with http://"):
        sampler("localhost")
    with pytest.raises(InputError, match=r"sampling.key_variable = NOT_SET: is not set"):
        sampler("http://localhost/v1", key_variable="NOT_SET")


@pytest.mark.parametrize(
    ("reply", "tokens"),
    [
        ({"token_ids": [7], "finish_reason": "stop", "stop_reason": 299}, [7, 299]),
        ({"token_ids": [7], "finish_reason": "stop", "matched_stop": 299}, [7, 299]),
        ({"token_ids": [7], "finish_reason": "stop", "stop_reason": None}, [7, END]),
        ({"token_ids": [7], "finish_reason": "stop", "stop_reason": [299]}, [7, END]),
        ({"token_ids": [7, 299], "finish_reason": "stop", "stop_reason": 299}, [7, 299]),
        ({"token_ids": [7, 8, 9, 299], "finish_reason": "length"}, [7, 8, 9, 299]),
    ],
)
def test_an_end_token_that_was_cut_off_is_put_back(
    serve: Callable[..., Any], backbone: Backbone, reply: Reply, tokens: list[int]
) -> None:
    url, _ = serve(lambda path, body: reply)
    assert one(url, backbone).tolist() == tokens


def test_adapters_are_loaded_or_refused(serve: Callable[..., Any], backbone: Backbone) -> None:
    replies: dict[str, Reply] = {}
    url, _ = serve(lambda path, body: replies.get(path) or engine_like(path, body))
    load = "/v1/load_lora_adapter"
    replies[load] = (400, "The lora adapter 'x' has already been loaded.")
    one(url, backbone, "iterate-0")
    for trouble in ((400, "rank too high"), (404, "already gone")):
        replies[load] = trouble
        with pytest.raises(ServerError, match=f"load_lora_adapter: HTTP {trouble[0]}"):
            one(url, backbone, "iterate-0")
    with pytest.raises(InputError, match="transformers: `transformers serve` has no adapters"):
        one(url, backbone, "iterate-0", "transformers")
    request = Request(np.array([5], np.int32), mixture("iterate-0", 0.5), 4, None)
    with pytest.raises(InputError, match=r"not from the mixture.*iterate-0.*local"):
        sampler(url).decode(backbone, [request], stop_ids=frozenset({END}), config=SamplingConfig())


def test_prompts_that_no_text_gives_are_refused(
    serve: Callable[..., Any], backbone: Backbone
) -> None:
    url, requests = serve(engine_like)
    tokenizer = CHAT.tokenizer
    whole = tokenizer("the answer is yes")["input_ids"]
    apart = [i for letter in "the answer" for i in tokenizer(letter)["input_ids"]]
    assert apart != tokenizer("the answer")["input_ids"]
    server = sampler(url, "transformers")
    assert tokenizer(server._text(whole))["input_ids"] == whole
    with pytest.raises(InputError, match="no text gives the tokens of 'the answer'"):
        server.decode(
            backbone,
            [Request(np.array(apart, np.int32), {None: 1.0}, 4, None)],
            stop_ids=frozenset({END}),
            config=SamplingConfig(),
        )
    assert not requests


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": {"engine": "vllm", "url": "http://x/v1"}}, "needs sampling.model"),
        ({"sampling": {"url": "http://x/v1"}}, "no effect with sampling.engine = local"),
        (
            {"method": "nash_md", "sampling": {"engine": "vllm", "url": "http://x", "model": "m"}},
            "method = nash_md needs sampling.engine = local, not 'vllm'",
        ),
        (
            {
                "selfplay": {"opponent": "mixture-token"},
                "sampling": {"engine": "sglang", "url": "http://x", "model": "m"},
            },
            "selfplay.opponent = mixture-token needs sampling.engine = local, not 'sglang'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(settings)


def small_run(base: str, data: Path, output: Path, iterations: int = 2, **sampling: Any) -> Config:
    return Config.model_validate(
        {
            "model": base,
            "data": str(data),
            "output": str(output),
            "selfplay": {"iterations": iterations, "prompts": 8},
            "text": {"max_response_tokens": 6, "overlong": "cut"},
            "lora": {"r": 2},
            "train": {"batch_size": 4, "lr": 1e-2},
            "evaluate": {"prompts": 2},
            "sampling": {"shard_size": 3, **sampling},
        }
    )


def test_a_reply_without_text(serve: Callable[..., Any], backbone: Backbone) -> None:
    url, _ = serve(lambda path, body: {"finish_reason": "stop", "token_ids": [7]})
    with pytest.raises(ServerError, match="no text in the reply"):
        one(url, backbone, engine="transformers")


def test_a_key_that_is_missing_is_found_first(tmp_path: Path) -> None:
    server = {"engine": "vllm", "url": "http://h/v1", "model": "m", "key_variable": "NOT_SET"}
    with pytest.raises(InputError, match=r"sampling\.key_variable = NOT_SET: is not set"):
        run(small_run("tiny", tmp_path / "no.jsonl", tmp_path / "run", **server))
    assert not (tmp_path / "run").exists()


def test_a_run_whose_server_fails_goes_on(
    serve: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    """The second shard of the second iteration meets a 404; nothing before it is asked again."""
    data = write_rows(tmp_path / "data.jsonl", arithmetic(20))
    broken = [False]

    def reply(path: str, body: dict[str, Any]) -> Reply:
        completions = sum("prompt" in r for r in requests)
        return (404, "gone") if broken[0] and completions > 8 + 3 else engine_like(path, body)

    url, requests = serve(reply)
    options = {"engine": "vllm", "url": url, "model": "base", "workers": 1}
    straight = run(small_run(str(folder), data, tmp_path / "straight", **options))
    asked = [r for r in requests if "prompt" in r]
    models = [r["model"] for r in asked]
    assert len(asked) == 16 and models[:8] == ["base"] * 8
    weights = tmp_path / "straight" / "iterations" / "0" / "adapter" / "adapter_model.safetensors"
    assert models[8:] == [f"alphaspin-{file_hash(weights)[:16]}"] * 8
    requests.clear()
    broken[0] = True
    config = small_run(str(folder), data, tmp_path / "resumed", **options)
    with pytest.raises(ServerError, match="HTTP 404: gone"):
        run(config)
    broken[0] = False
    resumed = run(config)
    assert resumed["adapters"] == straight["adapters"]
    again = [(r["prompt"], r["seed"]) for r in requests if "prompt" in r]
    assert len(again) == 16 + 1 and len({str(pair) for pair in again}) == 16


# A real server


@pytest.fixture(scope="module")
def transformers_serve() -> Iterator[str]:
    """`transformers serve` on loopback; skipped where its extra is not installed."""
    for name in ("fastapi", "openai", "uvicorn"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device=cpu"]
    command += ["--dtype=float32", "--host=127.0.0.1", f"--port={port}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "no_proxy": "*"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        for _ in range(240):
            assert process.poll() is None, "the server ended"
            try:
                opener.open(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def test_transformers_serve(
    transformers_serve: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy answers are ours; samples repeat; and a whole iteration of self-play."""
    monkeypatch.setenv("no_proxy", "*")
    model = str(packaged("tiny/model"))
    backbone, tokenizer = load_base("tiny", dtype="fp32", device=CPU)
    chat = ChatFormat.create(tokenizer, extra_stop_ids=backbone.stop_ids)
    options = {"engine": "transformers", "url": transformers_serve, "model": model, "workers": 1}
    config = SamplingConfig.model_validate(options)
    server = ServerSampler(config, chat)
    rows = map(json.loads, packaged("tiny/heldout.jsonl").read_text().splitlines()[:5])
    messages = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    prompts = [np.array(chat.encode_prompt(m), np.int32) for m in messages]
    stops = chat.stop_token_ids

    def ask(cap: int, seed: int | None) -> list[list[int]]:
        draws = [None if seed is None else Draw(seed, 0, "test", i) for i in range(len(prompts))]
        asked = [Request(p, {None: 1.0}, cap, d) for p, d in zip(prompts, draws, strict=True)]
        answers = server.decode(backbone, asked, stop_ids=stops, config=config)
        if seed is None:
            ours = decode(backbone, asked, stop_ids=stops, config=SamplingConfig())
            for answer, own in zip(answers, ours, strict=True):
                assert answer.tokens.tolist() == own.tokens.tolist()
                assert answer.truncated == own.truncated
        return [answer.tokens.tolist() for answer in answers]

    greedy = ask(30, None)
    assert all(len(answer) > 2 and answer[-1] in stops for answer in greedy)
    assert all(len(answer) == 2 for answer in ask(2, None))
    first = ask(30, 0)
    assert ask(30, 0) == first != ask(30, 1) and first != greedy

    data = packaged("tiny/train.jsonl")
    played = small_run("tiny", data, tmp_path / "run", iterations=1, **options)
    assert run(played)["adapters"]
