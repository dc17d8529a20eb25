"""Decoding against transformers' `generate`, PEFT, and full forward passes without a cache.

Where a comparison must not hinge on rounding, the model is in float64 (norms and eager attention
stay in fp32).
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from test_backbone import LORA, PREVIOUS, load, make_folder, mixed_batch, perturb, plain_model
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alphaspin.model import backbone as module
from alphaspin.model import caches, graphs, routing, slots
from alphaspin.model.backbone import Backbone
from alphaspin.model.caches import CACHES
from alphaspin.model.routing import POLICY
from alphaspin.model.scoring import logps, sequence_logps
from alphaspin.model.stepper import Policy, Stepper, mixture
from alphaspin.model.tree import Tokens, Tree
from alphaspin.sampling.answer import Answer, Draw
from alphaspin.sampling.decode import Request, decode, filtered, invert, uniforms
from alphaspin.sampling.settings import SamplingConfig


@pytest.fixture(scope="module", params=helpers.FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp(request.param), request.param)


SWEEP = bool(os.environ.get("ALPHASPIN_SWEEP"))
"""Each family with each cache; else each with the one that it gets, and two kinds with all but
graphs, whose like on CPUs takes a second to record."""


def pick(family: Path, kind: str) -> None:
    few = kind != "graphs" and family.name.startswith(("llama", "gemma3_text"))
    if not (SWEEP or kind == "slots" or few):
        pytest.skip("needs ALPHASPIN_SWEEP=1")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("llama"), "llama")


def exact(folder: Path) -> tuple[Backbone, dict[str | None, Any]]:
    """The backbone in float64 with both adapters, and each policy by PEFT and transformers."""
    backbone = load(folder, POLICY, PREVIOUS).double()
    return backbone, {n: plain_model(folder, n).double() for n in (POLICY, PREVIOUS, None)}


def make_prompts(count: int, seed: int, longest: int = 20) -> list[Tokens]:
    random = np.random.default_rng(seed)
    return [helpers.tokens(random, 1, longest) for _ in range(count)]


def plain_greedy(model: Any, prompt: Tokens, count: int, stops: list[int]) -> list[int]:
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=stops,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()


@torch.no_grad()
def plain_logp(models: dict[str | None, Any], policy: Policy, ids: Tokens) -> tuple[Tensor, Tensor]:
    """Log-probs of the token-level mixture after each token [S, V], and log Z [S]."""
    input_ids = torch.from_numpy(ids.astype(np.int64))[None]
    mixed = sum(
        weight * models[name](input_ids=input_ids, use_cache=False).logits[0].log_softmax(-1)
        for name, weight in policy.items()
    )
    assert isinstance(mixed, Tensor)
    return mixed.log_softmax(-1), mixed.logsumexp(-1)


@pytest.mark.parametrize("adapter", [POLICY, None])
def test_greedy_answers_equal_generate(family: Path, adapter: str | None) -> None:
    """Prompts shorter and longer than the window, in batches whose rows end at different times."""
    prompts = make_prompts(6, 11)
    backbone = load(family, POLICY, PREVIOUS)
    plain = plain_model(family, adapter)
    # Stop at tokens that do come up, so that rows leave the batch early.
    free = [plain_greedy(plain, prompt, 16, [299]) for prompt in prompts]
    stops = sorted({free[0][2], free[1][7], free[2][4]})
    expected = [plain_greedy(plain, prompt, 16, stops) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 1
    requests = [Request(prompt, {adapter: 1.0}, 16, None) for prompt in prompts]
    for batch_size in (1, 4, 6):
        config = SamplingConfig(batch_size=batch_size)
        answers = decode(backbone, requests, stop_ids=frozenset(stops), config=config)
        assert [answer.tokens.tolist() for answer in answers] == expected
        for answer in answers:
            assert answer.tokens.dtype == np.int32
            assert answer.truncated == (int(answer.tokens[-1]) not in stops)


STOPS = frozenset(range(25))
POLICIES: list[Policy] = [
    {POLICY: 1.0},
    {None: 1.0},
    {PREVIOUS: 0.75, None: 0.25},
    {None: 0.5, POLICY: 0.2, PREVIOUS: 0.3},
    {POLICY: 0.0, PREVIOUS: 1.0},
]


def make_requests(prompts: Sequence[Tokens], policies: Sequence[Policy]) -> list[Request]:
    """Samples with caps of their own, some of them greedy or at temperatures of their own."""
    return [
        Request(
            prompt,
            policies[i % len(policies)],
            3 + 7 * i % 13,
            None if i % 6 == 5 else Draw(3, 0, "sample", i),
            1.3 if i % 7 == 6 else None,
        )
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that soon has to grow, and prompts that do not fit into one pass."""
    monkeypatch.setattr(slots, "BLOCK", 4)
    for where in (slots, caches):
        monkeypatch.setattr(where, "PREFILL_TOKENS", 30)


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In the place of CUDA graphs their like on CPUs: the operators of one pass, on its tensors.

    Returns how many operators each has.
    """
    found: list[int] = []

    def record(work: Callable[[], Tensor], pool: None) -> tuple[Callable[[], Tensor], None]:
        program = make_fx(work)()
        found.append(len(program.graph.nodes))
        return program, pool

    monkeypatch.setattr(graphs, "record", record)
    return found


@pytest.mark.usefixtures("narrow", "frozen")
@pytest.mark.parametrize("kind", CACHES)
def test_answers_do_not_depend_on_the_batch(family: Path, kind: Any) -> None:
    """Neighbours, their policies, batch size, and the order in which rows end and begin."""
    pick(family, kind)
    backbone = load(family, POLICY, PREVIOUS).double()
    backbone.cache = kind
    requests = make_requests(make_prompts(24, 12), POLICIES)

    def run(requests: Sequence[Request], batch_size: int) -> list[Answer]:
        config = SamplingConfig(batch_size=batch_size)
        return decode(backbone, requests, stop_ids=STOPS, config=config, record=True)

    alone = run(requests, 1)
    assert len({len(answer.tokens) for answer in alone}) > 5
    assert {answer.truncated for answer in alone} == {True, False}
    for request, answer in zip(requests, alone, strict=True):
        body, last = answer.tokens[:-1], int(answer.tokens[-1])
        assert not STOPS.intersection(body.tolist()), "an answer ends at its first stop token"
        assert answer.truncated == (last not in STOPS)
        assert len(answer.tokens) <= request.max_tokens
        assert not answer.truncated or len(answer.tokens) == request.max_tokens
    backwards = run(requests[::-1], 7)[::-1]
    for one, *others in zip(alone, run(requests, 5), run(requests, 24), backwards, strict=True):
        for other in others:
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.truncated == other.truncated
            np.testing.assert_allclose(one.logps, other.logps, rtol=1e-6)
            np.testing.assert_allclose(one.log_normalisers, other.log_normalisers, atol=1e-6)


def stale(work: Callable[[], Tensor], pool: None) -> tuple[Callable[[], Tensor], None]:
    """Plays the hidden states that it has seen."""
    output = work()
    return lambda: output, pool


def refused(work: Callable[[], Tensor], pool: None) -> tuple[Callable[[], Tensor], None]:
    raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_leaves_its_stream_and_shares_its_pool(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch.cuda is called, which is not there: by its own signatures."""
    begin, events = inspect.signature(torch.cuda.CUDAGraph.capture_begin), list[Any]()

    class Graph:
        def capture_begin(self, **given: Any) -> None:
            events.append(begin.bind(self, **given).arguments["pool"])

        def capture_end(self) -> None:
            events.append("end")
            if fails:
                raise RuntimeError("capture invalidated")

        def pool(self) -> str:
            return "pool"

        def replay(self) -> None:
            events.append("replay")

    @contextmanager
    def stream(which: Any) -> Iterator[None]:
        events.append("enter")
        try:
            yield
        finally:
            events.append("left")

    def work() -> Tensor:
        if fails:
            raise RuntimeError("the host waits")
        return torch.ones(1)

    for name, fake in (("CUDAGraph", Graph), ("Stream", object), ("stream", stream)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    if fails:
        with pytest.raises(RuntimeError, match="the host waits"):
            graphs.record(work, None)
        assert events == ["enter", None, "end", "left"]
        return
    replay, pool = graphs.record(work, None)
    assert replay() == 1 and graphs.record(work, pool)[1] == pool
    assert events == ["enter", None, "end", "left", "replay", "enter", "pool", "end", "left"]


def test_graphs_are_few_and_are_replayed(llama: Path, frozen: list[int]) -> None:
    backbone, calls = load(llama, POLICY, PREVIOUS).double(), list[int]()
    requests = [
        Request(prompt, mixture(POLICY, 0.5), 40, Draw(0, 0, "sample", i))
        for i, prompt in enumerate(make_prompts(16, 4))
    ]
    config = SamplingConfig(batch_size=16)
    expected = decode(backbone, requests, stop_ids=frozenset(), config=config)
    backbone.cache = "graphs"
    step = backbone.decoder.register_forward_hook(lambda *_: calls.append(1))
    answers = decode(backbone, requests, stop_ids=frozenset(), config=config)
    step.remove()
    assert [a.tokens.tolist() for a in answers] == [a.tokens.tolist() for a in expected]
    # 39 steps of one width or, beyond 64 columns, two: each is made, recorded, and checked once.
    assert 1 <= len(frozen) <= 2 and len(calls) == 1 + 3 * len(frozen)


@pytest.mark.parametrize(
    ("record", "why"), [(stale, "steps of a CUDA graph"), (refused, "stream is capturing")]
)
def test_graphs_that_fail_are_given_up_and_cost_no_answer(
    record: Any, why: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load(llama, POLICY, PREVIOUS).double()
    requests, config = make_requests(make_prompts(24, 12), POLICIES), SamplingConfig(batch_size=7)
    expected = decode(backbone, requests, stop_ids=STOPS, config=config)
    monkeypatch.setattr(graphs, "record", record)
    backbone.cache = "graphs"
    found = decode(backbone, requests, stop_ids=STOPS, config=config)
    assert [a.tokens.tolist() for a in found] == [a.tokens.tolist() for a in expected]
    assert backbone.cache == "slots" and why in backbone.cache_reason
    (note,) = [note for note in backbone.notes() if "answers with" in note]
    assert "a launch for each kernel" in note and "\n" not in note
    monkeypatch.undo()
    backbone.cache, backbone.cache_reason = "graphs", ""
    monkeypatch.setattr(graphs, "record", record)
    caches.choose(backbone)  # as at load
    assert backbone.cache == "slots" and why in backbone.cache_reason


def test_mixtures_equal_full_forward_passes(family: Path) -> None:
    """Every token, its log-prob and log Z against PEFT and transformers, one sequence at a time."""
    backbone, models = exact(family)
    requests = make_requests(make_prompts(20, 13), POLICIES)
    config = SamplingConfig(batch_size=6)
    answers = decode(backbone, requests, stop_ids=STOPS, config=config, record=True)
    silent = decode(backbone, requests, stop_ids=STOPS, config=config)
    lowest = 0.0
    for request, answer, same in zip(requests, answers, silent, strict=True):
        # Without log Z the hidden states are mixed, with it the logits: the same tokens.
        assert same.tokens.tolist() == answer.tokens.tolist() and same.logps is None
        assert answer.logps is not None and answer.log_normalisers is not None
        assert answer.logps.dtype == answer.log_normalisers.dtype == np.float32
        ids = np.concatenate([request.prompt, answer.tokens[:-1]])
        logp_SV, log_z_S = plain_logp(models, request.policy, ids)
        start = len(request.prompt) - 1
        temperature = request.temperature or 1.0
        own_LV = (logp_SV[start:] / temperature).log_softmax(-1)
        tokens = torch.from_numpy(answer.tokens).long()
        logp_L = own_LV.gather(1, tokens[:, None])[:, 0]
        np.testing.assert_allclose(answer.logps, logp_L, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(answer.log_normalisers, log_z_S[start:], atol=1e-6)
        lowest = min(lowest, float(log_z_S[start:].min()))
        if request.draw is None:
            assert tokens.tolist() == own_LV.argmax(-1).tolist()
            continue
        total_LV = own_LV.exp().cumsum(-1)
        u_L = uniforms(*request.draw, length=len(tokens))
        above_L = total_LV.gather(1, tokens[:, None])[:, 0]
        assert (above_L - logp_L.exp() <= u_L + 1e-6).all() and (u_L <= above_L + 1e-6).all()
    assert lowest < -0.03, "mixtures of policies that hardly differ show nothing"


def test_capped_logits_are_mixed_not_hidden_states() -> None:
    backbone = Backbone(helpers.make_model("gemma2", final_logit_softcapping=1.0), "", "")
    backbone.add_adapter(POLICY, LORA, seed=0, iteration=0)
    perturb(backbone, POLICY, 0)
    prompts, policies = make_prompts(3, 5), [mixture(POLICY, 0.5)] * 3
    plain, full = (
        Stepper(backbone, log_normalisers=record).prefill(prompts, policies).logits
        for record in (False, True)
    )
    torch.testing.assert_close(plain, full)
    capped = backbone.softcap
    backbone.softcap = None
    uncapped = Stepper(backbone).prefill(prompts, policies).logits
    assert capped and (capped * torch.tanh(uncapped / capped) - full).abs().max() > 0.01


def test_the_head_in_parts_is_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_tiny()
    head = backbone.head
    head.bias = torch.nn.Parameter(torch.randn(300))
    hidden = torch.randn(7, head.in_features)
    monkeypatch.setattr("alphaspin.model.head.HEAD_ROWS", 64)
    torch.testing.assert_close(backbone.logits(hidden), head(hidden))


def test_a_mixture_is_refused_unless_its_weights_are_ones() -> None:
    for policy in ({POLICY: 0.5}, {POLICY: 1.5, None: -0.25}, {}):
        with pytest.raises(ValueError, match="sum to 1"):
            Stepper(load_tiny()).prefill([np.array([5], np.int32)], [policy])
    assert mixture(None, 0.3) == {None: 1.0}
    assert mixture(POLICY, 0.75) == {POLICY: 0.75, None: 0.25}


def load_tiny() -> Backbone:
    return Backbone(helpers.make_model(), "nowhere", "identity")


@pytest.mark.usefixtures("narrow", "frozen")
@pytest.mark.parametrize("kind", CACHES)
def test_sequences_are_dropped_duplicated_and_reordered(family: Path, kind: Any) -> None:
    """The stepper as sequential Monte Carlo uses it, against full passes over each history."""
    pick(family, kind)
    backbone, models = exact(family)
    backbone.cache = kind
    prompts = [*make_prompts(3, 21), np.array([9], np.int32)]
    policies = [{PREVIOUS: 0.75, None: 0.25}, {POLICY: 1.0}, POLICIES[3], {None: 1.0}]
    stepper = Stepper(backbone, log_normalisers=True)
    random = np.random.default_rng(0)
    histories: list[tuple[list[int], Policy]] = []

    def check(ahead: Any, expected: Sequence[tuple[list[int], Policy]]) -> None:
        assert len(ahead.logits) == len(expected)
        for logits_V, log_z, (ids, policy) in zip(*ahead, expected, strict=True):
            logp_SV, log_z_S = plain_logp(models, policy, np.array(ids, np.int32))
            torch.testing.assert_close(logits_V.log_softmax(-1), logp_SV[-1], rtol=0, atol=3e-6)
            torch.testing.assert_close(log_z, log_z_S[-1], rtol=0, atol=3e-6)

    for chosen in ([0, 0, 3, 1, 2], [4, 1, 1, 0, 3, 2, 2], [6, 5], [0], [0, 0, 0], []):
        fresh = [
            (prompt.tolist(), policy) for prompt, policy in zip(prompts, policies, strict=True)
        ]
        check(stepper.prefill(prompts, policies), fresh)
        histories += fresh
        picks = [i for i in chosen if i < len(histories)] + list(range(5, len(histories), 2))
        stepper.select(picks)
        histories = [([*histories[i][0]], histories[i][1]) for i in picks]
        for _ in range(4 if histories else 0):
            tokens = random.integers(5, 300, len(histories))
            for (ids, _), token in zip(histories, tokens.tolist(), strict=True):
                ids.append(token)
            check(stepper.step(torch.from_numpy(tokens)), histories)
    assert len(stepper) == len(histories)


def test_a_prompt_that_is_shared_is_computed_once(llama: Path) -> None:
    backbone = load(llama, POLICY)
    rows: list[int] = []
    backbone.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    prompts = [np.array([7, 8, 9], np.int32)] * 5 + [np.array([7, 8], np.int32)]
    policies: list[Policy] = [{POLICY: 0.5, None: 0.5}] * 3 + [{None: 1.0}] * 3
    ahead = Stepper(backbone).prefill(prompts, policies)
    assert rows == [3], "two of the long prompt, one of the short"
    # The head's product may round a row otherwise at another place (MKL with AVX-512 does).
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    close(ahead.logits[0], ahead.logits[2])
    assert not torch.allclose(ahead.logits[2], ahead.logits[3], rtol=0, atol=1e-3)
    close(ahead.logits[3], ahead.logits[4])


def test_a_stop_token_at_the_cap_is_not_a_truncation(llama: Path) -> None:
    backbone = load(llama, POLICY)
    prompt = make_prompts(1, 13)[0]

    def greedy(cap: int, stops: set[int]) -> Answer:
        request = Request(prompt, {POLICY: 1.0}, cap, None)
        return decode(backbone, [request], stop_ids=frozenset(stops), config=SamplingConfig())[0]

    free = greedy(5, set())
    assert free.truncated and len(free.tokens) == 5
    last = int(free.tokens[-1])
    first_at = free.tokens.tolist().index(last) + 1
    stopped = greedy(first_at, {last})
    assert not stopped.truncated
    assert stopped.tokens.tolist() == free.tokens[:first_at].tolist()


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.7},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8},
    {"temperature": 0.5, "top_p": 0.05},
    {"top_k": 1},
]


