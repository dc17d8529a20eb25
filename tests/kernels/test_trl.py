"""`patch_trl`: what TRL's trainers compute with it and without it, on the same batch.

On a GPU if there is one.
"""

import functools
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from alphaspin_kernels import patch_trl
from alphaspin_kernels.linear_logprob.probe import check_fused_head
from alphaspin_kernels.linear_logprob.trl import _Patched
from datasets import Dataset
from implementations import GPU
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

pytest.importorskip("trl")

import trl
import trl.trainer.utils as utils

DEVICE = "cuda" if GPU else "cpu"
ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
WORDS = ["what is", " yes", " no", " the largest number", " it is 34", " 12 and 34"]
COMMON: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": not GPU,
    "bf16": False,
    "activation_checkpointing": False,
}


def rows(count: int = 4) -> Dataset:
    """Pairs of unlike lengths."""
    random = np.random.default_rng(0)

    def text() -> str:
        return "".join(random.choice(WORDS, random.integers(1, 4)))

    return Dataset.from_list(
        [
            {"prompt": text(), "chosen": text(), "rejected": text(), "label": bool(i % 2)}
            for i in range(count)
        ]
    )


def model_of(folder: Path, family: str, lora: bool, **changes: Any) -> Any:
    """Loaded from a folder, where TRL finds the reference again."""
    helpers.save_model(folder / "model", family, **changes)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model")
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return model


