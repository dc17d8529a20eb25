"""Adapters of fused experts (`lora.target_parameters`), in memory and on disk as PEFT has them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from test_backbone import PREVIOUS, load, make_trees, plain_logps, plain_model
from test_families import FAMILIES, adapt, assert_equal_to_plain_peft, save
from transformers import AutoModelForCausalLM

from alphaspin.commands import exporting
from alphaspin.config import Config
from alphaspin.data.chat import ChatFormat
from alphaspin.errors import InputError
from alphaspin.model.batching import collate
from alphaspin.model.load import load_base
from alphaspin.model.routing import POLICY
from alphaspin.model.scoring import sequence_logps
from alphaspin.model.settings import LoraConfig
from alphaspin.model.verify import verify

NAMES = ("experts.gate_up_proj", "experts.down_proj")
LORA = LoraConfig(r=3, alpha=5, target_parameters=NAMES)
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_next"])
def test_experts_equal_plain_peft(family: str, tmp_path: Path) -> None:
    layout, changes = FAMILIES[family]
    save(tmp_path, family, changes)
    adapt(tmp_path, LORA)
    assert_equal_to_plain_peft(tmp_path, layout)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_in_a_joint_pass_and_recomputed(checkpointing: bool, tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe", FAMILIES["qwen3_moe"][1])
    adapt(tmp_path, LORA)
    backbone = load(tmp_path, POLICY, PREVIOUS).train()
    if checkpointing:
        backbone.enable_activation_checkpointing()
    assert backbone.joint_problem() is None
    batch = collate([(POLICY, make_trees(3, 1))], layout="packed")
    frozen = collate([(PREVIOUS, make_trees(2, 2)), (None, make_trees(2, 2))], layout="packed")
    gradients: list[dict[str, torch.Tensor]] = []
    values: list[torch.Tensor] = []
    for joint in (False, True):
        backbone.zero_grad()
        hidden = backbone(batch, frozen)[0] if joint else backbone(batch)
        hidden.square().sum().backward()
        values.append(hidden.detach())
        gradients.append({n: p.grad.clone() for n, p in backbone.policy_parameters().items()})  # pyright: ignore
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_an_adapter_made_by_peft_is_read_and_one_made_here_is_read_by_peft(tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe", FAMILIES["qwen3_moe"][1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    config = PeftLoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=list(NAMES)
    )
    theirs = get_peft_model(model, config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    trees = make_trees(3, 4)
    backbone = load(tmp_path, "theirs")
    with torch.no_grad():
        expected = plain_logps(theirs.eval(), trees)
        base = plain_logps(plain_model(tmp_path, None), trees)
        found = sequence_logps(backbone, collate([("theirs", trees)], layout="packed"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (expected - base).abs().max() > 0.1
    (tmp_path / "again").mkdir()
    backbone.save_adapter("theirs", tmp_path / "again")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    again = PeftModel.from_pretrained(fresh, str(tmp_path / "again")).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain_logps(again, trees), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gpt2"])
def test_merged_weights_are_the_adapted_model(family: str, tmp_path: Path) -> None:
    """Experts held either way round, and GPT-2's layers, which are the other way round."""
    save(tmp_path, family, FAMILIES[family][1])
    adapt(tmp_path, LoraConfig(r=3, alpha=5) if family == "gpt2" else LORA)
    _, tokenizer = load_base(str(tmp_path), dtype="fp32", device=CPU)
    chat = ChatFormat.create(tokenizer)
    told = exporting._write_merged(str(tmp_path), tmp_path / POLICY, chat, tmp_path / "merged")
    assert "float32" in told
    trees = make_trees(3, 5)
    with torch.no_grad():
        expected = plain_logps(plain_model(tmp_path, POLICY), trees)
        merged = plain_logps(plain_model(tmp_path / "merged", None), trees)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    assert (expected - plain_logps(plain_model(tmp_path, None), trees)).abs().max() > 0.1


def test_the_start_up_check_sees_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "qwen3_moe", FAMILIES["qwen3_moe"][1])
    backbone = load(tmp_path)
    backbone.add_adapter(POLICY, LORA, seed=0, iteration=0)
    found = verify(backbone, POLICY, longest=40)
    assert not (found.packed or found.joint or found.slots)
    monkeypatch.setattr(
        "alphaspin.model.routing.ExitStack.enter_context", lambda self, context: None
    )
    with pytest.raises(InputError, match="are not those of transformers and PEFT"):
        verify(backbone, POLICY, longest=40)


@pytest.mark.parametrize(
    ("family", "names", "says"),
    [
        ("qwen3_moe", ("experts.w1",), "of experts there are experts.down_proj"),
        ("qwen3_moe", ("q_proj.weight",), "name that in lora.targets"),
        ("llama", ("experts.down_proj",), "of experts there are none"),
        ("llama4_text", NAMES, "does not take a row for each token"),
    ],
)
def test_what_cannot_be_routed_is_refused(
    family: str, names: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    changes: Any = FAMILIES.get(family, ("", {}))[1]
    save(tmp_path, family, changes)
    backbone = load(tmp_path)
    lora = LoraConfig(target_parameters=names, targets=("v_proj",))
    with pytest.raises(InputError, match=says):
        backbone.add_adapter(POLICY, lora, seed=0, iteration=0)
        sequence_logps(backbone, collate([(POLICY, make_trees(1, 0))], layout=backbone.layout))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora": {"dropout": 0.1}}, "needs lora.dropout = 0"),
        ({"train": {"sharding": "fsdp"}}, "needs train.sharding = none"),
        (
            {"sampling": {"engine": "vllm", "url": "http://x/v1", "model": "m"}},
            "needs sampling.engine = local",
        ),
    ],
)
def test_settings_that_do_not_go_with_it(settings: dict[str, Any], says: str) -> None:
    settings["lora"] = settings.get("lora", {}) | {"target_parameters": list(NAMES)}
    with pytest.raises(ValueError, match=says):
        Config.model_validate(settings)


def test_runs_without_it_keep_their_names() -> None:
    assert "target_parameters" not in Config().identity()["lora"]
    named = Config.model_validate({"lora": {"target_parameters": list(NAMES)}})
    assert named.identity()["lora"]["target_parameters"] == list(NAMES)
    assert named.digest() != Config().digest()
