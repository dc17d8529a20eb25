"""The trainer's own gradient step against the `DPOTrainer` of the installed TRL, fp32, on the CPU.

Both sides read the same files: a base, the adapter of the previous iterate (the reference) and
another adapter (the policy). TRL runs its own collator and `compute_loss`; ours is
`trainer.accumulate_gradients` with the loss of a pair, i.e. what `alphaspin-train` does at α = 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import helpers
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from alphaspin.losses.base import Loss
from alphaspin.losses.dpo import DPO
from alphaspin.losses.hinge import Hinge
from alphaspin.losses.ipo import IPO
from alphaspin.losses.slic import SLiC
from alphaspin.model.backbone import WEIGHTS, Backbone
from alphaspin.model.distributed import Team
from alphaspin.model.load import load_base
from alphaspin.model.routing import POLICY
from alphaspin.model.scoring import ReferenceCache, score
from alphaspin.model.settings import LoraConfig
from alphaspin.model.tree import Tree
from alphaspin.training.example import Example
from alphaspin.training.settings import TrainConfig
from alphaspin.training.trainer import Job, accumulate_gradients

DPOConfig, DPOTrainer = (
    getattr(pytest.importorskip("trl"), name) for name in ("DPOConfig", "DPOTrainer")
)

PREVIOUS = "previous"
LORA = LoraConfig(r=4, alpha=8)
EPSILON = 0.2

LOSSES: dict[str, tuple[Loss, dict[str, Any]]] = {
    "dpo": (DPO(beta=(0.3,)), {"beta": 0.3, "loss_type": ["sigmoid"]}),
    # TRL's `sigmoid` pays no heed to its label_smoothing. With S = -log σ(βΔ), F = -log σ(-βΔ), its
    # `robust` is ((1-ε) S - ε F) / (1-2ε), so that conservative DPO, (1-ε) S + ε F, is
    # 2 (1-ε) S - (1-2ε) robust: both terms are TRL's, weighted by TRL.
    "dpo-smoothed": (
        DPO(beta=(0.3,), label_smoothing=EPSILON),
        {
            "beta": 0.3,
            "label_smoothing": EPSILON,
            "loss_type": ["sigmoid", "robust"],
            "loss_weights": [2 * (1 - EPSILON), -(1 - 2 * EPSILON)],
        },
    ),
    "hinge": (Hinge(beta=(0.2,)), {"beta": 0.2, "loss_type": ["hinge"]}),
    # TRL averages over tokens, and its β is the paper's τ.
    "ipo": (
        IPO(ipo_length="mean", ipo_tau=0.4),
        {"beta": 0.4, "loss_type": ["ipo"]},
    ),
}


def make_trees(count: int, seed: int, longest: int = 24) -> list[Tree]:
    """Pairs whose lengths differ a lot, between examples and within one."""
    random = np.random.default_rng(seed)
    trees = [
        Tree(
            helpers.tokens(random, 1, 12),
            (helpers.tokens(random, 1, longest), helpers.tokens(random, 1, longest)),
        )
        for _ in range(count)
    ]
    prompt = helpers.tokens(random, 30, 30)
    extremes = (helpers.tokens(random, 1, 1), helpers.tokens(random, 2 * longest, 2 * longest))
    return [Tree(prompt, extremes), *trees[1:]]


def write_adapters(folder: Path) -> None:
    """Two nonzero adapters, each as the package saves them."""
    backbone = load(folder)
    for name, seed in ((POLICY, 1), (PREVIOUS, 2)):
        backbone.add_adapter(name, LORA, seed=seed, iteration=0)
        generator = torch.Generator().manual_seed(seed)
        state = backbone.adapter_state(name)
        moved = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
        backbone.set_adapter_state(name, moved)
        (folder / name).mkdir()
        backbone.save_adapter(name, folder / name)


def load(folder: Path, *adapters: str) -> Backbone:
    backbone, _ = load_base(str(folder), dtype="fp32", device=torch.device("cpu"))
    for name in adapters:
        backbone.load_adapter(name, folder / name)
    return backbone


def make_folder(folder: Path, family: str) -> Path:
    helpers.save_model(folder, family)
    write_adapters(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("llama"), "llama")


@dataclass
class Step:
    """What one call of `accumulate_gradients` did."""

    metrics: dict[str, float]
    gradients: dict[str, Tensor]


def references(
    backbone: Backbone, policy: str | None, trees: Sequence[Tree], config: TrainConfig
) -> list[tuple[float, ...]]:
    """lp_ref as the self-play loop computes it: through `score` and its cache."""
    cache = ReferenceCache()
    score(backbone, cache, [policy], trees, config.batch_size)
    identity = backbone.adapter_ids[policy]
    return [tuple(cache.lookup(identity, tree)) for tree in trees]


def step(backbone: Backbone, examples: Sequence[Example], loss: Loss, config: TrainConfig) -> Step:
    """Loss and gradients of one batch, by the package's own code."""

    def objective(policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        return loss(policy, reference, lengths, 0)

    job = Job(
        objective=objective,
        config=config,
        beta=loss.ipo_tau if loss.kind == "ipo" else loss.beta[0],
        iteration=0,
        seed=0,
        stage="test",
        checkpoints=Path("unused"),
    )
    parameters = backbone.policy_parameters()
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    metrics = accumulate_gradients(Team(backbone.device), backbone, examples, job, 0)
    gradients = {
        name.removeprefix("model.").replace(f".{POLICY}.", "."): cast(Tensor, p.grad).clone()
        for name, p in parameters.items()
    }
    return Step(metrics, gradients)


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference over all tensors, relative to the largest entry of all."""
    assert found.keys() == expected.keys()
    scale = max(tensor.abs().max().item() for tensor in expected.values())
    assert scale > 1e-4, "gradients that vanish would agree with anything"
    return max((found[key] - expected[key]).abs().max().item() for key in expected) / scale


def dpo_trainer(folder: Path, output: Path, trees: Sequence[Tree], settings: dict[str, Any]) -> Any:
    """TRL's trainer on the same files.

    The previous iterate goes in as the pretrained adapter, of which TRL makes its frozen copy
    `ref`; then the policy's weights take the place of `default`, as training would have it.
    """
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(base, str(folder / PREVIOUS), is_trainable=True)
    args = DPOConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_length=None,
        report_to="none",
        **settings,
    )
    # Text, because DPOTrainer tokenises for itself; the ids that are compared come from `features`.
    text = {"prompt": "what is", "chosen": " yes", "rejected": " no"}
    trainer = DPOTrainer(
        model=peft_model,
        args=args,
        train_dataset=Dataset.from_list([text]),
        processing_class=helpers.make_tokenizer(),
    )
    result = set_peft_model_state_dict(
        trainer.model, load_file(folder / POLICY / WEIGHTS), adapter_name="default"
    )
    assert not result.unexpected_keys
    trainer.model.train()
    return trainer


def features(trees: Sequence[Tree]) -> list[dict[str, list[int]]]:
    """The columns of TRL's prepared dataset."""
    names = ("chosen_ids", "rejected_ids")
    return [
        {"prompt_ids": tree.prompt.tolist()}
        | {n: y.tolist() for n, y in zip(names, tree.responses, strict=True)}
        for tree in trees
    ]


def trl_step(trainer: Any, trees: Sequence[Tree]) -> Step:
    """Loss, logged metrics and the policy's gradients of one batch, by TRL."""
    trainer._metrics["train"].clear()
    trainer.model.zero_grad()
    inputs = trainer.data_collator(features(trees))
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    gradients = {
        name.replace(".default.", "."): cast(Tensor, p.grad).clone()
        for name, p in trainer.model.named_parameters()
        if ".default." in name
    }
    return Step({**metrics, "loss": loss.item()}, gradients)


COMPARED = (
    "loss",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
)


def assert_same_step(ours: Step, theirs: Step) -> None:
    for name in COMPARED:
        assert ours.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-4, abs=1e-4), name
    assert deviation(ours.gradients, theirs.gradients) < 1e-4


