"""A real vLLM, on the CPU: what it answers, and what becomes of a run when it is in trouble.

    make test-engines

Its starts take most of the time: a minute each on two cores.
"""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import save_model, write_rows
from scipy.stats import chi2, chi2_contingency

from alphaspin.commands.job import run
from alphaspin.config import Config
from alphaspin.data.chat import ChatFormat
from alphaspin.errors import InputError, ServerError
from alphaspin.foundation.paths import packaged
from alphaspin.foundation.vllm import environment
from alphaspin.judges import JUDGES
from alphaspin.judges.base import Comparison, Prompt
from alphaspin.model.backbone import Backbone
from alphaspin.model.distributed import Team
from alphaspin.model.load import load_base
from alphaspin.model.settings import LoraConfig
from alphaspin.sampling.answer import Answer, Draw
from alphaspin.sampling.decode import Request, decode
from alphaspin.sampling.engine import Needs, OwnSampler
from alphaspin.sampling.remote import ServerSampler
from alphaspin.sampling.settings import SamplingConfig

PYTHON = os.environ["ALPHASPIN_VLLM_PYTHON"]
CPU = torch.device("cpu")
CONTEXT = 64


def make_adapter(backbone: Backbone, name: str, folder: Path, rank: int, seed: int) -> None:
    """An adapter on disk, under which answers are quite others than the base's."""
    backbone.add_adapter("fresh", LoraConfig(r=rank), seed=seed, iteration=0)
    state, random = backbone.adapter_state("fresh"), torch.Generator().manual_seed(seed)
    noise = {k: v + 0.05 * torch.randn(v.shape, generator=random) for k, v in state.items()}
    backbone.set_adapter_state("fresh", noise)
    (folder / name).mkdir()
    backbone.save_adapter("fresh", folder / name)
    backbone.remove_adapter("fresh")
    backbone.load_adapter(name, folder / name)


class World:
    """The embedded model here and in a vLLM that is started as a run starts it."""

    def __init__(self, folder: Path):
        self.backbone, tokenizer = load_base("tiny", dtype="fp32", device=CPU)
        self.chat = ChatFormat.create(tokenizer, extra_stop_ids=self.backbone.stop_ids)
        for name, rank, seed in (("one", 4, 1), ("two", 8, 2), ("high", 32, 3)):
            make_adapter(self.backbone, name, folder, rank, seed)
        rows = map(json.loads, packaged("tiny/heldout.jsonl").read_text().splitlines()[:64])
        messages = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        self.prompts = [np.array(self.chat.encode_prompt(m), np.int32) for m in messages]
        self.config = SamplingConfig(engine="vllm", vllm_python=PYTHON, workers=32)
        needs = Needs("tiny", 8, CONTEXT, folder, None)
        self.sampler = OwnSampler(self.config, self.chat, self.backbone, Team(CPU), needs)

    def ask(
        self,
        requests: list[Request],
        progress: Callable[[int, int], None] = lambda answers, tokens: None,
    ) -> list[Answer]:
        stops = self.chat.stop_token_ids
        return self.sampler.decode(
            self.backbone, requests, stop_ids=stops, config=self.config, progress=progress
        )

    def here(self, requests: list[Request]) -> list[Answer]:
        stops = self.chat.stop_token_ids
        return decode(self.backbone, requests, stop_ids=stops, config=SamplingConfig())

    def requests(
        self, policy: str | None, seed: int | None = None, cap: int = 16, count: int = 64
    ) -> list[Request]:
        return [
            Request(
                self.prompts[i % len(self.prompts)],
                {policy: 1.0},
                cap,
                None if seed is None else Draw(seed, 0, "test", i),
            )
            for i in range(count)
        ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("vllm"))
    with world.sampler.awake():
        yield world
    world.sampler.close()


def tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens.tolist() for answer in answers]


