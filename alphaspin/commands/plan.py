"""`--plan`: what a run will do and what it needs, computed without a download.

Facts about the model and the data come from local files where they are, else from the recipe's
`hints`; a hub id without hints is an error that says so.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from alphaspin.commands import timing
from alphaspin.commands.inputs import check_data, load_limited
from alphaspin.commands.sizing import (
    STATES,
    base_bytes,
    choose_limits,
    embedded,
    memory,
    model_facts,
    number_bytes,
    recorded_limits,
    room,
    trained_together,
    training_bytes,
)
from alphaspin.config import Config, PlanHints
from alphaspin.data.chat import ChatFormat
from alphaspin.errors import InputError
from alphaspin.foundation import console
from alphaspin.foundation.gpus import GPUS, HERE, Target
from alphaspin.foundation.paths import packaged
from alphaspin.foundation.section import at
from alphaspin.foundation.vllm import CPU_CACHE, SHARE
from alphaspin.model.backbone import COPIES
from alphaspin.model.load import loading
from alphaspin.training.trainer import total_steps

MIB, GIB = 2**20, 2**30

WORKSPACE = {"cpu": 64 * MIB, "cuda": 1024 * MIB}
"""Bytes besides: a chunk of logits and sums of the head, cuBLAS, the allocator's rest."""