def compare_with_trl(folder: Path, output: Path, kind: str) -> None:
    """The whole batch at once, then each pair alone, which shows each sequence's numbers."""
    loss, settings = LOSSES[kind]
    trees = make_trees(8, seed=3)
    backbone = load(folder, POLICY, PREVIOUS)
    config = TrainConfig(batch_size=8, accumulation=2, layout="packed")
    reference = references(backbone, PREVIOUS, trees, config)
    examples = [Example(t, r) for t, r in zip(trees, reference, strict=True)]
    trainer = dpo_trainer(folder, output, trees, settings)

    # TRL's reference is the previous iterate as well, and not a copy of the policy.
    inputs = trainer.data_collator(features(trees))
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, inputs)
    expected = torch.stack([chosen, rejected], 1)
    torch.testing.assert_close(torch.tensor(reference), expected, rtol=1e-5, atol=1e-4)

    assert_same_step(step(backbone, examples, loss, config), trl_step(trainer, trees))
    if kind == "hinge":
        # The batch has pairs on both sides of the kink, or the hinge would go untested.
        losses_B = [step(backbone, [e], loss, config).metrics["loss"] for e in examples]
        assert min(losses_B) == 0 < max(losses_B)
        return
    single = TrainConfig(batch_size=1, layout="padded")
    for tree, example in zip(trees, examples, strict=True):
        assert_same_step(step(backbone, [example], loss, single), trl_step(trainer, [tree]))