def nudge(trainer: Any) -> Any:
    """Move the policy away from the reference."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and ".ref." not in name:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.data += (0.2 if "lora" in name else 0.02) * noise
    return trainer


def dpo(folder: Path, model: Any, **settings: Any) -> Any:
    args = trl.DPOConfig(output_dir=str(folder), **(COMMON | settings))
    data = rows().remove_columns("label")
    return trl.DPOTrainer(
        model=model, args=args, train_dataset=data, processing_class=helpers.make_tokenizer()
    )


def kto(folder: Path, model: Any, **settings: Any) -> Any:
    data = rows().remove_columns("rejected").rename_column("chosen", "completion")
    args = trl.KTOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        **(COMMON | settings),
    )
    return trl.KTOTrainer(
        model=model, args=args, train_dataset=data, processing_class=helpers.make_tokenizer()
    )


def cpo(folder: Path, model: Any, **settings: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):
        from trl.experimental.cpo import CPOConfig, CPOTrainer
    args = CPOConfig(output_dir=str(folder), **(COMMON | settings))
    data = rows().remove_columns("label")
    return CPOTrainer(
        model=model, args=args, train_dataset=data, processing_class=helpers.make_tokenizer()
    )


def grpo(folder: Path, model: Any, **settings: Any) -> Any:
    args = trl.GRPOConfig(
        output_dir=str(folder),
        num_generations=2,
        per_device_train_batch_size=4,
        max_completion_length=6,
        temperature=0.7,
        beta=0.1,
        **(COMMON | settings),
    )
    data = rows().remove_columns(["chosen", "rejected", "label"])
    return trl.GRPOTrainer(
        model=model,
        args=args,
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        train_dataset=data,
        processing_class=helpers.make_tokenizer(),
    )


def batch_of(trainer: Any) -> Any:
    return next(iter(trainer.get_train_dataloader()))


def step(trainer: Any, batch: Any) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Loss, gradients and what is logged of one batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    store = getattr(trainer, "_metrics", None) or trainer._stored_metrics
    store["train"].clear()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }
    return loss.item(), gradients, {k: v[-1] for k, v in store["train"].items()}


def assert_same(
    trainer: Any, batch: Any, tolerance: float = 1e-4, skip: str = "num_tokens"
) -> None:
    expected = step(trainer, batch)
    with patch_trl():
        found = step(trainer, batch)
    compare(found, expected, tolerance, skip)


def compare(found: Any, expected: Any, tolerance: float = 1e-4, skip: str = "num_tokens") -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance, abs=tolerance)
    assert found[1].keys() == expected[1].keys()
    largest = max(g.abs().max().item() for g in expected[1].values())
    assert largest > 1e-4
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max().item() < tolerance * largest, name
    for name, value in expected[2].items():
        if skip not in name:
            assert found[2][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-tied": {"family": "llama", "tie_word_embeddings": True},
    "softcap": {"family": "gemma2"},
    "scale": {"family": "granite", "logits_scaling": 3.0},
    "multiplied": {"family": "cohere", "logit_scale": 0.4},
    "bias": {"family": "phi"},
}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", CASES)
def test_dpo(tmp_path: Path, name: str, lora: bool) -> None:
    model = model_of(tmp_path, lora=lora, **CASES[name])
    trainer = nudge(dpo(tmp_path, model))
    assert_same(trainer, batch_of(trainer))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_kto(tmp_path: Path, lora: bool) -> None:
    trainer = nudge(kto(tmp_path, model_of(tmp_path, "llama", lora)))
    assert_same(trainer, batch_of(trainer))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"entropy_coef": 0.2}, {"top_entropy_quantile": 0.5}, {"cast_lm_head_to_fp32": True}],
    ids=lambda settings: "".join(settings) or "plain",
)
def test_grpo(tmp_path: Path, lora: bool, settings: dict[str, Any]) -> None:
    """A temperature, the reference by adapters disabled or a model, and uses of the entropy."""
    trainer = nudge(grpo(tmp_path, model_of(tmp_path, "llama", lora), **settings))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as the training loop has it
    batch = trainer._prepare_inputs(batch_of(trainer))
    assert batch["advantages"].abs().max() > 0
    if "top_entropy_quantile" in settings:
        apart(trainer, batch)
    assert_same(trainer, batch)


def apart(trainer: Any, batch: Any) -> None:
    """Set the quantile between two entropies that rounding cannot exchange.

    What is sampled differs between CPUs, and completions of one prompt begin with equal entropies.
    """
    seen: list[torch.Tensor] = []
    original = trainer.get_high_entropy_mask

    def recording(entropies: torch.Tensor, mask: torch.Tensor, threshold: float) -> torch.Tensor:
        seen.append(entropies[mask.bool()])
        return original(entropies, mask, threshold)

    trainer.get_high_entropy_mask = recording
    step(trainer, batch)
    trainer.get_high_entropy_mask = original
    sorted_N = seen[0].sort().values
    gaps = sorted_N.diff()
    widest = int(gaps.argmax())
    assert gaps[widest] > 1e-3
    trainer.top_entropy_quantile = 1 - (widest + 0.5) / (len(sorted_N) - 1)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"cpo_alpha": 0.0, "loss_type": "simpo", "simpo_gamma": 0.3}, {"loss_type": "ipo"}],
    ids=["cpo", "simpo", "ipo"],
)
def test_cpo(tmp_path: Path, lora: bool, settings: dict[str, Any]) -> None:
    plain = nudge(cpo(tmp_path, model_of(tmp_path, "llama", lora), **settings))
    expected = step(plain, batch_of(plain))
    with patch_trl():
        trainer = nudge(cpo(tmp_path, model_of(tmp_path, "llama", lora), **settings))
        found = step(trainer, batch_of(trainer))
    assert trainer._alphaspin
    compare(found, expected, skip="logits/")


# TRL calls transformers' old name; a TRL that calls the new one.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_run_trains_evaluates_and_generates(tmp_path: Path, lora: bool) -> None:
    """Accelerate's wrapping, checkpointed activations, evaluation; the same weights at the end."""
    weights = []
    for patched in (False, True):
        folder = tmp_path / str(patched)
        folder.mkdir()
        with patch_trl() if patched else nullcontext():
            settings = {"activation_checkpointing": True, "num_train_epochs": 2, "seed": 1}
            trainer = dpo(folder, model_of(folder, "llama", lora), learning_rate=0.01, **settings)
            trainer.train()
            metrics = trainer.evaluate(rows().remove_columns("label"))
            ids = torch.tensor([[5, 6, 7]], device=trainer.model.device)
            text = trainer.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
            assert trainer.model(input_ids=ids).logits.shape == (1, 3, 300)
        trained = {k: v.clone() for k, v in trainer.model.named_parameters() if v.requires_grad}
        weights.append((trained, metrics["eval_loss"], text))
    for name, weight in weights[0][0].items():
        torch.testing.assert_close(weights[1][0][name], weight, rtol=1e-3, atol=1e-4)
    assert weights[1][1] == pytest.approx(weights[0][1], rel=1e-4)
    assert torch.equal(weights[0][2], weights[1][2])


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16"])
def test_bf16(tmp_path: Path, lora: bool, autocast: bool) -> None:
    """Weights in fp32 under autocast, or in bf16: no further off fp32 than TRL's own bf16."""
    model = model_of(tmp_path, "llama", lora)
    trainer = nudge(dpo(tmp_path, model))
    batch = batch_of(trainer)
    exact = step(trainer, batch)
    context = torch.autocast(DEVICE, torch.bfloat16) if autocast else nullcontext()
    if not autocast:
        trainer.model.bfloat16()
        trainer.ref_model = trainer.ref_model and trainer.ref_model.bfloat16()
    with context:
        theirs = step(trainer, batch)
        with patch_trl():
            ours = step(trainer, batch)

    def off(found: Any) -> float:
        pairs = [(found[1][name].float() - g, g) for name, g in exact[1].items()]
        return sum(d.square().sum().item() for d, _ in pairs) / sum(
            g.square().sum().item() for _, g in pairs
        )

    assert abs(ours[0] - exact[0]) <= abs(theirs[0] - exact[0]) + 0.02
    assert off(ours) <= 1.5 * off(theirs) + 1e-3
    assert {n: g.dtype for n, g in ours[1].items()} == {n: g.dtype for n, g in theirs[1].items()}


