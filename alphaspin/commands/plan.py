"""`--plan`: what a run will do and what it needs, computed without a download.

Facts about the model and the data come from local files where they are, else from the recipe's
`hints`; a hub id without hints is an error that says so.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from alphaspin.commands.inputs import check_data, load_limited
from alphaspin.commands.sizing import (
    base_bytes,
    choose_limits,
    model_facts,
    recorded_limits,
    room,
    trained_together,
    training_bytes,
)
from alphaspin.config import Config, PlanHints
from alphaspin.data.chat import ChatFormat
from alphaspin.errors import InputError
from alphaspin.foundation import console
from alphaspin.foundation.paths import packaged
from alphaspin.foundation.section import at
from alphaspin.model.load import choose_bf16, loading
from alphaspin.sampling.engine import CPU_CACHE, SHARE
from alphaspin.training.trainer import total_steps

MIB, GIB = 2**20, 2**30


def device() -> torch.device:
    """Where a run would be, started here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def show(config: Config) -> None:
    """Print the plan.

    Raises:
        InputError: neither local files nor hints tell what is needed.
    """
    tell(*gather(config))


def tell(config: Config, facts: PlanHints) -> None:
    """Print the plan of what is known."""
    title = (
        f"{config.name}: {config.model} on {config.data}, {facts.demonstrations:,} rows; in tokens:"
    )
    against = "answers of" if config.preference.judged else "against"
    console.table(
        title,
        ["t", against, "prompts", "pairs", "steps", "sampled", "trained", "lr", "β"],
        [_row(config, facts, t) for t in range(config.selfplay.iterations)],
    )
    if warning := config.preference.warning(config):
        console.note(warning)
    for line in estimates(config, facts):
        console.text(line)


def gather(config: Config, *, fresh: bool = False) -> tuple[Config, PlanHints]:
    """The settings with their limits chosen, and facts from local files, else from `hints`.

    With `fresh` they may come from the hub, of a model all but the weights, and no limit is taken
    from a run that is there.
    """
    model = packaged("tiny/model") if config.model == "tiny" else Path(config.model)
    local = fresh or model.exists()
    local_data = fresh or config.data == "tiny" or Path(config.data).exists()
    if not (local and local_data) and config.hints is None:
        missing = config.data if model.exists() else config.model
        raise InputError(
            f"--plan downloads nothing, and {missing!r} is not a local path: give the recipe a "
            f"`hints` section ({', '.join(PlanHints.model_fields)})"
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
                tokens=room(config, device()) if config.text.auto else None,
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
    prompts = min(at(config.selfplay.prompts, t), facts.demonstrations)
    longest = config.preference.answers_per_prompt() * config.text.response_limit
    pairs = prompts
    if config.selfplay.mixing and t:
        pairs += min(at(config.selfplay.prompts, t - 1), facts.demonstrations)
    steps = total_steps(pairs, config.train)
    trained = (
        config.preference.sequences(t)
        * facts.response_tokens
        * min(pairs * config.train.epochs, steps * config.train.batch_size)
    )
    return [
        str(t),
        " ".join(players),
        f"{prompts:,}",
        f"{pairs:,}",
        f"{steps:,}",
        f"≤ {prompts * longest / 1e6:,.1f}M",
        f"~ {trained / 1e6:,.1f}M",
        f"{at(config.train.lr, t):g}",
        f"{config.preference.reward_scale(config, t):g}",
    ]


def engine_memory(config: Config, facts: PlanHints, base: float, width: int) -> list[str]:
    """What a vLLM of the run's own takes beside the trainer; nothing where there will be none."""
    sampling = config.sampling
    if not sampling.owned or (sampling.engine == "auto" and config.needs_local()):
        return []
    own = base / (sampling.tensor_parallel or 1)
    if device().type == "cpu":
        needed, rest = base + own + CPU_CACHE, f"keys and values {CPU_CACHE / GIB:.2f}; it stays"
    else:
        # Two vectors a token and layer; with grouped heads, fewer numbers.
        each = 2 * facts.layers * facts.hidden * width / (sampling.tensor_parallel or 1)
        answer = facts.prompt_tokens + config.text.response_limit
        needed = base + own + each * answer
        rest = (
            f"keys and values, {each * answer / GIB:.3f} an answer at most, in {SHARE:.0%} of what "
            f"is left; asleep in training, with {base / GIB:.2f} in host memory"
        )
        total = torch.cuda.mem_get_info()[1]
        if needed > SHARE * total:
            rest += f". That does NOT fit into {total / GIB:.1f}: raise sampling.tensor_parallel"
    return [
        f"memory, sampling: about {needed / GIB:.2f} GiB on {device().type} = base "
        f"{base / GIB:.2f} + vLLM's {own / GIB:.2f} + {rest}"
    ]


def estimates(config: Config, facts: PlanHints) -> list[str]:
    """Memory and disk, with the rule each number comes from."""
    width = 2 if choose_bf16(config.train.dtype, device()) else 4
    base, bits = base_bytes(facts, config.train.quantization, width), f"{8 * width} bit"
    if config.train.quantization != "none":
        bits = f"4 bit, embeddings and head {bits}"
    adapter = facts.adapter_parameters_per_rank * config.lora.r * 4
    fixed, each = training_bytes(config, facts, width)
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
    trained = fixed - base
    checkpoint = trained - adapter
    training = fixed + activations
    return [
        f"memory, training: about {training / GIB:.2f} GiB on {device().type} = base "
        f"{base / GIB:.2f} ({bits}) + adapter, gradient and {config.train.optimizer} "
        f"{trained / GIB:.3f} + activations of {tokens:,.0f} tokens {activations / GIB:.2f}",
        *engine_memory(config, facts, base, width),
        f"  not needed: [tokens, vocabulary] logits of a micro-batch, {logits / GIB:.2f} GiB fp32",
        f"disk: about {(answers + cached + adapters + 2 * checkpoint) / MIB:,.1f} MiB = answers of "
        f"full length {answers / MIB:,.1f} + reference log-probs {cached / MIB:,.1f} + adapters "
        f"{adapters / MIB:,.1f} + a checkpoint (two while saving) {2 * checkpoint / MIB:,.1f}",
        f"run folder: {config.run_folder()}",
    ]