@pytest.mark.parametrize("kind", LOSSES)
def test_step_equals_trl(model: Path, tmp_path: Path, kind: str) -> None:
    compare_with_trl(model, tmp_path, kind)


@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_step_equals_trl_in_other_families(tmp_path: Path, family: str) -> None:
    """Soft-capped logits, a tied head and sliding windows go through TRL's fused head too."""
    compare_with_trl(make_folder(tmp_path / "model", family), tmp_path, "dpo")


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_fresh_adapter_starts_at_log_2(model: Path, layout: Any) -> None:
    """Policy = previous = base: the loss is log 2 and the margin 0, bit for bit."""
    backbone = load(model)
    backbone.add_adapter(POLICY, LORA, seed=5, iteration=0)
    trees = make_trees(8, seed=4)
    config = TrainConfig(batch_size=8, accumulation=1, layout=layout)
    reference = references(backbone, None, trees, config)  # one part of 2 x 8: all of them
    examples = [Example(t, r) for t, r in zip(trees, reference, strict=True)]
    done = step(backbone, examples, DPO(beta=(0.3,)), config)
    assert done.metrics["loss"] == torch.tensor(2.0).log().item()
    assert done.metrics["rewards/margins"] == 0
    assert done.metrics["rewards/chosen"] == done.metrics["rewards/rejected"] == 0
    # The gradient is not zero, but for A, whose B is zero.
    for name, gradient in done.gradients.items():
        assert bool(gradient.any()) == (".lora_B." in name), name


def test_a_fresh_adapter_starts_near_log_2_however_the_reference_was_batched(model: Path) -> None:
    backbone = load(model)
    backbone.add_adapter(POLICY, LORA, seed=5, iteration=0)
    trees = make_trees(8, seed=4)
    loss = DPO(beta=(0.1,))
    config = TrainConfig(batch_size=8, accumulation=1, layout="packed")
    for other in (
        TrainConfig(batch_size=1, layout="padded"),
        TrainConfig(batch_size=6, accumulation=2, layout="packed"),
    ):
        reference = references(backbone, None, trees, other)
        examples = [Example(t, r) for t, r in zip(trees, reference, strict=True)]
        done = step(backbone, examples, loss, config)
        assert done.metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
        # Of log-probs around 100 nats fp32 keeps 1e-5, of which β = 0.1 leaves a tenth.
        assert done.metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_do_not_depend_on_splitting_or_layout(model: Path, kind: str) -> None:
    """8 x 1, 4 x 2, 1 x 8, padded and packed.

    In float64, but for the norms, which transformers computes in fp32: rounding is 1e-7 there, and
    2e-6 where all is fp32.
    """
    loss = LOSSES[kind][0]
    backbone = load(model, POLICY, PREVIOUS).double()
    trees = make_trees(8, seed=6)
    one = TrainConfig(batch_size=8, accumulation=1, layout="padded")
    reference = references(backbone, PREVIOUS, trees, one)
    examples = [Example(t, r) for t, r in zip(trees, reference, strict=True)]
    whole = step(backbone, examples, loss, one)
    for layout, accumulation in (
        ("padded", 2),
        ("padded", 8),
        ("packed", 1),
        ("packed", 2),
        ("packed", 8),
        ("packed", 3),  # micro-batches of 3, 3 and 2
    ):
        config = TrainConfig(
            batch_size=8,
            accumulation=accumulation,
            layout=cast(Any, layout),
        )
        split = step(backbone, examples, loss, config)
        assert deviation(split.gradients, whole.gradients) < 1e-6, config
        assert split.metrics == pytest.approx(whole.metrics, rel=1e-6, abs=1e-6)