def test_wpo_and_rows_without_labels(tmp_path: Path) -> None:
    """log_sum_sq_probs; and a batch in which no token has a label still has a gradient of zero."""
    model = model_of(tmp_path, "llama", True)
    trainer = nudge(dpo(tmp_path, model, use_weighting=True))
    batch = batch_of(trainer)
    assert_same(trainer, batch)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    with patch_trl():
        loss, gradients, _ = step(trainer, batch)
    assert loss == pytest.approx(np.log(2))
    assert gradients and not any(g.any() for g in gradients.values())


def test_undo_restores_trl_and_twice_is_once() -> None:
    names = ("_ChunkedLogProbFunction", "_use_triton", "add_fused_lm_head")
    before = [getattr(utils, name) for name in names]
    dpo_trainer = sys.modules["trl.trainer.dpo_trainer"]
    undo = patch_trl()
    assert dpo_trainer.add_fused_lm_head is utils.add_fused_lm_head is not before[2]
    with patch_trl():
        pass
    assert utils._ChunkedLogProbFunction is not before[0]
    undo.close()
    assert [getattr(utils, name) for name in names] == before
    assert dpo_trainer.add_fused_lm_head is before[2]


def test_another_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def forward(ctx: Any, hidden: Any) -> None: ...

    for value in (Other, None):
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", value)
        with pytest.raises(ImportError, match=r"pip install trl==1\.16"):
            patch_trl()


def odd(model: Any) -> Any:
    """A family whose logits are not softcap(c (W h + b))."""
    forward = model.forward

    @functools.wraps(forward)
    def other(*args: Any, **options: Any) -> Any:
        outputs = forward(*args, **options)
        outputs.logits = outputs.logits.sinh() if outputs.logits is not None else None
        return outputs

    model.forward = other
    return model


def test_logits_of_another_form_are_refused(tmp_path: Path) -> None:
    with patch_trl():
        with pytest.raises(ValueError, match="TRL's fused head is wrong for LlamaForCausalLM"):
            dpo(tmp_path, odd(model_of(tmp_path, "llama", False)))
        with pytest.warns(UserWarning, match="CPOTrainer builds logits"):
            trainer = cpo(tmp_path, odd(model_of(tmp_path, "llama", False)))
        patched = step(trainer, batch := batch_of(trainer))
    compare(patched, step(trainer, batch))


def test_an_adapter_on_the_head(tmp_path: Path) -> None:
    """CPO trains it, by its own logits."""
    lora = LoraConfig(r=4, target_modules=["lm_head"])
    model = get_peft_model(model_of(tmp_path, "llama", False), lora)
    with patch_trl(), pytest.warns(UserWarning, match="CPOTrainer builds logits"):
        trainer = cpo(tmp_path, model)
        _, gradients, _ = step(trainer, batch_of(trainer))
    assert any("lm_head.lora_B" in name for name in gradients)


