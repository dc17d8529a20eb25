"""Families that pack, that take padded rows, and that scale their logits, against plain PEFT.

Each random model: log-probs of [policy | previous | base], the policy's gradients, and the
sampler's recorded log-probs, against transformers + PEFT alone, one sequence at a time, fp32.
"""

from pathlib import Path
from typing import Any, cast

import helpers
import numpy as np
import pytest
import torch
from test_backbone import PREVIOUS, load, make_trees, perturb, plain_logps, plain_model, relative
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import AutoConfig

from alphaspin.errors import InputError
from alphaspin.model.batching import collate
from alphaspin.model.load import load_base
from alphaspin.model.routing import POLICY
from alphaspin.model.scoring import sequence_logps
from alphaspin.model.settings import LoraConfig
from alphaspin.model.stepper import mixture
from alphaspin.model.tree import Tree
from alphaspin.sampling.answer import Draw
from alphaspin.sampling.decode import Request, decode
from alphaspin.sampling.settings import SamplingConfig

COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.15,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"state_size": 8, "n_groups": 1, "num_heads": 4, "head_dim": 16, "expand": 2}
GEMMA4 = {
    "vocab_size_per_layer_input": 300,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 8,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 6,
    "num_kv_shared_layers": 2,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("packed", {"logits_scaling": 3.0}),
    "cohere": ("packed", {"logit_scale": 0.07}),
    "cohere2": ("packed", {"logit_scale": 0.3, "sliding_window": 6}),
    "gpt_oss": ("packed", {**EXPERTS, "sliding_window": 6}),
    "qwen3_moe": ("packed", {**EXPERTS, "moe_intermediate_size": 24}),
    "mixtral": ("packed", EXPERTS),
    "olmoe": ("packed", EXPERTS),
    "gpt2": ("packed", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    # ALiBi takes distances from columns and not from position ids.
    "bloom": ("padded", {"n_head": 4, "n_layer": 2}),
    "falcon": ("padded", {"alibi": True, "head_dim": None}),
    "mpt": ("padded", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "nemotron": ("padded", {}),
    "stablelm": ("padded", {}),
    "qwen3_next": ("padded", {**EXPERTS, **LINEAR, "moe_intermediate_size": 24}),
    "lfm2": ("padded", {"layer_types": ["conv", "full_attention"]}),
    "mamba": ("padded", {"state_size": 8}),
    # It caps its logits, under a name of its own, at a height that small logits do not show.
    "recurrent_gemma": (
        "padded",
        {
            "lru_width": 32,
            "attention_window_size": 8,
            "num_hidden_layers": 3,
            "logits_soft_cap": 9.0,
        },
    ),
    "mamba2": ("padded", {**MAMBA, "hidden_size": 32}),
    "llama4_text": (
        "padded",
        {**EXPERTS, "attention_chunk_size": 8, "intermediate_size_mlp": 48, "num_hidden_layers": 4},
    ),
    "gemma4_text": ("packed", GEMMA4),
}


def save(folder: Path, family: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    settings = {key: value for key, value in (COMMON | changes).items() if value is not None}
    config = AutoConfig.for_model(family, **{"bos_token_id": None, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    helpers.make_tokenizer().save_pretrained(folder)


LORA = LoraConfig(r=4, alpha=6)


def adapt(folder: Path, lora: LoraConfig = LORA) -> None:
    backbone = load(folder)
    for seed, name in enumerate((POLICY, PREVIOUS)):
        backbone.add_adapter(name, lora, seed=seed, iteration=0)
        perturb(backbone, name, seed)
        (folder / name).mkdir()
        backbone.save_adapter(name, folder / name)


ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 24,
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "original_max_position_embeddings": 24,
                "factor": 8.0,
            },
        },
    ),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 24,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
}


@pytest.mark.parametrize("rope", ROPES)
def test_positions_do_not_depend_on_neighbours(rope: str, tmp_path: Path) -> None:
    """Frequencies are those of the longest sequence of the run: up to 24 tokens, plain's."""
    family, changes = ROPES[rope]
    save(tmp_path, family, changes)
    random = np.random.default_rng(0)
    short = Tree(helpers.tokens(random, 6, 6), (helpers.tokens(random, 10, 10),))
    long = Tree(helpers.tokens(random, 20, 20), (helpers.tokens(random, 30, 30),))
    with torch.no_grad():
        expected = plain_logps(plain_model(tmp_path, None), [short])[0]
        values: dict[int, torch.Tensor] = {}
        for longest in (20, 64):
            backbone, _ = load_base(
                str(tmp_path), dtype="fp32", device=torch.device("cpu"), longest=longest
            )
            values[longest] = sequence_logps(backbone, collate([(None, [short])], layout="packed"))
            for layout in ("packed", "padded"):
                batch = collate([(None, [short, long])], layout=cast(Any, layout))
                if longest == 20:
                    with pytest.raises(InputError, match="fixed for 20"):
                        sequence_logps(backbone, batch)
                else:
                    beside = sequence_logps(backbone, batch)
                    torch.testing.assert_close(beside[:1], values[64], rtol=0, atol=1e-4)
    torch.testing.assert_close(values[20][0], expected, rtol=0, atol=1e-4)
    assert (values[20] - values[64]).abs() > 1e-3


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj")])
def test_layers_that_share_keys_are_no_place_for_a_joint_pass(
    targets: tuple[str, ...], tmp_path: Path
) -> None:
    save(tmp_path, "gemma4_text", GEMMA4)
    backbone = load(tmp_path)
    backbone.add_adapter(POLICY, LoraConfig(targets=targets), seed=0, iteration=0)
    problem = backbone.joint_problem()
    assert problem is not None and "use cached or online" in problem
    batch = collate([(POLICY, make_trees(2, 1))], layout="packed")
    beside = collate([(None, make_trees(2, 1))], layout="packed")
    with pytest.raises(InputError, match="cached or online"):
        backbone(batch, beside)
    assert load(save_llama(tmp_path / "llama")).joint_problem() is None


def save_llama(folder: Path) -> Path:
    save(folder, "llama", {})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_plain_peft(family: str, tmp_path: Path) -> None:
    layout, changes = FAMILIES[family]
    save(tmp_path, family, changes)
    adapt(tmp_path)
    assert_equal_to_plain_peft(tmp_path, layout)


def assert_equal_to_plain_peft(tmp_path: Path, layout: str) -> None:
    """Values, gradients and recorded log-probs of the folder's base, `policy` and `previous`."""
    backbone = load(tmp_path, POLICY, PREVIOUS)
    assert backbone.layout == layout, backbone.layout_reason
    groups = [(POLICY, make_trees(4, 1)), (PREVIOUS, make_trees(3, 2)), (None, make_trees(3, 3))]
    batch = collate(groups, layout=backbone.layout)
    found = sequence_logps(backbone, batch)
    with torch.no_grad():
        plain = {name: plain_model(tmp_path, name) for name, _ in groups}
        expected = torch.cat([plain_logps(plain[name], trees) for name, trees in groups])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)

    found.sum().backward()
    trained = plain_model(tmp_path, POLICY, trainable=True)
    plain_logps(trained, groups[0][1]).sum().backward()
    gradients = {
        name.replace(".default.", "."): cast(torch.Tensor, p.grad)
        for name, p in trained.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    # Neither side has any for a layer whose weight is used without it (Mamba's `dt_proj`).
    ours = {
        name.removeprefix("model.").replace(f".{POLICY}.", "."): p.grad
        for name, p in backbone.policy_parameters().items()
        if p.grad is not None
    }
    assert relative(ours, gradients) < 1e-4

    random = np.random.default_rng(5)
    requests = [
        Request(helpers.tokens(random, 1, 12), mixture(name, 1.0), 16, Draw(0, 0, "t", i))
        for i, name in enumerate([POLICY, None, PREVIOUS, POLICY, None])
    ]
    sampling = SamplingConfig(batch_size=3)
    answers = decode(backbone, requests, stop_ids=frozenset({1}), config=sampling, record=True)
    with torch.no_grad():
        for request, answer in zip(requests, answers, strict=True):
            name = next(key for key, weight in request.policy.items() if weight)
            tree = Tree(request.prompt, (answer.tokens,))
            assert answer.logps is not None
            scored = plain_logps(plain[name], [tree]).item()
            assert answer.logps.sum() == pytest.approx(scored, abs=1e-4)
