"""`--plan`: what a run will do and what it needs, computed without a download.

Facts about the model and the data come from local files where they are, else from the recipe's
`hints`; a hub id without hints is an error that says so.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from alphaspin.commands.job import check_data, load_data
from alphaspin.commands.sizing import base_bytes, model_facts
from alphaspin.config import Config, PlanHints
from alphaspin.data.chat import ChatFormat
from alphaspin.errors import InputError
from alphaspin.foundation import console
from alphaspin.foundation.paths import packaged
from alphaspin.foundation.section import at
from alphaspin.model.load import choose_bf16, loading
from alphaspin.training.trainer import total_steps

MIB, GIB = 2**20, 2**30


def show(config: Config) -> None:
    """Print the plan.

    Raises:
        InputError: neither local files nor hints tell what is needed.
    """
    facts = gather(config)
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


def gather(config: Config) -> PlanHints:
    """Facts from local files; from `hints` for what is on a hub."""
    model = packaged("tiny/model") if config.model == "tiny" else Path(config.model)
    local_data = config.data == "tiny" or Path(config.data).exists()
    if not (model.exists() and local_data) and config.hints is None:
        missing = config.data if model.exists() else config.model
        raise InputError(
            f"--plan downloads nothing, and {missing!r} is not a local path: give the recipe a "
            f"`hints` section ({', '.join(PlanHints.model_fields)})"
        )
    facts = config.hints.model_dump() if config.hints else {}
    if model.exists():
        try:
            facts |= model_facts(model, config)
        except (AttributeError, TypeError) as error:
            if not config.hints:
                raise InputError(
                    f"model = {config.model}: --plan cannot size this family ({error}): give the "
                    f"recipe a `hints` section ({', '.join(PlanHints.model_fields)})"
                ) from None
        if local_data:
            with loading(config.model):
                tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
            text = config.text
            chat = ChatFormat.of(text, tokenizer)
            demonstrations, heldout = load_data(config, chat)
            check_data(config, demonstrations, heldout)
            responses = [len(d.response) for d in demonstrations if d.answer is not None]
            facts |= {
                "demonstrations": len(demonstrations),
                "prompt_tokens": float(np.mean([len(d.prompt) for d in demonstrations])),
                "response_tokens": float(np.mean(responses or [text.max_response_tokens])),
            }
    return PlanHints.model_validate(facts)


def _row(config: Config, facts: PlanHints, t: int) -> list[str]:
    players = [
        player.name.replace("iterate-", "π")
        for player in config.selfplay.players(t, config.reference)
    ]
    prompts = min(at(config.selfplay.prompts, t), facts.demonstrations)
    longest = config.preference.answers_per_prompt() * config.text.max_response_tokens
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


def estimates(config: Config, facts: PlanHints) -> list[str]:
    """Memory and disk, with the rule each number comes from."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width = 2 if choose_bf16(config.train.dtype, device) else 4
    base, bits = base_bytes(facts, config.train.quantization, width), f"{8 * width} bit"
    if config.train.quantization != "none":
        bits = f"4 bit, embeddings and head {bits}"
    adapter = facts.adapter_parameters_per_rank * config.lora.r * 4
    states = {"adamw": 2, "adamw_8bit": 0.5, "rmsprop": 1}[config.train.optimizer]
    micro = max(1, config.train.batch_size // config.train.accumulation)
    tokens = micro * (facts.prompt_tokens + 2 * facts.response_tokens)
    # Korthikanti et al., arXiv 2205.05198: about 34 bytes per token, layer and hidden unit in 16
    # bits without the attention matrix; with recomputation one layer's, and 2 bytes a layer.
    per_layer = 34 * width / 2 * facts.hidden * tokens
    activations = per_layer * facts.layers
    if config.train.activation_checkpointing:
        activations = per_layer + width * facts.hidden * tokens * facts.layers
    logits = 2 * micro * facts.response_tokens * facts.vocabulary * 4
    pairs = sum(
        min(at(config.selfplay.prompts, t), facts.demonstrations)
        for t in range(config.selfplay.iterations)
    )
    answers = (
        pairs * config.preference.answers_per_prompt() * (config.text.max_response_tokens * 4 + 17)
    )
    cached = pairs * 4 * 20
    adapters = adapter * (config.selfplay.iterations * (2 if config.control == "sft" else 1))
    checkpoint = adapter * (1 + states)
    trained = adapter * (2 + states)
    training = base + trained + activations
    return [
        f"memory, training: about {training / GIB:.2f} GiB on {device.type} = base "
        f"{base / GIB:.2f} ({bits}) + adapter, gradient and {config.train.optimizer} "
        f"{trained / GIB:.3f} + activations of {tokens:,.0f} tokens {activations / GIB:.2f}",
        f"  not needed: [tokens, vocabulary] logits of a micro-batch, {logits / GIB:.2f} GiB fp32",
        f"disk: about {(answers + cached + adapters + 2 * checkpoint) / MIB:,.1f} MiB = answers of "
        f"full length {answers / MIB:,.1f} + reference log-probs {cached / MIB:,.1f} + adapters "
        f"{adapters / MIB:,.1f} + a checkpoint (two while saving) {2 * checkpoint / MIB:,.1f}",
        f"run folder: {config.run_folder()}",
    ]