@pytest.mark.parametrize("policy", [None, "one", "two"])
def test_greedy_answers_are_ours(world: World, policy: str | None) -> None:
    asked = world.requests(policy)
    found, own = world.ask(asked), world.here(asked)
    assert tokens(found) == tokens(own)
    assert [a.truncated for a in found] == [a.truncated for a in own]
    if policy:
        assert tokens(found) != tokens(world.here(world.requests(None)))


def test_policies_in_one_call(world: World) -> None:
    asked = [r for policy in (None, "one", "two") for r in world.requests(policy, count=8)]
    assert tokens(world.ask(asked)) == tokens(world.here(asked))


def test_an_adapter_that_is_another_is_told(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """One whose folder was exchanged under it, and one that is not applied at all."""
    backbone, folders = world.backbone, world.backbone.adapter_folders
    before, ident = folders["one"], backbone.adapter_ids["one"]
    folders["one"], backbone.adapter_ids["one"] = folders["two"], "f" * 64
    try:
        with pytest.raises(ServerError, match=r"log-probs of 8 answers of one differ from ours"):
            world.ask(world.requests("one", seed=0))
    finally:
        folders["one"], backbone.adapter_ids["one"] = before, ident
    world.sampler._server.forget()
    world.ask(world.requests("one", seed=0))
    said = " ".join(capsys.readouterr().out.split())
    assert "vllm: log-probs of 8 answers of one differ from ours by" in said


def test_seeds(world: World, record_property: Callable[[str, object], None]) -> None:
    """How far a seed repeats an answer: alone, and in other company."""
    asked = world.requests(None, seed=0, count=256)
    first = tokens(world.ask(asked))
    again = np.mean([a == b for a, b in zip(first, tokens(world.ask(asked)), strict=True)])
    turned = tokens(world.ask(asked[::-1]))[::-1]
    apart = np.mean([a == b for a, b in zip(first, turned, strict=True)])
    other = tokens(world.ask(world.requests(None, seed=1, count=256)))
    fresh = np.mean([a == b for a, b in zip(first, other, strict=True)])
    print(f"\nequal answers: same seeds {again:.3f}, other order {apart:.3f}, other {fresh:.3f}")
    assert again > 0.95 and apart > 0.95 and fresh < 0.9


@pytest.mark.parametrize("policy", [None, "one"])
def test_distribution(world: World, policy: str | None) -> None:
    """First tokens against exact probabilities, whole answers against the local sampler's; χ²."""
    count, prompt = 3000, world.prompts[0]
    asked = [Request(prompt, {policy: 1.0}, 3, Draw(7, 0, "chi", i)) for i in range(count)]
    found, own = tokens(world.ask(asked)), tokens(world.here(asked))
    with torch.no_grad():
        ids = torch.from_numpy(prompt).long()[None]
        probs = first_token(world.backbone, policy, ids)
    drawn = np.bincount([answer[0] for answer in found], minlength=len(probs))
    common = probs * count >= 5
    expected = np.append(probs[common], 1 - probs[common].sum()) * count
    seen = np.append(drawn[common], drawn[~common].sum())
    kept = expected > 0.5
    statistic = ((seen - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi2.sf(statistic, kept.sum() - 1) > 1e-4
    kinds: dict[str, list[int]] = {}
    for side, answers in enumerate((found, own)):
        for answer in answers:
            kinds.setdefault(str(answer), [0, 0])[side] += 1
    table = [pair for pair in kinds.values() if sum(pair) >= 10]
    rest = [pair for pair in kinds.values() if sum(pair) < 10]
    both = np.array([*table, np.sum(rest, axis=0)] if rest else table)
    assert chi2_contingency(both).pvalue > 1e-4


def first_token(backbone: Backbone, policy: str | None, ids: torch.Tensor) -> np.ndarray:
    """Probabilities of the next token under a policy, [V] float64, from log-probs of each one."""
    from alphaspin.model.scoring import logps
    from alphaspin.model.tree import Tree

    prompt = ids[0].numpy().astype(np.int32)
    size = backbone.head.weight.shape[0]
    trees = [Tree(prompt, (np.array([i], np.int32),)) for i in range(size)]
    return np.exp(np.array(logps(backbone, policy, trees, 256), np.float64)[:, 0])


def test_what_the_server_cannot_do_is_said(world: World) -> None:
    with pytest.raises(ServerError, match="LoRA rank 32 is greater"):
        world.ask(world.requests("high"))
    for length, message in ((CONTEXT, "HTTP 400"), (CONTEXT - 2, "no more context")):
        long = [Request(np.resize(world.prompts[0], length), {None: 1.0}, 16, None)]
        with pytest.raises(ServerError, match=message):
            world.ask(long)
    assert world.ask(world.requests(None, count=2))


def descendants(pid: int) -> dict[int, str]:
    """Names of the processes below one."""
    found: dict[int, str] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            title, _, rest = Path(f"/proc/{name}/stat").read_text().rpartition(")")
        except OSError:
            continue
        if int(rest.split()[1]) == pid:
            found |= {int(name): title.partition("(")[2]} | descendants(int(name))
    return found


@pytest.mark.parametrize("victim", ["server", "worker"])
def test_a_server_that_dies_is_begun_anew(world: World, victim: str) -> None:
    """Killed in the middle of its answers, as a whole or a process of it."""
    world.sampler._vllm.allow(1)
    keeper = world.sampler._vllm.place[1]  # type: ignore[index]
    below, done = descendants(keeper), [0]
    pid = (
        next(iter(below))
        if victim == "server"
        else max(p for p, n in below.items() if "Worker" in n)
    )

    def kill(answers: int, tokens: int) -> None:
        done[0] += answers
        if done[0] == 20:
            os.kill(pid, signal.SIGKILL)

    asked = world.requests("two", count=256, cap=24)
    assert tokens(world.ask(asked, kill)) == tokens(world.here(asked))
    assert done[0] == 256 and pid not in descendants(keeper)


# Servers of somebody else's


class Foreign:
    """A vLLM at a port, of another model, with a short context, that loads no adapters."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.log = (
            save_model(folder / "other", vocab_size=512, head_dim=32),
            folder / "foreign.log",
        )
        self.start()

    def start(self) -> None:
        arguments = f"--port={self.port} --host=127.0.0.1 --served-model-name=base --dtype=float32"
        arguments += " --max-model-len=128 --enforce-eager --kv-cache-memory-bytes=100000000"
        kept = environment(PYTHON) | {"TORCHDYNAMO_DISABLE": "1"}
        kept.pop("VLLM_ALLOW_RUNTIME_LORA_UPDATING")
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", f"--model={self.model}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments.split()], env=kept, stdout=log, stderr=log
            )

    def wait(self) -> None:
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            with socket.socket() as probe:
                probe.settimeout(5)
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    probe.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                    try:
                        if b"200" in probe.recv(100):
                            return
                    except OSError:
                        pass
            time.sleep(0.5)
        raise AssertionError("no server")

    def kill(self) -> None:
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreign]:
    server = Foreign(tmp_path_factory.mktemp("foreign"))
    server.wait()
    yield server
    server.kill()


def small(folder: Path, iterations: int = 2, **changes: Any) -> Config:
    """A run of a minute."""
    rows = packaged("tiny/train.jsonl").read_text().splitlines()[:200]
    values: dict[str, Any] = {
        "data": str(write_rows(folder / "data.jsonl", list(map(json.loads, rows)))),
        "output": str(folder / "run"),
        "selfplay": {"iterations": iterations, "prompts": 64},
        "text": {"max_response_tokens": 16},
        "train": {"batch_size": 32},
        "evaluate": {"prompts": 8},
        "sampling": {"engine": "vllm", "vllm_python": PYTHON, "shard_size": 16},
    }
    return Config.model_validate(values | changes)


def test_a_server_of_another_model(
    foreign: Foreign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    address = {"engine": "vllm", "url": f"http://127.0.0.1:{foreign.port}/v1"}
    with pytest.raises(InputError, match=r"sampling\.model = mine: .*/v1/models has base"):
        run(small(tmp_path, sampling=address | {"model": "mine"}))
    long = {"max_response_tokens": 120}
    with pytest.raises(InputError, match=r"context is 128 tokens.*start it with --max-model-len"):
        run(small(tmp_path, sampling=address | {"model": "base"}, text=long))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ServerError, match=r"of the base differ from ours by .*another model"):
        run(small(tmp_path, sampling=address | {"model": "base"}))


def test_a_server_that_refuses_adapters_or_is_restarted(
    foreign: Foreign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers so far stand: killed while it samples, and begun anew, it goes on."""
    monkeypatch.setenv("no_proxy", "*")
    address = {"engine": "vllm", "url": f"http://127.0.0.1:{foreign.port}/v1", "model": "base"}
    model, before = {"model": str(foreign.model)}, ServerSampler.decode

    def killing(self: ServerSampler, *arguments: Any, **options: Any) -> list[Answer]:
        if (tmp_path / "run/iterations/0/opponents").exists() and foreign.process.poll() is None:
            foreign.kill()
        return before(self, *arguments, **options)

    short = {"text": {"max_response_tokens": 8, "overlong": "cut"}, "lora": {"r": 4}}
    config = small(tmp_path, sampling=address | {"shard_size": 16}, **model, **short)
    monkeypatch.setattr(ServerSampler, "decode", killing)
    with pytest.raises(ServerError, match=r"attempts; last: .*(refused|[Rr]emote end|reset)"):
        run(config)
    stood = len(
        list((tmp_path / "run/iterations/0/opponents").glob("*/*/answers.safetensors"))
    ) or len(list((tmp_path / "run/iterations/0/opponents").rglob("answers.safetensors")))
    assert stood == 1
    monkeypatch.setattr(ServerSampler, "decode", before)
    foreign.start()
    foreign.wait()
    with pytest.raises(ServerError, match="load_lora_adapter: HTTP 404"):
        run(config)
    assert (tmp_path / "run/iterations/0/adapter").is_dir()


# Whole runs


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_run_of_another_family(tmp_path: Path, family: str) -> None:
    sizes = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 256}
    model = save_model(tmp_path / "model", family, use_sliding_window=False, **sizes)
    short = {"max_response_tokens": 12, "overlong": "cut"}
    summary = run(small(tmp_path, iterations=3, model=str(model), text=short))
    assert len(summary["adapters"]) == 3


def test_a_killed_run_leaves_nobody_and_goes_on(tmp_path: Path) -> None:
    config = small(tmp_path)
    script = (
        "import sys; from alphaspin.commands.job import run; from alphaspin.config import Config;"
        "run(Config.model_validate_json(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, config.model_dump_json()])
    answers, deadline = tmp_path / "run/iterations/0/opponents", time.monotonic() + 600
    while not list(answers.rglob("answers.safetensors")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    below = descendants(process.pid)
    assert any("VLLM" in name for name in below.values())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]
    assert run(config)["adapters"]


def test_a_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model knows nothing of verdicts; what it says comes back, and is none."""
    model = tmp_path / "model"  # with room for a judge's reasons
    shutil.copytree(packaged("tiny/model"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    config = {"kind": "vllm", "model": str(model), "vllm_python": PYTHON}
    judge, grader = JUDGES["vllm"].model_validate(config).counting(None)
    pairs = [Comparison(Prompt(({"role": "user", "content": "add 4 and 5"},), None), "9", "8")]
    for asked in (judge, grader, judge):
        assert asked is not None
        ((verdict,),) = (group.values() for group in asked.compare(pairs))
        assert math.isnan(verdict)
    assert capsys.readouterr().out.count("starts, which takes minutes") == 1