def test_micro_batches_of_unlike_length_weigh_by_their_pairs(model: Path) -> None:
    """The gradient of a batch is the mean over its pairs, not a mean of means."""
    loss = LOSSES["dpo"][0]
    backbone = load(model, POLICY, PREVIOUS).double()
    trees = make_trees(3, seed=7)
    config = TrainConfig(batch_size=8, accumulation=2, layout="packed")
    reference = references(backbone, PREVIOUS, trees, config)
    examples = [Example(t, r) for t, r in zip(trees, reference, strict=True)]
    single = [step(backbone, [example], loss, config) for example in examples]
    done = step(backbone, examples, loss, config)  # 2 + 1 pairs
    mean = {k: sum(s.gradients[k] for s in single) / 3 for k in done.gradients}
    assert deviation(done.gradients, cast(dict[str, Tensor], mean)) < 1e-6
    assert done.metrics["loss"] == pytest.approx(sum(s.metrics["loss"] for s in single) / 3)


@pytest.mark.parametrize("kind", LOSSES)
def test_equal_pairs_may_be_skipped(model: Path, kind: str) -> None:
    """Loser = winner, left out or computed: the same loss and the same gradient."""
    loss = LOSSES[kind][0]
    assert loss.ignores_equal_pairs()
    backbone = load(model, POLICY, PREVIOUS).double()
    trees = make_trees(8, seed=8)
    equal = {1, 4, 5}
    trees = [
        Tree(tree.prompt, (tree.responses[0],) * 2) if i in equal else tree
        for i, tree in enumerate(trees)
    ]
    config = TrainConfig(batch_size=8, accumulation=2, layout="packed")
    reference = references(backbone, PREVIOUS, trees, config)

    def run(skip: bool) -> Step:
        examples = [
            Example(t, r, informative=not (skip and i in equal))
            for i, (t, r) in enumerate(zip(trees, reference, strict=True))
        ]
        return step(backbone, examples, loss, config)

    skipped, computed = run(True), run(False)
    assert skipped.metrics["pairs/informative"] == pytest.approx(5 / 8)
    assert skipped.metrics["tokens"] < computed.metrics["tokens"]
    assert skipped.metrics["loss"] == pytest.approx(computed.metrics["loss"], rel=1e-6)
    assert deviation(skipped.gradients, computed.gradients) < 1e-6


def test_a_batch_of_equal_pairs_has_their_loss_and_no_gradient(model: Path) -> None:
    backbone = load(model, POLICY)
    tree = make_trees(2, seed=9)[1]
    tree = Tree(tree.prompt, (tree.responses[0],) * 2)
    examples = [Example(tree, (-3.0, -3.0), informative=False)] * 2
    done = step(backbone, examples, DPO(beta=(0.3,)), TrainConfig(batch_size=2))
    assert done.metrics["loss"] == pytest.approx(math.log(2))
    assert not any(gradient.any() for gradient in done.gradients.values())


def test_equal_pairs_are_computed_where_they_have_a_gradient(model: Path) -> None:
    """With the winner's likelihood in the loss an equal pair still teaches."""
    loss = DPO(beta=(0.3,), nll_weight=1.0)
    assert not loss.ignores_equal_pairs()
    assert not SLiC(slic_lambda=0.1).ignores_equal_pairs()
    backbone = load(model, POLICY)
    tree = make_trees(2, seed=9)[1]
    tree = Tree(tree.prompt, (tree.responses[0],) * 2)
    done = step(backbone, [Example(tree, (-3.0, -3.0))], loss, TrainConfig(batch_size=1))
    assert max(gradient.abs().max().item() for gradient in done.gradients.values()) > 1e-3
