"""Every causal family of the installed transformers, as a random model small enough to try.

A family's default configuration is shrunk by the names of its numbers (`SIZES`): what transformers
calls a thing is nearly uniform, and what is not stands in `HINTS`. `python tests/families.py` tries
all of them and writes `tests/families.json`, from which the table of `docs/models.md` is made.
"""

import json
import re
import sys
import warnings
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import helpers
import peft
import torch
import transformers
from test_backbone import load
from test_families import adapt, assert_equal_to_plain_peft
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from alphaspin.errors import InputError

ROOT = Path(__file__).parent
FILE, PAGE = ROOT / "families.json", ROOT.parent / "docs" / "models.md"
BEGIN, END = "<!-- families: python tests/families.py -->", "<!-- end of families -->"
PADDED = "exact, padded rows (one sequence each; chosen by itself, slower)"
REASONS = {
    "softcap(c (W h + b))": "the head is more than softcap(c (W h + b))",
    "what comes after it": "a token sees what comes after it",
    "cannot be loaded": "transformers does not load what it saved",
    "does not read back": "all-linear: PEFT does not read back some adapters; others can be named",
    "leave it out of lora": "all-linear: a layer takes other rows; others can be named",
    "cannot be served here (": "its own code does not run as transformers' others do",
    "Error": "its default configuration, shrunk by rule, is none",
}
LARGEST = 1_500_000
HIDDEN, POSITIONS = 32, 128
VOCABULARY, SPECIAL = 300, 310  # ids of images and sounds are never drawn
SIZES: tuple[tuple[str, int], ...] = (
    # What a number is called, and what it becomes where it is larger: the first that matches.
    (r"vocab", VOCABULARY),
    (r"(token_id|token_index)$", SPECIAL),
    (r"^(index_topk|keep_window_size)$", POSITIONS),  # whole: ties among zeros are broken anyhow
    (r"(experts_per_tok(en)?|top_?k|top_k_experts|moe_k)$", 2),
    (r"(^n_group|topk_group|expert_groups?|shared_experts?)$", 1),
    (r"(num_experts|local_experts|routed_experts|num_.*experts|expert_num)$", 4),
    (r"mamba\w*heads$", 8),
    (r"^qk_head_dim$", 16),
    (r"rotary_dim$", 4),
    (r"(head_dim|d_head|head_size|kv_channels|d_kv|dim_head|headdim|qk_\w+_dim|v_head_dim)$", 8),
    (r"(kv_heads|key_value_heads|query_groups|linear_num_key_heads)$", 2),
    (r"heads?$", 4),
    (r"rank$", 16),
    (r"(window|chunk|local_attention|window_size|chunk_size|chunk_length|block_size)", 8),
    (r"(d_state|state_size)$", 8),
    (r"(position|positions|max_seq_len|n_ctx|context_length|max_length)", POSITIONS),
    (r"(intermediate|ffn|ff_|d_ff|dff|dim_ff|d_inner|feed_forward|mlp_dim)", 48),
    (r"", HIDDEN),
)
KEPT = re.compile(  # numbers that are no sizes
    r"(theta|scal|seed|iters|multiple|factor|floor|length_penalty|max_window_layers|num_logits|"
    r"temperature|beam|patch|image_size|sampling|hop|mel|quantizers|kernel)"
)
LAYERS = re.compile(
    r"^((num_(hidden|decoder|encoder)?_?layers|n_layers?|(de|en)coder_layers|layers|depth|"
    r"num_layers_per_stack|n_(input|recurrent|output)_layers))$"
)
QSA = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 128,
    "indexer_compress_ratio": 2,
}
HINTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "mlp", "full_attention"],
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "xlstm": {"num_blocks": 2, "chunk_size": 64},
    "qwen4_exp_text": QSA,
    "xmod": {"default_language": "en_XX"},
}
"""What a family needs beyond the names of its numbers."""