def test_a_head_of_the_adapters_own(tmp_path: Path) -> None:
    """modules_to_save: the policy's head is trained, the reference's is the base's."""
    model = model_of(tmp_path, "llama", False)
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = nudge(dpo(tmp_path, get_peft_model(model, lora)))
    batch = batch_of(trainer)
    assert_same(trainer, batch)
    assert any("lm_head" in name for name in step(trainer, batch)[1])


def test_checking_a_head_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = model_of(tmp_path, "llama", False, tie_word_embeddings=True, attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    utils.add_fused_lm_head(model, temperature=0.7)
    check_fused_head(model, 0.7)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(37, 2500, 16), (1100, 33, 8), (1, 1, 4), (0, 7, 4)])
def test_metrics_equal_their_definition(
    shape: tuple[int, int, int], frozen: bool, with_bias: bool, softcap: float | None, dtype: Any
) -> None:
    rows, vocabulary, width = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    hidden = random(rows, width).requires_grad_()
    weight = random(vocabulary, width).requires_grad_(not frozen)
    bias = random(vocabulary).requires_grad_(not frozen) if with_bias else None
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(DEVICE)
    scale, temperature = 0.7, 1.3
    apply = _Patched(utils._ChunkedLogProbFunction, utils).apply
    options = (temperature, 32768, softcap, scale, ALL)
    logp, entropy, *rest = apply(hidden, weight, bias, targets, *options)
    grads = [torch.randn(rows, generator=generator).to(DEVICE) for _ in range(2)]
    leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    found = torch.autograd.grad([logp, entropy], leaves, [g.to(logp.dtype) for g in grads])

    exact = [None if x is None else x.detach().double() for x in (hidden, weight, bias)]
    again = [x.requires_grad_() for x in exact if x is not None][: len(leaves)]
    z = scale * torch.nn.functional.linear(*exact)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    lp_NV = (z / temperature).log_softmax(-1)
    lp_N = lp_NV.gather(1, targets[:, None])[:, 0]
    entropy_N = -(lp_NV.exp() * lp_NV).sum(1)
    rounding = 1e-10 if dtype == torch.float64 else 2e-5
    for mine, value in zip(
        (logp, entropy, *rest[:2]),
        (lp_N, entropy_N, (2 * lp_NV).logsumexp(1), (z / temperature).mean(1)),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), value, rtol=rounding, atol=10 * rounding)
    assert torch.equal(rest[2], z.argmax(1) == targets) or dtype == torch.bfloat16
    expected = torch.autograd.grad([lp_N, entropy_N], again, [g.double() for g in grads])
    coarse = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    for mine, value in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        size = value.abs().max().item() if rows else 0.0
        torch.testing.assert_close(mine.double(), value, rtol=0, atol=coarse * size + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_metrics_from_the_gradient_equal_those_from_tiles(dtype: Any) -> None:
    """Peaked and flat rows, ties, and targets on both sides of the mean."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 16, generator=generator) * torch.logspace(-2, 1, 500)[:, None]
    weight = torch.randn(300, 16, generator=generator)
    weight[7] = weight[3]  # equal logits: the first of them counts
    hidden, weight = hidden.to(DEVICE, dtype).requires_grad_(), weight.to(DEVICE, dtype)
    targets = (hidden.float() @ weight.float().T).argmax(1)
    targets[::3] = torch.randint(300, (len(targets[::3]),), generator=generator).to(DEVICE)
    targets[(targets == 3) & (torch.arange(500, device=DEVICE) % 2 == 0)] = 7
    apply = _Patched(utils._ChunkedLogProbFunction, utils).apply
    wanted = ("entropy", "mean_logits", "is_top1")
    _, *fast = apply(hidden, weight, None, targets, 0.8, 0, None, 1.0, wanted)
    with torch.no_grad():
        _, *slow = apply(hidden, weight, None, targets, 0.8, 0, None, 1.0, wanted)
    loose = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(fast[0], slow[0], rtol=loose, atol=loose)
    torch.testing.assert_close(fast[2], slow[2], rtol=1e-5, atol=1e-4)
    assert torch.equal(fast[3], slow[3]) and 0.2 < fast[3].float().mean() < 0.9
