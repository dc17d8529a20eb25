"""`patch_model`: a transformers model's own loss and gradients, without logits; on a GPU if any."""

import copy
import functools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import helpers
import pytest
import torch
from alphaspin_kernels import patch_model
from implementations import GPU, generator
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {},  # a cap
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.4},
    "phi": {},  # a bias
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "num_attention_heads": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0},  # a projection below
}


@pytest.fixture(autouse=True, scope="module")
def on_the_device() -> Iterator[None]:
    default = torch.get_default_device()
    torch.set_default_device("cuda" if GPU else "cpu")
    yield
    torch.set_default_device(default)


def batch(vocabulary: int = 300) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, vocabulary, (3, 11), generator=generator(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: Any, **inputs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    named = model.named_parameters()
    return outputs, {k: p.grad.clone() for k, p in named if p.grad is not None}


def assert_same(model: Any, tolerance: float = 1e-4, **options: Any) -> None:
    inputs = batch() | options
    expected, gradients = step(model, **inputs)
    with patch_model(model):
        found, mine = step(model, **inputs)
    assert expected.logits is not None and found.logits is None
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
    assert mine.keys() == gradients.keys()
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, gradient in gradients.items():
        assert (mine[name] - gradient).abs().max() < tolerance * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_of_families(family: str) -> None:
    model = helpers.make_model(family, **FAMILIES[family]).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert_same(model)
    assert_same(model, num_items_in_batch=torch.tensor(40))


def test_adapters_and_checkpointed_activations() -> None:
    model = helpers.make_model("llama")
    model.gradient_checkpointing_enable()
    peft: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    peft.enable_input_require_grads()
    assert_same(peft.train())


test_adapters_and_checkpointed_activations = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_:FutureWarning"
)(test_adapters_and_checkpointed_activations)


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16(autocast: bool) -> None:
    model = helpers.make_model("llama").train()
    model = model if autocast else model.bfloat16()
    device = torch.get_default_device().type
    with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
        assert_same(model, 0.03)


def test_everything_else_is_the_models_own() -> None:
    """Evaluation, generation, caches, hidden states, parts of the logits, tuples, positions."""
    model: Any = helpers.make_model("llama")
    inputs = batch()
    with patch_model(model):
        with torch.no_grad():
            evaluated = model.eval()(**inputs)
            assert evaluated.logits.shape == (3, 11, 300)
        ids = inputs["input_ids"][:1]
        text = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        model.train()
        assert model(input_ids=ids).logits.shape == (1, 11, 300)
        assert model(**inputs, logits_to_keep=0).logits is None
        assert isinstance(model(**inputs, return_dict=False), tuple)
        rich = model(**inputs, use_cache=True, output_hidden_states=True)
        assert rich.past_key_values.get_seq_length() == 11 and len(rich.hidden_states) == 3
        shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        own = model(**inputs, shift_labels=shifted)
        torch.testing.assert_close(own.loss, rich.loss)
        positional = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])
        torch.testing.assert_close(positional.loss, rich.loss)
    model.eval()
    torch.testing.assert_close(model(**inputs).loss, evaluated.loss)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), text)


def test_copies_follow_and_undo_restores(tmp_path: Any) -> None:
    """A copy computes with its own weights, which a bound method would not."""
    model: Any = helpers.make_model("llama").train()
    own = type(model)
    undo = patch_model(model)
    patch_model(model).close()  # once more does nothing
    assert type(model) is not own and type(model).__name__ == own.__name__
    other = copy.deepcopy(model)
    other.lm_head.weight.data *= 2
    assert other(**batch()).logits is None
    assert other(**batch()).loss.item() != pytest.approx(model(**batch()).loss.item())
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["LlamaForCausalLM"]
    undo.close()
    assert type(model) is own and model(**batch()).logits is not None


def test_what_is_refused() -> None:
    model: Any = helpers.make_model("llama")
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="leave it out of PEFT's target_modules"):
        patch_model(peft)

    model = helpers.make_model("llama")
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: head(hidden).sinh()
    with pytest.raises(ValueError, match=r"not softcap\(c \(W h \+ b\)\)"):
        patch_model(model)

    model = helpers.make_model("llama")
    model.loss_function = lambda *_, **__: torch.ones(())
    with pytest.raises(ValueError, match="loss of its own"):
        patch_model(model)

    # BART scores each token under its own position.
    model = helpers.make_model("bart", d_model=32, decoder_ffn_dim=48, decoder_attention_heads=4)
    with pytest.raises(ValueError, match="loss of its own"):
        patch_model(model)

    model = helpers.make_model("llama")
    model.forward = functools.partial(model.forward)
    with pytest.raises(ValueError, match="patched already"):
        patch_model(model)


def test_an_adapter_put_on_the_head_later_is_refused_too() -> None:
    model: Any = helpers.make_model("llama").train()
    patch_model(model)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="leave it out of PEFT's target_modules"):
        peft(**batch())


def test_experts_keep_their_auxiliary_loss() -> None:
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=300,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        output_router_logits=True,
    )
    model: Any = AutoModelForCausalLM.from_config(config).train()
    expected = model(**batch())
    with patch_model(model):
        found = model(**batch())
    assert found.aux_loss is not None
    # A GPU adds the experts' results in any order.
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6 if GPU else 0, abs=0)