def names() -> list[str]:
    """What `AutoModelForCausalLM` knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shrunk(family: str) -> Any:
    """Its configuration at a size of some ten thousand parameters."""
    kind = CONFIG_MAPPING[family]
    small = _small(kind().to_dict())
    for key, value in HINTS.get(family, {}).items():
        *path, last = key.split(".")
        part = small
        for name in path:
            part = part[name]
        part[last] = value
    small.pop("model_type", None)
    small |= {"eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.15}
    if "is_decoder" in small and not small.get("is_encoder_decoder"):
        small["is_decoder"] = True
    return kind(**small)


def _small(settings: dict[str, Any]) -> dict[str, Any]:
    count = next((v for k, v in settings.items() if LAYERS.match(k) and isinstance(v, int)), 0)
    layers = sorted(_representatives(settings, count))
    small = {
        key: _value(key, value, count, layers)
        for key, value in settings.items()
        if value is not None
    }
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]  # multi-head latent attention
    if settings.get("head_dim", 0) is None:
        small["head_dim"] = HIDDEN // 4
    return small


def _representatives(settings: dict[str, Any], count: int) -> list[int]:
    """Layers among which each kind of layer occurs, two at least."""
    per_layer = [v for v in settings.values() if isinstance(v, list) and len(v) == count > 2]
    seen: dict[str, int] = {}
    for number, kinds in enumerate(zip(*per_layer, strict=True) if per_layer else ()):
        seen.setdefault(repr(kinds), number)
    found = sorted(seen.values())[:4]
    return found + [n for n in range(count) if n not in found][: max(0, 2 - len(found))]


def _value(key: str, value: Any, count: int, layers: list[int]) -> Any:
    if key == "per_layer_config":
        return {new: _small(value[old]) for new, old in enumerate(layers) if old in value}
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return _small(value) if "rope" not in key else _rope(value)
    if isinstance(value, list) and len(value) == count > 2:
        return [_value(key, value[n], 0, []) for n in layers]
    if not isinstance(value, int) or isinstance(value, bool) or KEPT.search(key):
        return value
    if LAYERS.match(key):
        return min(value, max(2, len(layers)))
    size = next(size for pattern, size in SIZES if re.search(pattern, key))
    return min(value, size)


def _rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Sections of a rotary embedding for a head of 8."""
    return {
        key: _rope(value)
        if isinstance(value, dict)
        else [2, 1, 1][: len(value)]
        if key == "mrope_section"
        else value
        for key, value in settings.items()
    }


def verdict(family: str, folder: Path) -> str:
    """How a family is served: `packed`, `padded`, `refused: …`, `not tried: …`, or `wrong: …`."""
    try:
        config = shrunk(family)
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        size = sum(p.numel() for p in model.parameters())
        if size > LARGEST:
            return f"not tried: {size} parameters"
        with torch.no_grad():
            model(input_ids=torch.arange(5, 300, 13)[None], use_cache=False)
        model.save_pretrained(folder)
    except Exception as error:  # whatever a family's own code says to a small configuration
        return f"not tried: {_line(error)}"
    helpers.make_tokenizer().save_pretrained(folder)
    try:
        adapt(folder)
        layout = load(folder).layout
        assert_equal_to_plain_peft(folder, layout)
    except InputError as error:
        return f"refused: {_line(error)}"
    except Exception as error:
        return f"wrong: {_line(error)}"
    return layout


def _line(error: Exception) -> str:
    """What it says, without the folder's name, which is another in each run."""
    said = re.sub(r"(model = )?/\S+: ", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {said[:240]}"


def table(verdicts: dict[str, str]) -> str:
    """The verdicts as `docs/models.md` has them."""
    rows: dict[str, list[str]] = {}
    for family, found in verdicts.items():
        kind, _, reason = found.partition(": ")
        reason = next((text for part, text in REASONS.items() if part in reason), reason)
        title = {"packed": "exact, packed rows", "padded": PADDED}.get(kind, f"{kind}: {reason}")
        rows.setdefault(title, []).append(family)
    order = sorted(
        rows, key=lambda title: (title[0] != "e", "not tried" in title, -len(rows[title]))
    )
    lines = [f"| {title} | {', '.join(rows[title])} |" for title in order]
    return "\n".join(["| verdict | families |", "|---|---|", *lines])


def main() -> None:
    """Try the families that are named, or all: then write the file and the page's table."""
    warnings.simplefilter("ignore")
    found: dict[str, str] = {}
    for family in sys.argv[1:] or names():
        with TemporaryDirectory() as folder:
            found[family] = verdict(family, Path(folder))
        print(f"{family}: {found[family]}", flush=True)
    if sys.argv[1:]:
        return
    versions = f"transformers {transformers.__version__}, PEFT {peft.__version__}"
    about = f"{versions}, torch {torch.__version__}, CPU, fp32, {date.today()}"
    FILE.write_text(json.dumps({"about": about, "verdicts": found}, indent=1) + "\n")
    text = PAGE.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    PAGE.write_text(f"{text[:start]}\n{about}\n\n{table(found)}\n{text[end:]}")


if __name__ == "__main__":
    main()
