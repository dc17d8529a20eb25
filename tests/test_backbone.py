"""One pass over several adapters against transformers + PEFT alone, one sequence at a time.

The plain side loads the same folders with `AutoModelForCausalLM` and `PeftModel`, attention eager,
no padding, no packing, full logits. All in fp32 unless a test says otherwise.
"""

import gc
import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import helpers
import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from alphaspin.errors import InputError
from alphaspin.model.backbone import WEIGHTS, Backbone
from alphaspin.model.batching import Batch, Segment, collate
from alphaspin.model.load import load_base
from alphaspin.model.routing import POLICY, RoutedLinear
from alphaspin.model.scoring import sequence_logps
from alphaspin.model.settings import LoraConfig
from alphaspin.model.tree import Tree

PREVIOUS = "previous"
LORA = LoraConfig(r=4, alpha=6)
CPU = torch.device("cpu")
# Both kinds of layer in one model, which with two layers is Gemma 2's and Qwen's own choice alone.
MIXED_LAYERS = {"gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]}}


def load(folder: Path, *adapters: str) -> Backbone:
    backbone, _ = load_base(str(folder), dtype="fp32", device=CPU)
    for name in adapters:
        backbone.load_adapter(name, folder / name)
    return backbone


def routed_layers(backbone: Backbone) -> list[RoutedLinear]:
    return [module for module in backbone.modules() if isinstance(module, RoutedLinear)]


def perturb(backbone: Backbone, name: str, seed: int) -> None:
    """Move an adapter away from zero, as training would, by enough to show."""
    generator = torch.Generator().manual_seed(seed)
    state = backbone.adapter_state(name)
    moved = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
    backbone.set_adapter_state(name, moved)


def make_folder(
    folder: Path, family: str, lora: LoraConfig = LORA, changes: dict[str, Any] | None = None
) -> Path:
    """A base with the adapters `policy` and `previous` in folders of their own."""
    helpers.save_model(folder, family, **MIXED_LAYERS.get(family, {}) | (changes or {}))
    backbone = load(folder)
    for seed, name in enumerate((POLICY, PREVIOUS)):
        backbone.add_adapter(name, lora, seed=seed, iteration=0)
        perturb(backbone, name, seed)
        (folder / name).mkdir()
        backbone.save_adapter(name, folder / name)
    return folder


@dataclass(frozen=True)
class Family:
    """One of the families: its name and its folder."""

    name: str
    folder: Path


@pytest.fixture(scope="module", params=helpers.FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, make_folder(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters with LoRA dropout."""
    lora = LoraConfig(r=4, alpha=6, dropout=0.3)
    return make_folder(tmp_path_factory.mktemp("noisy"), "llama", lora)


def plain_model(folder: Path, adapter: str | None, *, trainable: bool = False) -> Any:
    """Base or adapter by transformers and PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter is not None:
        path = str(folder / adapter)
        model = PeftModel.from_pretrained(model, path, is_trainable=trainable)
    assert not any(isinstance(module, RoutedLinear) for module in model.modules())
    return model.eval()


def plain_logps(model: Any, trees: Sequence[Tree]) -> Tensor:
    """lp(y) of each response, one unpadded sequence at a time."""
    result: list[Tensor] = []
    for tree in trees:
        for response in tree.responses:
            ids = torch.from_numpy(np.concatenate([tree.prompt, response]).astype(np.int64))[None]
            logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1], -1)
            result.append(logps.gather(1, ids[0, 1:, None])[len(tree.prompt) - 1 :].sum())
    return torch.stack(result)


def make_trees(count: int, seed: int) -> list[Tree]:
    """One to three responses each, longer than the sliding window of 6 and shorter.

    They begin as the one before does, for any number of its tokens, and may be equal.
    """
    random = np.random.default_rng(seed)
    trees: list[Tree] = []
    for i in range(count):
        prompt, responses = helpers.tokens(random, 1, 14), [helpers.tokens(random, 1, 20)]
        for _ in range(i % 3):
            shared = responses[-1][: random.integers(0, len(responses[-1]) + 1)]
            own = helpers.tokens(random, 0 if len(shared) else 1, 20 - len(shared))
            responses.append(np.concatenate([shared, own]))
        trees.append(Tree(prompt, tuple(responses)))
    return trees


def mixed_batch() -> tuple[Batch, dict[str | None, list[Tree]]]:
    """[policy | previous | base] in one row."""
    groups: dict[str | None, list[Tree]] = {
        POLICY: make_trees(5, 1),
        PREVIOUS: make_trees(4, 2),
        None: make_trees(4, 3),
    }
    batch = collate(list(groups.items()), layout="packed")
    return batch, groups


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference over all tensors, relative to the largest entry of all."""
    assert found.keys() == expected.keys()
    scale = max(tensor.abs().max().item() for tensor in expected.values())
    assert scale > 1e-3, "gradients that vanish would agree with anything"
    return max((found[key] - expected[key]).abs().max().item() for key in expected) / scale


def policy_gradients(backbone: Backbone) -> dict[str, Tensor]:
    """The policy's gradients under PEFT's names."""
    return {
        name.removeprefix("model.").replace(f".{POLICY}.", "."): cast(Tensor, p.grad).clone()
        for name, p in backbone.policy_parameters().items()
    }


# Scoring and gradients


def test_one_pass_equals_the_plain_models(family: Family) -> None:
    backbone = load(family.folder, POLICY, PREVIOUS).eval()
    batch, groups = mixed_batch()
    with torch.no_grad():
        found = sequence_logps(backbone, batch)
        expected = [
            plain_logps(plain_model(family.folder, n), trees) for n, trees in groups.items()
        ]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=2e-5)
    # The three policies are not one: under another adapter the numbers are elsewhere.
    with torch.no_grad():
        other = plain_logps(plain_model(family.folder, None), groups[POLICY])
    assert (other - expected[0]).abs().max() > 0.1


def test_sliding_windows_matter_in_these_tests(tmp_path: Path) -> None:
    """With a window beyond the sequence the numbers are others: the window of 6 is in force."""
    trees = make_trees(5, 1)
    batch = collate([(None, trees)], layout="packed")
    for name in sorted({*helpers.FAMILIES} - {"llama", "gemma"}):
        both: list[Tensor] = []
        for window in (6, 100):
            changes = {**MIXED_LAYERS.get(name, {}), "sliding_window": window}
            backbone = Backbone(cast(Any, helpers.make_model(name, **changes)), "x", "y")
            with torch.no_grad():
                both.append(sequence_logps(backbone.eval(), batch))
        assert (both[0] - both[1]).abs().max() > 1e-3, name


def test_gradients_reach_the_policy_only_and_equal_pefts(family: Family) -> None:
    """Every sequence has a weight in the loss, those of the previous iterate and the base too."""
    backbone = load(family.folder, POLICY, PREVIOUS).train()
    batch, groups = mixed_batch()
    weights = torch.randn(len(batch.lengths), generator=torch.Generator().manual_seed(4))
    (weights * sequence_logps(backbone, batch)).sum().backward()
    for name, parameter in backbone.named_parameters():
        mine = f".{POLICY}." in name
        assert parameter.requires_grad == mine, name
        assert (parameter.grad is not None) == mine, name

    plain = plain_model(family.folder, POLICY, trainable=True)
    mine = sum(len(tree.responses) for tree in groups[POLICY])
    (weights[:mine] * plain_logps(plain, groups[POLICY])).sum().backward()
    expected = {
        name.replace(".default.", "."): cast(Tensor, p.grad)
        for name, p in plain.named_parameters()
        if p.requires_grad
    }
    assert relative(policy_gradients(backbone), expected) < 1e-5


def test_a_new_adapter_is_pefts_and_changes_nothing_yet(family: Family) -> None:
    """B = 0, A as PEFT would draw it, and a function of (seed, t) that leaves torch's generator."""
    backbone = load(family.folder)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for name, seed, iteration in (("x", 1, 0), ("y", 1, 0), ("z", 1, 1), ("w", 2, 0)):
        backbone.add_adapter(name, LORA, seed=seed, iteration=iteration)
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c, d = (backbone.adapter_state(name) for name in "xyzw")
    plain = get_peft_model(
        plain_model(family.folder, None),
        PeftLoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    shapes = {
        name.replace(".default.", "."): parameter.shape
        for name, parameter in plain.named_parameters()
        if parameter.requires_grad
    }
    assert {key: value.shape for key, value in a.items()} == shapes
    for key, value in a.items():
        assert torch.equal(value, b[key])
        if ".lora_B." in key:
            assert not value.any()
        else:
            assert not torch.equal(value, c[key]) and not torch.equal(value, d[key])
    trees = make_trees(3, 5)
    batch = collate([("x", trees), (None, trees)], layout="packed")
    with torch.no_grad():
        fresh, base = sequence_logps(backbone.eval(), batch).chunk(2)
    assert torch.equal(fresh, base)


# Files


def test_saved_adapters_are_pefts_files(family: Family, tmp_path: Path) -> None:
    folder = family.folder / POLICY
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, "adapter_config.json"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0)
    for name in (POLICY, PREVIOUS):  # PEFT names the base in the first adapter of a model alone
        written = json.loads((family.folder / name / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == str(family.folder)
    assert config["inference_mode"] is True
    # `all-linear` is resolved as PEFT does it, and written in an order of its own.
    plain = PeftLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    resolved = get_peft_model(plain_model(family.folder, None), plain).peft_config["default"]
    assert config["target_modules"] == sorted(cast(Any, resolved).target_modules)
    # What PEFT itself writes after reading them has the same names and the same bits.
    plain_model(family.folder, POLICY).save_pretrained(tmp_path)
    ours, theirs = load_file(folder / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_adapters_reload_bit_for_bit(family: Family, tmp_path: Path) -> None:
    backbone = load(family.folder, POLICY)
    expected = load_file(family.folder / POLICY / WEIGHTS)
    backbone.load_adapter("copy", family.folder / POLICY)
    backbone.save_adapter("copy", tmp_path)
    for name in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (family.folder / POLICY / name).read_bytes()
    # Over an adapter that is there already.
    backbone.load_adapter("copy", family.folder / PREVIOUS)
    assert backbone.adapter_ids["copy"] != backbone.adapter_ids[POLICY]
    backbone.load_adapter("copy", family.folder / POLICY)
    assert backbone.adapter_ids["copy"] == backbone.adapter_ids[POLICY]
    for name in (POLICY, "copy"):
        state = backbone.adapter_state(name)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_an_adapter_is_forgotten(llama: Path) -> None:
    backbone = load(llama, POLICY, PREVIOUS)
    backbone.remove_adapter(PREVIOUS)
    assert not backbone.has_adapter(PREVIOUS) and backbone.has_adapter(POLICY)
    assert PREVIOUS not in backbone.adapter_ids
    assert not any(f".{PREVIOUS}." in name for name, _ in backbone.named_parameters())
    # Overwritten tensors have no identity under which a log-prob could be cached.
    perturb(backbone, POLICY, 9)
    assert POLICY not in backbone.adapter_ids


# Activation checkpointing and dropout


def trained_gradients(folder: Path, *, checkpointing: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients in training mode, and how often a layer of the decoder ran."""
    backbone = load(folder, POLICY, PREVIOUS)
    if checkpointing:
        backbone.enable_activation_checkpointing()
    backbone.train()
    calls = 0

    def count(*args: Any) -> None:
        nonlocal calls
        calls += 1

    routed_layers(backbone)[0].register_forward_hook(count)
    batch, _ = mixed_batch()
    torch.manual_seed(7)
    weights = torch.randn(len(batch.lengths), generator=torch.Generator().manual_seed(4))
    (weights * sequence_logps(backbone, batch)).sum().backward()
    return policy_gradients(backbone), calls


def test_activation_checkpointing_gives_the_same_gradients(family: Family) -> None:
    plain, once = trained_gradients(family.folder, checkpointing=False)
    recomputed, twice = trained_gradients(family.folder, checkpointing=True)
    assert (once, twice) == (1, 2), "the layer is to run again in the backward pass"
    assert relative(recomputed, plain) < 1e-6


def test_activation_checkpointing_repeats_the_dropout_noise(noisy: Path) -> None:
    plain, _ = trained_gradients(noisy, checkpointing=False)
    recomputed, _ = trained_gradients(noisy, checkpointing=True)
    assert relative(recomputed, plain) < 1e-6


def scored(backbone: Backbone, seed: int) -> tuple[Tensor, Tensor]:
    """Log-probs of (policy, base) rows of one pass, dropout noise from `seed`."""
    batch, groups = mixed_batch()
    torch.manual_seed(seed)
    with torch.no_grad():
        logps = sequence_logps(backbone, batch)
    counts = [sum(len(tree.responses) for tree in trees) for trees in groups.values()]
    policy, _, base = logps.split(counts)
    return policy, base


def test_dropout_acts_on_policy_rows_in_training_only(noisy: Path, llama: Path) -> None:
    backbone = load(noisy, POLICY, PREVIOUS)
    backbone.eval()
    policy, base = scored(backbone, 0)
    with torch.no_grad():
        expected = plain_logps(plain_model(noisy, POLICY), make_trees(5, 1))
    torch.testing.assert_close(policy, expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(policy, scored(backbone, 1)[0])
    backbone.train()
    first, base_in_training = scored(backbone, 0)
    assert torch.equal(first, scored(backbone, 0)[0])
    assert (first - scored(backbone, 1)[0]).abs().min() > 1e-4
    assert (first - policy).abs().min() > 1e-4
    assert torch.equal(base, base_in_training)
    # Without `lora.dropout` the two modes are one.
    silent = load(llama, POLICY, PREVIOUS)
    assert torch.equal(scored(silent.eval(), 0)[0], scored(silent.train(), 1)[0])


def test_dropout_spares_frozen_adapters(noisy: Path) -> None:
    """An earlier iterate was trained with noise, but what it says is not noisy."""
    backbone = load(noisy, POLICY, PREVIOUS)
    batch = collate([(PREVIOUS, make_trees(4, 2))], layout="packed")
    with torch.no_grad():
        calm = sequence_logps(backbone.eval(), batch)
        training = sequence_logps(backbone.train(), batch)
    assert torch.equal(calm, training)


def test_dropout_has_lora_statistics() -> None:
    """x → x·m/(1-p) with m ~ Bernoulli(1-p), before A: the update's mean is the plain update."""
    backbone = Backbone(cast(Any, helpers.make_model("llama")), "x", "y")
    backbone.add_adapter(POLICY, LoraConfig(r=4, alpha=6, dropout=0.3), seed=0, iteration=0)
    perturb(backbone, POLICY, 1)
    layer = routed_layers(backbone)[0].train()
    layer.route.segments = (Segment(POLICY, 0, 1),)
    torch.manual_seed(0)
    x = torch.randn(32)
    count = 40_000
    with torch.no_grad():
        update = layer(x.expand(1, count, 32)) - layer.base_layer(x)
        layer.eval()
        expected = layer(x.expand(1, 1, 32)) - layer.base_layer(x)
    error = (update.mean(1) - expected[:, 0]).abs() / (update.std(1) / count**0.5)
    assert error.max() < 5, "standard errors"
    assert update.std(1).min() > 1e-3


def test_dropout_of_the_base_is_switched_off() -> None:
    """Some families train with attention dropout; a frozen base must be the same in both modes."""
    model = helpers.make_model("llama", attention_dropout=0.5)
    backbone = Backbone(cast(Any, model), "x", "y")
    batch = collate([(None, make_trees(4, 1))], layout="packed")
    with torch.no_grad():
        calm = sequence_logps(backbone.eval(), batch)
        training = sequence_logps(backbone.train(), batch)
    assert torch.equal(calm, training)


# What is refused


def small(family: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
        }
        | changes,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def test_a_head_that_does_more_is_refused() -> None:
    """A scale is found; what is added to the logits of some tokens is no scale."""
    model = helpers.make_model("llama")
    plain = model.forward

    def bent(*args: Any, **kwargs: Any) -> Any:
        output = cast(Any, plain(*args, **kwargs))
        output.logits = output.logits.clone()
        output.logits[..., 7:] += 1.0
        return output

    cast(Any, model).forward = bent
    with pytest.raises(InputError, match=r"logits are not softcap\(c \(W h \+ b\)\)"):
        Backbone(cast(Any, model), "x", "y")


# PEFT warns of the tied head that it is to adapt, before it is refused.
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning:peft.tuners")
@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "lm_head"), ("nothing",)])
def test_targets_on_the_head_or_on_nothing_are_refused(
    family: str, targets: tuple[str, ...]
) -> None:
    """With a tied head (Gemma) as well."""
    backbone = Backbone(cast(Any, helpers.make_model(family)), "x", "y")
    with pytest.raises(InputError, match=rf"lora\.targets = .*{targets[-1]}"):
        backbone.add_adapter(POLICY, LoraConfig(targets=targets), seed=0, iteration=0)


@pytest.mark.parametrize("targets", [("embed_tokens",), ("q_proj", "embed_tokens")])
def test_targets_that_cannot_be_routed_are_refused(targets: tuple[str, ...]) -> None:
    """PEFT has adapters for embeddings; ours would put them on every row, whoever it belongs to."""
    backbone = Backbone(cast(Any, helpers.make_model("llama")), "x", "y")
    with pytest.raises(InputError, match=r"lora\.targets.*embed_tokens"):
        backbone.add_adapter(POLICY, LoraConfig(targets=targets), seed=0, iteration=0)


def test_a_linear_layer_with_a_forward_of_its_own_keeps_it() -> None:
    """Such as a router's; `all-linear` leaves it out, and by name it is refused."""

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    def make() -> Backbone:
        model: Any = helpers.make_model("llama")
        old = model.model.layers[0].self_attn.o_proj
        model.model.layers[0].self_attn.o_proj = new = Doubled(32, 32, bias=False)
        new.weight = old.weight
        return Backbone(model, "x", "y")

    backbone, trees = make(), make_trees(4, 1)
    batch = collate([(None, trees)], layout="packed")
    with torch.no_grad():
        before = sequence_logps(backbone, batch)
        backbone.add_adapter(POLICY, LORA, seed=0, iteration=0)
        assert torch.equal(sequence_logps(backbone, batch), before)
    adapted = [n for n, m in backbone.named_modules() if isinstance(m, RoutedLinear)]
    assert not any(name.endswith("layers.0.self_attn.o_proj") for name in adapted)
    assert any(name.endswith("layers.1.self_attn.o_proj") for name in adapted)
    with pytest.raises(InputError, match=r"o_proj is a Doubled.*by name: .*q_proj"):
        make().add_adapter(POLICY, LoraConfig(targets=("o_proj",)), seed=0, iteration=0)


@pytest.mark.parametrize("targets", [("q_proj", "nothing"), ("all-linear", "q_proj")])
def test_a_misspelt_target_among_right_ones_is_refused(targets: tuple[str, ...]) -> None:
    backbone = Backbone(cast(Any, helpers.make_model("llama")), "x", "y")
    with pytest.raises(InputError, match=r"lora\.targets"):
        backbone.add_adapter(POLICY, LoraConfig(targets=targets), seed=0, iteration=0)


def test_the_head_is_never_adapted_by_all_linear(family: Family) -> None:
    backbone = load(family.folder, POLICY)
    tied = family.name.startswith("gemma")
    embeddings = backbone.decoder.get_input_embeddings().weight
    assert (backbone.head.weight is embeddings) == tied
    assert len(routed_layers(backbone)) == 2 * 7
    assert not isinstance(backbone.head, RoutedLinear)


# Loading


def test_bf16_is_loaded_on_demand(family: Family) -> None:
    backbone, _ = load_base(str(family.folder), dtype="bf16", device=CPU)
    backbone.load_adapter(POLICY, family.folder / POLICY)
    for name, parameter in backbone.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
    trees = make_trees(6, 1)
    batch = collate([(POLICY, trees)], layout="packed")
    found = sequence_logps(backbone.train(), batch)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert all(torch.isfinite(gradient).all() for gradient in policy_gradients(backbone).values())
    with torch.no_grad():
        expected = plain_logps(plain_model(family.folder, POLICY), trees)
    error = (found.detach() - expected).abs() / batch.lengths
    assert error.max() < 0.05, "nats per token"
    assert load_base(str(family.folder), dtype="auto", device=CPU)[0].head.weight.dtype is (
        torch.float32
    )


class Bomb:
    """Pickled code that must not run."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return (pytest.fail, ("a pickle was loaded",))


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb()}))


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_family(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "of-tomorrow"}')


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def missing_weights(folder: Path) -> None:
    """A layer of the config that the weights do not have would be filled at random."""
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder, ignore=shutil.ignore_patterns(POLICY, PREVIOUS))
    load(folder)  # whole, it loads
    yield folder


@pytest.mark.parametrize(
    "damage",
    [
        drop_tokenizer,
        drop_config,
        only_pickle,
        break_config,
        unknown_family,
        cut_weights,
        missing_weights,
    ],
)
def test_what_cannot_be_loaded_is_refused(broken: Path, damage: Callable[[Path], None]) -> None:
    damage(broken)
    with pytest.raises(InputError, match=rf"^model = {broken}: ") as caught:
        load(broken)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model = "):
        load(tmp_path / "nothing")


def test_weights_of_an_adapter_for_another_base_are_refused(llama: Path, tmp_path: Path) -> None:
    other = helpers.save_model(tmp_path, "llama", hidden_size=64)
    with pytest.raises((InputError, RuntimeError), match=r"size|shape"):
        load(other).load_adapter(POLICY, llama / POLICY)


def test_the_identity_of_a_base_is_that_of_its_weights(tmp_path: Path) -> None:
    same = [load(helpers.save_model(tmp_path / name, seed=0)).identity for name in "ab"]
    other = load(helpers.save_model(tmp_path / "c", seed=1)).identity
    assert same[0] == same[1] != other


def test_adapters_may_have_different_shapes(llama: Path, tmp_path: Path) -> None:
    """A policy of another rank and on fewer layers than its predecessor, in one pass with it."""
    backbone = load(llama, PREVIOUS)
    narrow = LoraConfig(r=2, alpha=1, targets=("q_proj", "down_proj"))
    backbone.add_adapter(POLICY, narrow, seed=5, iteration=0)
    perturb(backbone, POLICY, 6)
    backbone.save_adapter(POLICY, tmp_path)
    batch, groups = mixed_batch()
    plain = get_peft_model(
        plain_model(llama, None),
        PeftLoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "down_proj"]),
    ).eval()
    set_peft_model_state_dict(plain, load_file(tmp_path / WEIGHTS))
    with torch.no_grad():
        found = sequence_logps(backbone.eval(), batch)
        expected = [
            plain_logps(plain, groups[POLICY]),
            plain_logps(plain_model(llama, PREVIOUS), groups[PREVIOUS]),
            plain_logps(plain_model(llama, None), groups[None]),
        ]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=2e-5)


def test_sharing_and_packing_change_nothing(family: Family, tmp_path: Path) -> None:
    """Other shapes: one key head for four, a window of 11, up to five responses, long and short."""
    changes = {**MIXED_LAYERS.get(family.name, {}), "num_key_value_heads": 1}
    if family.name not in {"llama", "gemma"}:
        changes["sliding_window"] = 11
    folder = helpers.save_model(tmp_path, family.name, **changes)
    random = np.random.default_rng(7)
    trees = [
        Tree(
            helpers.tokens(random, longest, longest),
            tuple(helpers.tokens(random, 1, 60) for _ in range(responses)),
        )
        for longest, responses in ((1, 2), (60, 5), (33, 1), (12, 3), (60, 2))
    ]
    backbone = load(folder)
    with torch.no_grad():
        expected = plain_logps(plain_model(folder, None), trees)
        alone = [Tree(tree.prompt, (y,)) for tree in trees for y in tree.responses]
        for layout, forest in (("packed", trees), ("packed", alone), ("padded", trees)):
            batch = collate([(None, forest)], layout=cast(Any, layout))
            found = sequence_logps(backbone, batch)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def live_bytes() -> int:
    """Of all tensors that Python can reach, each storage once."""
    gc.collect()
    kinds = (Tensor, torch.nn.Parameter)  # not the fake ones that compiled tests leave behind
    tensors = [item for item in gc.get_objects() if type(item) in kinds]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_iterates_take_no_memory_but_their_own(llama: Path) -> None:
    """Ten iterations of policy and opponents, with all earlier iterates kept, or the last alone."""
    adapter = sum(t.nbytes for t in load_file(llama / POLICY / WEIGHTS).values())
    trees = make_trees(4, 1)

    def play(history: int) -> list[int]:
        backbone = load(llama)
        sizes: list[int] = []
        for t in range(10):
            backbone.load_adapter(f"iterate-{t}", llama / PREVIOUS)
            if t >= history:
                backbone.remove_adapter(f"iterate-{t - history}")
            kept = [f"iterate-{k}" for k in range(max(0, t + 1 - history), t + 1)]
            backbone.load_adapter(POLICY, llama / POLICY)
            batch = collate([(POLICY, trees)], layout="packed")
            groups = [(name, trees) for name in (*kept, None)]
            beside = collate(groups, layout="packed")
            policy, frozen = backbone.train()(batch, beside)
            (policy.sum() + frozen.sum()).backward()
            del policy, frozen, batch, beside
            backbone.remove_adapter(POLICY)
            if t in (0, 5, 9):
                sizes.append(live_bytes())
        return sizes

    last = play(history=1)
    every = play(history=10)
    assert max(last) == min(last)
    assert [more - less for more, less in zip(every, last, strict=True)] == [
        t * adapter for t in (0, 5, 9)
    ]