def expected_probs(
    logits: Tensor, temperature: float = 1, top_k: int = 0, top_p: float = 1
) -> Tensor:
    """By transformers' own processors, in the order in which `generate` applies them."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    return torch.softmax(processors(ids, logits), -1)


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_filters_equal_transformers(settings: dict[str, Any]) -> None:
    logits = 3 * torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    found = filtered(logits, SamplingConfig(**settings))
    found /= found.sum(-1, keepdim=True)
    expected = expected_probs(logits, **settings)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({}, {POLICY: 1.0}),
        ({"temperature": 0.6}, {POLICY: 1.0}),
        ({"top_k": 5}, {POLICY: 1.0}),
        ({"top_p": 0.7}, {POLICY: 0.6, None: 0.4}),
        ({}, {POLICY: 0.6, None: 0.4}),
    ],
    ids=str,
)
def test_first_tokens_follow_the_distribution(
    llama: Path, settings: dict[str, Any], policy: Policy
) -> None:
    """Chi-square of 8 000 first tokens against transformers, PEFT and their filters."""
    count = 8000
    backbone = load(llama, POLICY)
    prompt = np.array([7, 80, 9], np.int32)
    answers = decode(
        backbone,
        [Request(prompt, policy, 1, Draw(5, 0, "test", i)) for i in range(count)],
        stop_ids=frozenset({1}),
        config=SamplingConfig(batch_size=2000, **settings),
        record=True,
    )
    tokens = np.array([int(answer.tokens[0]) for answer in answers])
    drawn = np.bincount(tokens, minlength=300)
    models = {name: plain_model(llama, name) for name in policy}
    logits = plain_logp(models, policy, prompt)[0][-1:]
    probs = expected_probs(logits, **settings)[0].double().numpy()
    assert drawn[probs == 0].sum() == 0
    logps = np.array([answer.logps for answer in answers])[:, 0]
    np.testing.assert_allclose(logps, np.log(probs[tokens]), rtol=1e-4, atol=1e-4)
    often = count * probs >= 5  # the test's approximation needs five of each; the rest are pooled
    found = np.append(drawn[often], drawn[~often].sum())
    expected = count * np.append(probs[often], probs[~often].sum())
    found, expected = found[expected > 0], expected[expected > 0]
    chi2 = ((found - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    # Mean and variance of chi-square are its freedom and twice that: four standard deviations.
    assert abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5, (chi2, freedom)
    assert freedom >= 4


def test_inversion_is_exact_at_the_edges() -> None:
    """u in [F(k-1), F(k)) gives k; no token without mass is ever drawn, at u = 1 - 2^-53 either."""
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    below = 1 - 2.0**-53
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (below, 4)):
        assert invert(probs, torch.tensor([u], dtype=torch.float64)).item() == token
    # Unnormalised rows, whose u·total rounds up to the total.
    odd = torch.tensor([[0.1, 0.3, 1e-9, 0.0]])
    assert invert(odd, torch.tensor([below], dtype=torch.float64)).item() <= 2


@pytest.mark.parametrize("vocabulary", [1, 5, 256, 300, 512, 1000])
def test_inversion_equals_one_running_sum(vocabulary: int) -> None:
    """Peaked rows with holes, over spans that are full, cut short, or without mass."""
    generator = torch.Generator().manual_seed(vocabulary)
    probs = (8 * torch.randn(400, vocabulary, generator=generator)).softmax(-1)
    probs *= torch.rand(probs.shape, generator=generator) < 0.7
    probs[:100, vocabulary // 2 :] = 0
    probs[100:200, : vocabulary // 2] = 0
    probs = probs[probs.sum(1) > 0]
    total = probs.double().cumsum(1)
    picked = torch.randint(vocabulary, (len(probs), 1), generator=generator)
    share = torch.rand(len(probs), dtype=torch.float64, generator=generator)
    edges = total.gather(1, picked)[:, 0] / total[:, -1]  # the hardest: u next to a step
    for u in (share, edges - 1e-12, edges + 1e-12):
        u = u.clamp(0, 1 - 2.0**-53)
        token = invert(probs, u)
        assert (probs.gather(1, token[:, None]) > 0).all()
        above = total.gather(1, token[:, None])[:, 0] / total[:, -1]
        below = above - probs.gather(1, token[:, None])[:, 0].double() / total[:, -1]
        assert (below <= u + 1e-14).all() and (u < above + 1e-14).all()


def test_sampling_leaves_no_trace_in_scoring(llama: Path) -> None:
    """The routes of a sampled batch do not outlive it."""
    backbone = load(llama, POLICY, PREVIOUS).eval()
    batch, _ = mixed_batch()
    with torch.no_grad():
        before = sequence_logps(backbone, batch)
        requests = make_requests(make_prompts(5, 1), POLICIES)
        decode(backbone, requests, stop_ids=STOPS, config=SamplingConfig(batch_size=2))
        assert torch.equal(sequence_logps(backbone, batch), before)


@pytest.mark.parametrize("name", [PREVIOUS, None])
def test_one_policy_is_decoded_with_its_adapter_in_the_weights(
    llama: Path, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No layer works out an update, and the tokens have the probabilities that scoring gives."""
    backbone = load(llama, POLICY, PREVIOUS)
    policy = {name: 1.0}
    requests = [
        Request(prompt, policy, 9, Draw(3, 0, "sample", i))
        for i, prompt in enumerate(make_prompts(6, 5))
    ]
    run = partial(
        decode, backbone, stop_ids=STOPS, config=SamplingConfig(batch_size=5), record=True
    )
    with monkeypatch.context() as patch:
        patch.setattr(module, "COPIES", -1)
        apart = run(requests)
    with monkeypatch.context() as patch:
        patch.delattr(routing, "segmented_lora")
        merged = run(requests)
        with pytest.raises(NameError):
            run([*requests, Request(requests[0].prompt, {POLICY: 1.0}, 2, None)])
        with pytest.raises(NameError):
            run([Request(requests[0].prompt, mixture(PREVIOUS, 0.5), 2, None)])
    assert backbone.route.merged is None
    trees = [Tree(r.prompt, (a.tokens,)) for r, a in zip(requests, merged, strict=True)]
    scored = logps(backbone, name, trees, 6)
    for mine, other, score in zip(merged, apart, scored, strict=True):
        assert np.array_equal(mine.tokens, other.tokens)
        assert mine.logps is not None and other.logps is not None
        assert np.abs(mine.logps - other.logps).max() < 3e-6
        assert abs(mine.logps.sum() - score[0]) < 2e-5


def test_what_is_not_merged(llama: Path) -> None:
    """Weights in 16 bits, which would round the update; and after an error nothing stays so."""
    backbone = load(llama, POLICY, PREVIOUS)
    with pytest.raises(RuntimeError, match="stop"), backbone.merged(PREVIOUS):
        assert backbone.route.merged is not None
        raise RuntimeError("stop")
    assert backbone.route.merged is None
    with backbone.bfloat16().merged(PREVIOUS):
        assert backbone.route.merged is None