def device() -> torch.device:
    """Where a run would be, started here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def show(config: Config, target: Target = HERE) -> None:
    """Print the plan.

    Raises:
        InputError: neither local files nor hints tell what is needed.
    """
    tell(*gather(config, target), target)


def tell(config: Config, facts: PlanHints, target: Target = HERE) -> None:
    """Print the plan of what is known."""
    title = f"{config.name}: {config.model} on {config.data}, {facts.demonstrations:,} rows"
    against = "answers of" if config.preference.judged else "against"
    console.table(
        title,
        ["t", against, "prompts", "pairs", "steps", "tokens sampled", "trained", "lr", "β"],
        [_row(config, facts, t) for t in range(config.selfplay.iterations)],
    )
    if warning := config.preference.warning(config):
        console.note(warning)
    durations(config, facts, target)
    for line in estimates(config, facts, target):
        console.text(line)


def gather(
    config: Config, target: Target = HERE, *, fresh: bool = False
) -> tuple[Config, PlanHints]:
    """The settings with their limits chosen, and facts from local files, else from `hints`.

    With `fresh` they may come from the hub, of a model all but the weights, and no limit is taken
    from a run that is there.
    """
    model = packaged("tiny/model") if config.model == "tiny" else Path(config.model)
    local = fresh or model.exists()
    local_data = fresh or config.data == "tiny" or Path(config.data).exists()
    if not (local and local_data) and config.hints is None:
        missing = f"data = {config.data}" if model.exists() else f"model = {config.model}"
        raise InputError(
            f"{missing}: is not there; if it is a hub id, --plan downloads nothing: give the "
            f"recipe a `hints` section ({', '.join(PlanHints.model_fields)})"
        )
    facts = config.hints.model_dump() if config.hints else {}
    if local:
        try:
            facts |= model_facts(config)
        except (AttributeError, TypeError) as error:
            if not config.hints:
                raise InputError(
                    f"model = {config.model}: --plan cannot size this family ({error}): give the "
                    f"recipe a `hints` section ({', '.join(PlanHints.model_fields)})"
                ) from None
        if local_data:
            with loading(config.model):
                tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
                settings = AutoConfig.from_pretrained(str(model), trust_remote_code=False)
            chat = ChatFormat.of(config.text, tokenizer)
            limit = partial(
                choose_limits,
                positions=getattr(settings.get_text_config(), "max_position_embeddings", None),
                tokens=room(config, device(), target.gpu) if config.text.auto else None,
                each=trained_together(config),
            )
            if not fresh:
                config = config.sized(recorded_limits(config.run_folder()))
            config, demonstrations, heldout = load_limited(config, chat, limit)
            check_data(config, demonstrations, heldout)
            responses = [len(d.response) for d in demonstrations if d.answer is not None]
            facts |= {
                "demonstrations": len(demonstrations),
                "prompt_tokens": float(np.mean([len(d.prompt) for d in demonstrations])),
                "response_tokens": float(np.mean(responses or [config.text.response_limit])),
            }
    if config.text.auto:
        raise InputError(
            f"text.{config.text.auto[0]} = auto: is chosen by model and data, which are not both "
            "here: give the plan a number"
        )
    return config, PlanHints.model_validate(facts)


def _row(config: Config, facts: PlanHints, t: int) -> list[str]:
    players = [
        player.name.replace("iterate-", "π")
        for player in config.selfplay.players(t, config.reference)
    ]
    prompts, pairs = timing.pairs_of(config, facts, t)
    longest = config.preference.answers_per_prompt() * config.text.response_limit
    steps = total_steps(pairs, config.train)
    passed = timing.trained(config, pairs)
    trained = config.preference.sequences(t) * facts.response_tokens * passed
    return [
        str(t),
        " ".join(players),
        f"{prompts:,}",
        f"{pairs:,}",
        f"{steps:,}",
        f"≤ {_short(prompts * longest)}",
        f"~ {_short(trained)}",
        f"{at(config.train.lr, t):g}",
        f"{config.preference.reward_scale(config, t):g}",
    ]


def _short(count: float) -> str:
    """A number of tokens in three digits or so."""
    return f"{count / 1e6:,.1f}M" if count >= 1e5 else f"{count / 1e3:.1f}k"


def known(target: Target) -> Target:
    """The GPU that is here, where nothing else is asked for and it is one that is known."""
    if target.gpu or device().type != "cuda":
        return target
    here = torch.cuda.get_device_name().lower()
    name = next((name for name in GPUS if name in here), "")
    return Target(GPUS.get(name), name, torch.cuda.device_count())


def durations(config: Config, facts: PlanHints, target: Target) -> None:
    """Print hours by phase, or why there are none."""
    target = known(target)
    if target.gpu is None:
        console.text(f"time: not known of {device().type} here; --gpu NAME --gpus N plans for GPUs")
        return
    base = base_bytes(facts, config.train.quantization, 2)
    engine = uses_engine(config, target)
    found = [
        timing.times(config, facts, t, target.gpu, base=base, count=target.count, engine=engine)
        for t in range(config.selfplay.iterations)
    ]
    rows = [
        [str(t), *(f"{value / 3600:.2g}" for value in (*asdict(one).values(), one.all))]
        for t, one in enumerate(found)
    ]
    total = sum(one.all for one in found) / 3600
    by = "vLLM" if engine else "the local sampler"
    title = (
        f"hours on {target.count} × {target.name}, answers by {by}; estimates: {total:.2g} in all"
    )
    console.table(title, ["t", "sampling", "scoring", "training", "evaluation", "all"], rows)
    console.text(f"time: {timing.TERMS}")


def uses_engine(config: Config, target: Target) -> bool:
    """Whether vLLM samples; with `auto` it is counted on where the plan is for a GPU elsewhere."""
    sampling = config.sampling
    if not sampling.owned:
        return sampling.engine != "local"
    return sampling.engine == "vllm" or (target.gpu is not None and not config.needs_local())


def sampling_memory(
    config: Config, facts: PlanHints, target: Target, base: float, width: int
) -> list[str]:
    """What sampling takes beside or instead of training: here, or in a vLLM of the run's own."""
    sampling, kind = config.sampling, target.name or device().type
    sharded = config.train.sharding == "fsdp" and known(target).count > 1
    if sharded and not uses_engine(config, target):
        return [
            "sampling: REFUSED with train.sharding = fsdp on several GPUs: the local sampler would "
            "gather the whole base for each token; set sampling.engine = vllm, or no sharding"
        ]
    each = timing.cache_bytes(facts, width)
    answer = facts.prompt_tokens + config.text.response_limit
    if not sampling.owned or (sampling.engine == "auto" and config.needs_local()):
        if sampling.engine != "local":
            return []
        policies = 2 if "mixture" in config.selfplay.opponent else 1
        caches = policies * sampling.batch_size * answer * each
        logits = 2 * policies * sampling.batch_size * facts.vocabulary * 4
        copies = _copies(config, facts, width)
        return [
            f"memory, sampling: about {(base + copies + caches + logits) / GIB:.2f} GiB on {kind} "
            f"= base {base / GIB:.2f} + copies of its layers with the adapter {copies / GIB:.2f} + "
            f"keys and values of {sampling.batch_size} answers of full length "
            f"{caches / GIB:.2f} + fp32 logits {logits / GIB:.2f}"
        ]
    own = base / (sampling.tensor_parallel or 1)
    if kind == "cpu":
        needed, rest = base + own + CPU_CACHE, f"keys and values {CPU_CACHE / GIB:.2f}; it stays"
    else:
        each /= sampling.tensor_parallel or 1
        needed = base + own + each * answer
        rest = (
            f"keys and values, {each * answer / GIB:.3f} an answer at most, in {SHARE:.0%} of what "
            f"is left; asleep in training, with {base / GIB:.2f} in host memory"
        )
        total = target.gpu.memory if target.gpu else torch.cuda.mem_get_info()[1]
        if needed > SHARE * total:
            rest += f". That does NOT fit into {total / GIB:.1f}: raise sampling.tensor_parallel"
    return [
        f"memory, sampling: about {needed / GIB:.2f} GiB on {kind} = base "
        f"{base / GIB:.2f} + vLLM's {own / GIB:.2f} + {rest}"
    ]


