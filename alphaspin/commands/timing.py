"""How long a run will take on GPUs that are not here: a coarse model, whose terms `TERMS` tells."""

from dataclasses import dataclass, fields

from alphaspin.config import Config, PlanHints
from alphaspin.foundation.gpus import Gpu
from alphaspin.foundation.section import at
from alphaspin.training.trainer import total_steps

TRAINED = 0.4
"""Share of the datasheet's products that passes through a model reach: 400 TFLOP/s on an H100."""

DECODED = 0.6
"""Share of the datasheet's bandwidth that decoding reaches: vLLM's 10,000 to 15,000 tokens a second
of a 7B on an H100."""

LAYER = 1.25e-3
"""Seconds of the host for a layer and token step of the local sampler, whatever the GPU: of some
100 ms for 32 layers, 60 were the bookkeeping of 224 operators that is gone."""

ANSWERS = 256
"""Answers that vLLM decodes together."""

TERMS = (
    "passes: 2 operations a parameter and token, 4 where trained (the base is frozen), 6 where "
    f"recomputed, at {TRAINED:.0%} of the datasheet's rate; decoding: prompts as passes, then "
    f"weights, keys and values once for each token of a batch at {DECODED:.0%} of the bandwidth, "
    f"locally at least {1e3 * LAYER:g} ms a layer; GPUs share the work evenly; judges, the "
    "mixture's own training and start-up are not in it"
)


@dataclass(frozen=True)
class Times:
    """Seconds of an iteration by phase."""

    sampling: float
    scoring: float
    training: float
    evaluation: float

    @property
    def all(self) -> float:
        """Their sum."""
        return sum(getattr(self, field.name) for field in fields(self))


def cache_bytes(facts: PlanHints, width: int) -> float:
    """Bytes of keys and values of a token; `width` is that of a number."""
    return 2 * facts.layers * (facts.kv_width or facts.hidden) * width


def decoding(
    config: Config, facts: PlanHints, base: float, gpu: Gpu, *, engine: bool, count: float
) -> float:
    """Seconds to answer `count` prompts on one GPU.

    Args:
        config: its batch size counts for the local sampler.
        facts: lengths and sizes.
        base: bytes of the weights.
        gpu: which.
        engine: whether vLLM does.
        count: of answers.
    """
    prompts = 2 * facts.parameters * facts.prompt_tokens / (TRAINED * gpu.rate)
    batch = min(ANSWERS if engine else config.sampling.batch_size, max(count, 1))
    held = cache_bytes(facts, 2) * (facts.prompt_tokens + facts.response_tokens / 2)
    step = (base + batch * held) / (DECODED * gpu.bandwidth)
    if not engine:
        step = max(step, facts.layers * LAYER)
    return count * (prompts + facts.response_tokens * step / batch)


def pairs_of(config: Config, facts: PlanHints, t: int) -> tuple[int, int]:
    """Prompts of iteration t, and pairs that it trains on."""

    def prompts(iteration: int) -> int:
        return min(at(config.selfplay.prompts, iteration), facts.demonstrations)

    return prompts(t), prompts(t) + (prompts(t - 1) if config.selfplay.mixing and t else 0)


def trained(config: Config, pairs: int) -> int:
    """Pairs that pass through training, as often as they do."""
    return min(
        pairs * config.train.epochs, total_steps(pairs, config.train) * config.train.batch_size
    )


def times(
    config: Config,
    facts: PlanHints,
    t: int,
    gpu: Gpu,
    *,
    base: float,
    count: int = 1,
    engine: bool = False,
) -> Times:
    """Seconds of iteration t on `count` GPUs; the last one's evaluation has the control's too.

    Args:
        config: the run.
        facts: sizes and lengths, which are means.
        t: iteration.
        gpu: which.
        base: bytes of the weights.
        count: how many.
        engine: whether vLLM samples; evaluation is always local.
    """
    prompts, pairs = pairs_of(config, facts, t)
    token = 2 * facts.parameters / (TRAINED * gpu.rate)
    tree = facts.prompt_tokens + config.preference.sequences(t) * facts.response_tokens
    policies = 2 if "mixture" in config.selfplay.opponent else 1
    answers = prompts * config.preference.answers_per_prompt()
    sampling = policies * decoding(config, facts, base, gpu, engine=engine, count=answers)
    references = 1 if t == 0 or getattr(config.reference, "alpha", 1.0) in (0, 1) else 2
    if not config.preference.judged and not config.loss.has_reference:
        references = 0
    passes = 3 if config.train.activation_checkpointing else 2
    if config.control == "sft":
        passes *= 2  # further SFT of equal cost
    heldout = config.evaluate.prompts * (2 if t == 0 or config.control == "sft" else 1)
    measured = facts.prompt_tokens + 2 * facts.response_tokens
    evaluation = token * heldout * measured if heldout else 0.0
    evaluation += decoding(config, facts, base, gpu, engine=False, count=heldout) if heldout else 0
    return Times(
        sampling / count,
        references * token * pairs * tree / count,
        passes * token * trained(config, pairs) * tree / count,
        evaluation / count,
    )
