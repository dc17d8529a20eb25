"""LoRA as in PEFT: settings, numbers, gradients, files; what is not served is refused by name."""

import json
import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers import save_model, tokens
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from transformers import AutoModelForCausalLM

from alphaspin.cli import parse
from alphaspin.commands.exporting import _update
from alphaspin.config import Config, load_config
from alphaspin.errors import InputError
from alphaspin.model.backbone import WEIGHTS
from alphaspin.model.batching import collate
from alphaspin.model.load import load_base
from alphaspin.model.routing import POLICY
from alphaspin.model.settings import LoraConfig
from alphaspin.model.tree import Tree

CPU = torch.device("cpu")


def plain(folder) -> Any:
    load = cast(Any, AutoModelForCausalLM.from_pretrained)
    return load(str(folder), dtype=torch.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base") / "base")


def test_rslora_is_pefts_in_values_gradients_and_files(base, tmp_path):
    backbone, _ = load_base(str(base), dtype="fp32", device=CPU)
    config = LoraConfig(r=4, alpha=6.0, use_rslora=True, init_lora_weights="gaussian")
    assert config.scaling == 3.0
    backbone.add_adapter(POLICY, config, seed=0, iteration=0)
    state = backbone.adapter_state(POLICY)
    random = torch.Generator().manual_seed(1)
    for key in state:
        if ".lora_B." in key:
            state[key] = 0.1 * torch.randn(state[key].shape, generator=random)
    backbone.set_adapter_state(POLICY, state)
    backbone.save_adapter(POLICY, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["use_rslora"], saved["init_lora_weights"]) == (True, "gaussian")
    peft = cast(Any, PeftModel.from_pretrained(plain(base), str(tmp_path), is_trainable=True))
    draw = np.random.default_rng(0)
    tree = Tree(tokens(draw, 6, 6), (tokens(draw, 5, 5),))
    batch = collate([(POLICY, [tree])], layout="packed")
    hidden_NH = backbone(batch)
    ids = torch.from_numpy(np.concatenate([tree.prompt, *tree.responses])).long()[None]
    theirs_NH = peft.base_model.model.model(ids).last_hidden_state[0, 5:-1]
    assert hidden_NH.shape == theirs_NH.shape
    torch.testing.assert_close(hidden_NH, theirs_NH, rtol=1e-5, atol=1e-5)
    weight_NH = torch.randn(hidden_NH.shape, generator=random)
    (hidden_NH * weight_NH).sum().backward()
    (theirs_NH * weight_NH).sum().backward()
    gradients = {n.replace(".default", f".{POLICY}"): p.grad for n, p in peft.named_parameters()}
    mine = backbone.policy_parameters()
    assert len(mine) == 2 * 2 * 7
    for name, parameter in mine.items():
        theirs = gradients[name.removeprefix("model.")]
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-4, atol=1e-4)
    for layer in (m for m in peft.modules() if isinstance(m, LoraLinear)):
        torch.testing.assert_close(_update(layer), layer.get_delta_weight("default"))
        assert layer.scaling["default"] == 3.0


def test_gaussian_starts_as_the_base_with_its_own_spread(base):
    backbone, _ = load_base(str(base), dtype="fp32", device=CPU)
    spreads = {}
    for kind in ("default", "gaussian"):
        config = LoraConfig(r=8, init_lora_weights=kind)
        backbone.add_adapter(kind, config, seed=3, iteration=0)
        state = backbone.adapter_state(kind)
        assert not any(value.any() for key, value in state.items() if ".lora_B." in key)
        values = [v.flatten() for k, v in state.items() if ".lora_A." in k and v.shape[1] == 32]
        spreads[kind] = float(torch.cat(values).std())
    assert spreads["gaussian"] == pytest.approx(1 / 8, rel=0.05)
    assert spreads["default"] == pytest.approx(1 / math.sqrt(3 * 32), rel=0.05)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora.use_dora"], "no DoRA"),
        (["--lora.modules_to_save", "embed_tokens"], "no trained copies"),
        (["--lora.bias", "all"], "no trained biases"),
        (["--lora.target_modules", "q_proj"], r"is lora\.targets here"),
        (["--lora.init_lora_weights", "pissa_niter_4"], "takes a part out of the base"),
        (["--lora.init_lora_weights", "eva"], "needs passes over the data"),
        (["--lora.init_lora_weights", "false"], "would not be the base"),
    ],
)
def test_what_is_not_served_is_named(words, said, tmp_path):
    with pytest.raises(InputError, match=said):
        parse(words)
    key = words[0].removeprefix("--lora.")
    (tmp_path / "recipe.yaml").write_text(f"lora:\n  {key}: {words[1] if words[1:] else 'true'}\n")
    with pytest.raises(InputError, match=rf"recipe\.yaml:2: .*{said}"):
        load_config(tmp_path / "recipe.yaml")


def test_settings_leave_older_runs_their_names():
    as_peft = Config.model_validate({"lora": {"init_lora_weights": True}})
    assert as_peft.digest() == Config().digest()
    named = Config.model_validate({"lora": {"use_rslora": True}})
    assert named.digest() != Config().digest()
    assert Config.model_validate(named.model_dump()).lora == named.lora
    server = {"engine": "sglang", "url": "http://host/v1", "model": "m"}
    with pytest.raises(ValueError, match=r"lora\.alpha = 128 is the same"):
        Config.model_validate({"lora": {"use_rslora": True}, "sampling": server})


def test_adapters_of_other_kinds_are_not_loaded(base, tmp_path):
    backbone, _ = load_base(str(base), dtype="fp32", device=CPU)
    model = get_peft_model(plain(base), PeftLoraConfig(target_modules=["q_proj"], use_dora=True))
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / WEIGHTS).is_file()
    with pytest.raises(InputError, match="its use_dora: no DoRA"):
        backbone.load_adapter("other", tmp_path)