def _copies(config: Config, facts: PlanHints, width: int) -> float:
    """Bytes of the weights to which `Backbone.merged` adds a policy: all but embeddings, head."""
    copies = (facts.parameters - embedded(facts)) * width
    alone = width == 4 and (config.train.quantization, config.train.sharding) == ("none", "none")
    return copies if alone and copies <= COPIES else 0


def estimates(config: Config, facts: PlanHints, target: Target) -> list[str]:
    """Memory and disk, with the rule each number comes from."""
    kind = target.name or device().type
    width = number_bytes(config, device(), target.gpu)
    bits = f"{8 * width} bit"
    if config.train.quantization != "none":
        bits = f"4 bit, embeddings and head {bits}"
    adapter = facts.adapter_parameters_per_rank * config.lora.r * 4
    fixed, each = training_bytes(
        config, facts, width, cuda=kind != "cpu", processes=known(target).count
    )
    micro = max(1, config.train.batch_size // config.train.accumulation)
    tokens = micro * (facts.prompt_tokens + 2 * facts.response_tokens)
    activations = each * tokens
    logits = 2 * micro * facts.response_tokens * facts.vocabulary * 4
    pairs = sum(
        min(at(config.selfplay.prompts, t), facts.demonstrations)
        for t in range(config.selfplay.iterations)
    )
    answers = pairs * config.preference.answers_per_prompt() * (config.text.response_limit * 4 + 17)
    cached = pairs * 4 * 20
    adapters = adapter * (config.selfplay.iterations * (2 if config.control == "sft" else 1))
    trained = adapter * (2 + STATES[config.train.optimizer])
    held, checkpoint = fixed - trained, trained - adapter
    workspace = WORKSPACE["cpu" if kind == "cpu" else "cuda"]
    training = fixed + activations + workspace
    fits = "" if training <= memory(device(), target.gpu) else ". That does NOT fit"
    return [
        f"memory, training: about {training / GIB:.2f} GiB on {kind} = base "
        f"{held / GIB:.2f} ({bits}) + adapter, gradient and {config.train.optimizer} "
        f"{trained / GIB:.3f} + activations of {tokens:,.0f} tokens {activations / GIB:.2f} + "
        f"workspace {workspace / GIB:.2f}{fits}",
        *sampling_memory(config, facts, target, held, width),
        f"  not needed: [tokens, vocabulary] logits of a micro-batch, {logits / GIB:.2f} GiB fp32",
        f"disk: about {(answers + cached + adapters + 2 * checkpoint) / MIB:,.1f} MiB = answers of "
        f"full length {answers / MIB:,.1f} + reference log-probs {cached / MIB:,.1f} + adapters "
        f"{adapters / MIB:,.1f} + a checkpoint (two while saving) {2 * checkpoint / MIB:,.1f}",
        f"run folder: {config.run_folder()}",
    ]
