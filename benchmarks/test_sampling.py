"""Tokens per second of decoding: against transformers' `generate`, and of geometric mixtures.

Random Llamas emit their end token too rarely to matter, so lengths vary by caps: each request has
its own, and `generate` gets a stopping criterion per row. Only tokens up to the caps count.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from alphaspin.model import backbone as module
from alphaspin.model.backbone import Backbone
from alphaspin.model.settings import LoraConfig
from alphaspin.model.stepper import Policy, Stepper, mixture
from alphaspin.sampling.answer import Draw
from alphaspin.sampling.decode import Request, decode, invert, uniforms
from alphaspin.sampling.settings import SamplingConfig

ADAPTER = "previous"
STOPS: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Size:
    """A random Llama with a tied head."""

    vocabulary: int
    hidden: int = 512
    layers: int = 6

    def model(self) -> Any:
        return measure.llama(self.vocabulary, self.hidden, self.layers, end=None).eval()

    def backbone(self) -> Backbone:
        """With an adapter that has moved away from zero."""
        backbone = Backbone(self.model(), "random", "random")
        backbone.add_adapter(ADAPTER, LoraConfig(r=16), seed=0, iteration=0)
        generator = torch.Generator().manual_seed(0)
        state = backbone.adapter_state(ADAPTER)
        moved = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
        backbone.set_adapter_state(ADAPTER, moved)
        return backbone

    def merged(self, backbone: Backbone) -> Any:
        """The adapter added to the weights: the best case of a plain model."""
        model = self.model()
        layers = dict(model.named_modules())
        for name, layer in backbone._causal_lm.named_modules():
            if hasattr(layer, "get_delta_weight"):
                layers[name].weight.data += layer.get_delta_weight(ADAPTER)
        return model


def requests(
    size: Size, caps: Sequence[int], policy: Policy, prompt: int, seed: int
) -> list[Request]:
    random = np.random.default_rng(seed)
    return [
        Request(
            random.integers(5, size.vocabulary, prompt).astype(np.int32),
            policy,
            int(cap),
            Draw(0, 0, "benchmark", i),
        )
        for i, cap in enumerate(caps)
    ]


class Caps(StoppingCriteria):
    """Each row ends at its own length."""

    def __init__(self, caps: Sequence[int], prompt: int):
        self.end = torch.tensor(caps) + prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.end <= input_ids.shape[1]


def generate(model: Any, asked: Sequence[Request], batch_size: int, cache: str | None) -> int:
    """Tokens up to the caps."""
    torch.manual_seed(0)
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        ids = torch.from_numpy(np.stack([r.prompt for r in part])).long()
        caps = [r.max_tokens for r in part]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=max(caps),
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Caps(caps, ids.shape[1])]),
            cache_implementation=cache,
        )
        assert out.shape[1] == ids.shape[1] + max(caps)
    return sum(r.max_tokens for r in asked)


def ours(
    backbone: Backbone,
    asked: Sequence[Request],
    batch_size: int,
    record: bool,
    copies: int = module.COPIES,
    cache: str | None = None,
) -> int:
    """With an adapter in copies of the weights of so many bytes at most; `cache` as in `caches`."""
    config = SamplingConfig(batch_size=batch_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "COPIES", copies)
        patch.setattr(backbone, "cache", cache or backbone.cache)
        answers = decode(backbone, asked, stop_ids=STOPS, config=config, record=record)
    assert [len(a.tokens) for a in answers] == [r.max_tokens for r in asked]
    return sum(r.max_tokens for r in asked)


def two_models(models: Sequence[Any], weights: Sequence[float], asked: Sequence[Request]) -> int:
    """Plain transformers: each policy has its own forward pass, cache and full logits."""
    caches = [DynamicCache(config=model.config) for model in models]
    old = "past_key_values"  # its name before transformers 5.24, or so
    name = old if old in inspect.signature(models[0].forward).parameters else "cache"
    ids = torch.from_numpy(np.stack([r.prompt for r in asked])).long()
    with torch.no_grad():
        for _ in range(asked[0].max_tokens):
            mixed = sum(
                weight
                * model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
                .logits[:, -1]
                .log_softmax(-1)
                for model, cache, weight in zip(models, caches, weights, strict=True)
            )
            assert isinstance(mixed, Tensor)
            ids = torch.multinomial(mixed.softmax(-1), 1)
    return sum(r.max_tokens for r in asked)


def two_steppers(backbone: Backbone, policy: Policy, asked: Sequence[Request]) -> int:
    """Our cache and sampler, but a pass and a head product for each policy."""
    steppers = [Stepper(backbone) for _ in policy]
    prompts = [r.prompt for r in asked]
    ahead = [
        stepper.prefill(prompts, [{name: 1.0}] * len(prompts))
        for stepper, name in zip(steppers, policy, strict=True)
    ]
    draws = torch.stack([uniforms(*r.draw, length=r.max_tokens) for r in asked if r.draw])
    for k in range(asked[0].max_tokens):
        mixed = sum(
            weight * one.logits.log_softmax(-1)
            for one, weight in zip(ahead, policy.values(), strict=True)
        )
        assert isinstance(mixed, Tensor)
        tokens = invert(mixed.softmax(-1), draws[:, k])
        if k + 1 < asked[0].max_tokens:
            ahead = [stepper.step(tokens) for stepper in steppers]
    return sum(r.max_tokens for r in asked)


def interleaved(
    variants: dict[str, tuple[Callable[..., int], list[dict[str, Any]]]], rounds: int
) -> Iterator[tuple[str, measure.Row, dict[str, Any], int]]:
    """Each variant at its best settings, which a first call of each finds; then in turn."""
    best: dict[str, tuple[float, dict[str, Any], int]] = {}
    for label, (run, settings) in variants.items():
        for chosen in settings:
            started = time.perf_counter()
            tokens = run(**chosen)
            seconds = time.perf_counter() - started
            if label not in best or seconds < best[label][0]:
                best[label] = (seconds, chosen, tokens)
    rows = {label: measure.Row(measure.Variant(run)) for label, (run, _) in variants.items()}
    for _ in range(rounds):
        for label, row in rows.items():
            started = time.perf_counter()
            row.variant.run(**best[label][1])
            row.samples.append(time.perf_counter() - started)
    for label, row in rows.items():
        yield label, row, best[label][1], best[label][2]


HEADER = ["variant", "settings", "tokens/s p50", "p20", "p80", "n", "× first"]


def write(
    record: Callable[..., Path],
    name: str,
    variants: dict[str, tuple[Callable[..., int], list[dict[str, Any]]]],
    rounds: int,
    text: str,
    goals: dict[str, tuple[str, str, float]],
) -> None:
    """The table; each goal is a ratio of rates: measure → (ours, theirs, at least)."""
    cells: list[list[str]] = []
    raw: list[dict[str, Any]] = []
    rate: dict[str, float] = {}
    for label, row, settings, tokens in interleaved(variants, rounds):
        low, middle, high = (tokens / row.quantile(share) for share in (0.8, 0.5, 0.2))
        rate[label] = middle
        shown = ", ".join(f"{key} {value}" for key, value in settings.items())
        first = next(iter(rate.values()))
        figures = [f"{value:.0f}" for value in (middle, low, high)]
        cells.append([label, shown, *figures, str(rounds), f"{middle / first:.2f}"])
        raw.append({"variant": label, "settings": settings, "tokens": tokens})
        raw[-1]["seconds"] = row.samples
    lines = [["measure", "goal", "measured", ""], ["---"] * 4]
    for title, (mine, theirs, limit) in goals.items():
        lines.append(
            measure.Goal(title, rate[mine] / rate[theirs], limit, " ×", at_least=True).row()
        )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    path = record(name, HEADER, cells, f"{text} {measure._load()}\n\n{table}", raw)
    print("\n" + path.read_text(encoding="utf-8"))


def uniform_lengths(count: int) -> list[int]:
    return np.random.default_rng(1).integers(64, 193, count).tolist()


def long_tailed(count: int) -> list[int]:
    """Log-uniform: half of the answers are shorter than 78 tokens."""
    random = np.random.default_rng(1)
    return np.exp(random.uniform(np.log(16), np.log(384), count)).astype(int).tolist()


@pytest.mark.parametrize("lengths", [uniform_lengths, long_tailed], ids=["uniform", "long-tailed"])
def test_sampling(
    lengths: Callable[[int], list[int]], measuring: bool, record: Callable[..., Path]
) -> None:
    size = Size(32_000) if measuring else Size(300, 64, 1)
    caps = lengths(64) if measuring else [2, 5, 3]
    prompt = 64 if measuring else 4
    sizes = [{"batch_size": n} for n in ((32, 64) if measuring else (2,))]
    backbone, plain = size.backbone(), size.model()
    base, adapted = (requests(size, caps, {name: 1.0}, prompt, 0) for name in (None, ADAPTER))
    variants: dict[str, tuple[Callable[..., int], list[dict[str, Any]]]] = {
        "alphaspin": (lambda **s: ours(backbone, base, record=False, **s), sizes),
        "alphaspin, adapter merged": (
            lambda **s: ours(backbone, adapted, record=False, **s),
            sizes,
        ),
        "alphaspin, adapter not merged": (
            lambda **s: ours(backbone, adapted, record=False, copies=-1, **s),
            sizes,
        ),
        "generate": (lambda **s: generate(plain, base, cache=None, **s), sizes),
    }
    goals = {"against generate": ("alphaspin", "generate", 3.0)}
    if torch.cuda.is_available():  # where both are captured as graphs
        variants["alphaspin, a launch for each kernel"] = (
            lambda **s: ours(backbone, base, record=False, cache="slots", **s),
            sizes,
        )
        static = "generate, static cache"
        variants[static] = (lambda **s: generate(plain, base, cache="static", **s), sizes)
        goals["against generate with a static cache"] = ("alphaspin", static, 3.0)
    write(
        record,
        f"sampling-{lengths.__name__.replace('_', '-').replace('-lengths', '')}",
        variants,
        3 if measuring else 1,
        f"{len(caps)} prompts of {prompt} tokens, answers of {min(caps)} to {max(caps)} tokens "
        f"(mean {np.mean(caps):.0f}), fp32, vocabulary {size.vocabulary:,}, "
        f"{sum(p.numel() for p in plain.parameters()) / 1e6:.0f}M parameters. Each variant has the "
        "batch size that is best for it among those tried (32, 64).",
        goals,
    )


def test_geometric_decoding(measuring: bool, record: Callable[..., Path]) -> None:
    size = Size(128_000) if measuring else Size(300, 64, 1)
    policy = mixture(ADAPTER, 0.5)
    asked = requests(size, [128 if measuring else 3] * 32, policy, 64 if measuring else 4, 0)
    backbone = size.backbone()
    models = (size.merged(backbone), size.model())
    one: list[dict[str, Any]] = [{}]
    write(
        record,
        "sampling-geometric",
        {
            "alphaspin": (lambda: ours(backbone, asked, 32, False), one),
            "alphaspin, with log-probs and log Z": (lambda: ours(backbone, asked, 32, True), one),
            "two transformers models": (
                lambda: two_models(models, list(policy.values()), asked),
                one,
            ),
            "two passes of our sampler": (lambda: two_steppers(backbone, policy, asked), one),
        },
        3 if measuring else 1,
        f"32 prompts of {len(asked[0].prompt)} tokens, {asked[0].max_tokens} tokens each, fp32, "
        f"vocabulary {size.vocabulary:,}, "
        f"{sum(p.numel() for p in models[1].parameters()) / 1e6:.0f}M parameters. "
        "π_prev^½ π_base^½. Of the transformers models one has the adapter merged.",
        {
            "against two full-logit forwards (transformers)": (
                "alphaspin",
                "two transformers models",
                1.7,
            ),
            "against two passes of our own sampler": (
                "alphaspin",
                "two passes of our sampler",
                1.7,
            ),
        },
    )
