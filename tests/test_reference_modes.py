"""The reference cached, online or in the policy's own pass: the same numbers at another price."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import helpers
import pytest
import torch
from test_backbone import PREVIOUS, load, make_folder, make_trees, policy_gradients, relative
from test_resume import finish, settings
from torch import Tensor

from alphaspin.config import Config
from alphaspin.losses.dpo import DPO
from alphaspin.losses.reference import mixture_reference
from alphaspin.methods.reference import choose_mode
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import collate
from alphaspin.model.distributed import Team
from alphaspin.model.routing import POLICY
from alphaspin.model.scoring import OnlineReference, ReferenceCache, score
from alphaspin.model.settings import LoraConfig
from alphaspin.model.tree import Tree
from alphaspin.training.example import Example
from alphaspin.training.settings import TrainConfig
from alphaspin.training.trainer import Job, accumulate_gradients

ALPHA = 0.7
POLICIES = (PREVIOUS, None)
TRAIN = TrainConfig(batch_size=6, accumulation=2)


def mix(*logps: Tensor) -> Tensor:
    return mixture_reference(logps[0], logps[1], alpha=ALPHA)


def online(mode: str) -> OnlineReference:
    return OnlineReference(POLICIES, mix, joint=mode == "joint")


def pairs(seed: int) -> list[Tree]:
    trees = [tree for tree in make_trees(18, seed) if len(tree.responses) > 1]
    return [Tree(tree.prompt, tree.responses[:2]) for tree in trees][:6]


def gradients(
    backbone: Backbone, trees: Sequence[Tree], mode: str, config: TrainConfig = TRAIN
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of one batch."""
    references: list[tuple[float, ...]] = [()] * len(trees)
    if mode == "cached":
        cache = ReferenceCache()
        score(backbone, cache, POLICIES, trees, TRAIN.batch_size)
        ids = [backbone.adapter_ids[policy] for policy in POLICIES]
        logps = [torch.tensor([cache.lookup(i, tree) for tree in trees]) for i in ids]
        references = [tuple(row) for row in mix(*logps).tolist()]
    job = Job(
        objective=lambda policy, reference, lengths: DPO(beta=(0.3,))(
            policy, reference, lengths, 0
        ),
        config=config,
        beta=0.3,
        iteration=0,
        seed=0,
        stage="test",
        checkpoints=Path("unused"),
        online=None if mode == "cached" else online(mode),
    )
    for parameter in backbone.policy_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    examples = [Example(t, r) for t, r in zip(trees, references, strict=True)]
    values = accumulate_gradients(Team(backbone.device), backbone, examples, job, 0)
    return values, policy_gradients(backbone)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen3"])
def test_all_modes_agree(family: str, checkpointing: bool, tmp_path: Path) -> None:
    """Loss, metrics and gradients, in training mode with dropout on the policy alone."""
    folder = make_folder(tmp_path, family, LoraConfig(r=4, alpha=6, dropout=0.3))
    backbone = load(folder, POLICY, PREVIOUS)
    if checkpointing:
        backbone.enable_activation_checkpointing()
    trees = pairs(3)
    expected, expected_gradients = gradients(backbone, trees, "cached")
    assert abs(expected["rewards/margins"]) > 1e-2
    for mode in ("online", "joint"):
        found, found_gradients = gradients(backbone, trees, mode)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-5), mode
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6), mode
        assert relative(found_gradients, expected_gradients) < 2e-6, mode


@pytest.mark.parametrize("mode", ["cached", "joint"])
def test_what_the_gradient_may_leave_out(mode: str, tmp_path: Path) -> None:
    """Losses stay as they are, what was left out is told, and at a tiny ε that is nothing."""
    backbone = load(make_folder(tmp_path, "llama", LoraConfig(r=4, alpha=6)), POLICY, PREVIOUS)
    trees = pairs(3)
    expected, exact = gradients(backbone, trees, mode)
    assert "skipped_mass" not in expected

    def skipping(epsilon: float) -> tuple[float, dict[str, float], dict[str, Tensor]]:
        config = TRAIN.model_copy(update={"skip_below": epsilon})
        values, found = gradients(backbone, trees, mode, config)
        return values.pop("skipped_mass"), values, found

    mass, values, found = skipping(1e-30)
    assert (mass, values) == (0, expected) and relative(found, exact) == 0
    mass, values, found = skipping(0.5)
    assert values == expected
    assert 0.1 < mass <= 1 and relative(found, exact) > 0.01


def held(run: Callable[[], Any]) -> int:
    """Bytes that a graph holds on to, each storage once."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive = run()  # nothing may be freed and its address used again meanwhile
    del alive
    return sum(storages.values())


def test_reference_tokens_keep_no_activations(tmp_path: Path) -> None:
    """The graph of a joint pass is that of the policy alone, but for the final norm's inputs."""
    backbone = load(make_folder(tmp_path, "llama"), POLICY, PREVIOUS).train()
    trees = make_trees(12, 1)
    policy = collate([(POLICY, trees)], layout="packed")
    frozen = collate([(name, trees) for name in POLICIES], layout="packed")
    alone = held(lambda: backbone(policy))
    joint = held(lambda: backbone(policy, frozen))
    one_state = 4 * 32 * frozen.input_ids.numel()
    assert alone > 20 * 4 * 32 * policy.input_ids.numel()
    assert joint - alone < 2 * one_state


@pytest.mark.parametrize("mode", ["cached", "online", "joint"])
def test_tokens_that_each_mode_computes(mode: str, tmp_path: Path) -> None:
    """A step's forward passes in units of the policy's: 1 and, for the mixture, 2 without a graph.

    Nothing of the reference is in the backward pass, and `joint` visits each layer once.
    """
    backbone = load(make_folder(tmp_path, "llama"), POLICY, PREVIOUS)
    trees = pairs(3)
    size = collate([(POLICY, trees)], layout="packed").input_ids.numel()
    gradients(backbone, trees, mode)
    seen = {"layers": 0, "forward": 0, "backward": 0}
    first = cast(Any, backbone.decoder).layers[0]
    down = first.mlp.down_proj

    def count_backward(grad: Tensor) -> None:
        seen["backward"] += grad.numel() // grad.shape[-1]

    def count(module: Any, inputs: Any, output: Tensor) -> None:
        seen["forward"] += output.numel() // output.shape[-1]
        if output.requires_grad:
            output.register_hook(count_backward)

    def visit(*_: Any) -> None:
        seen["layers"] += 1

    down.register_forward_hook(count)
    first.register_forward_hook(visit)
    gradients(backbone, trees, mode)
    parts = TRAIN.accumulation
    if mode == "cached":  # the pass of the cache is counted too: one of all six pairs
        assert seen == {"layers": parts + 1, "forward": 3 * size, "backward": size}
    else:
        visits = parts * (1 if mode == "joint" else 2)
        assert seen == {"layers": visits, "forward": 3 * size, "backward": size}


def test_auto_chooses_the_cheapest() -> None:
    def choose(sharded: bool = False, joint: bool = True, **train: Any) -> str:
        config = TrainConfig(batch_size=10, **train)
        return choose_mode("auto", config, 100, sharded=sharded, joint=joint)[0]

    assert choose() == choose(epochs=3) == choose(epochs=3, sharded=True) == "cached"
    assert choose(max_steps=10) == "cached"
    assert choose(max_steps=9) == "online"
    assert choose(max_steps=9, sharded=True) == choose(sharded=True) == "joint"
    assert choose(max_steps=9, quantization="nf4") == "joint"
    assert choose(quantization="nf4") == choose(epochs=3, quantization="nf4") == "cached"
    for base in ({"sharded": True}, {"quantization": "nf4"}):
        assert choose(max_steps=9, joint=False, **base) == "online"
    assert choose(sharded=True, joint=False) == "cached"


def test_joint_needs_packed_rows() -> None:
    with pytest.raises(ValueError, match=r"reference\.mode = joint needs train\.layout = packed"):
        Config.model_validate({"reference": {"mode": "joint"}, "train": {"layout": "padded"}})


def test_runs_of_all_modes_agree_and_resume(tmp_path: Path) -> None:
    """Same losses to 1e-6; killed in the second iteration's training, the same bits."""
    helpers.save_model(tmp_path / "model")
    helpers.write_rows(tmp_path / "data.jsonl", helpers.arithmetic(20))

    def play(name: str, mode: str, **keywords: Any) -> int:
        changes = {"reference.mode": mode, "selfplay.history": "1", "control": "none"}
        changes |= {"selfplay.prompts": "6", "train.batch_size": "3", "train.accumulation": "1"}
        arguments = settings(tmp_path, tmp_path / name, **changes)
        return finish(arguments, tmp_path / f"{name}.log", **keywords)

    def losses(name: str) -> list[float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [r["loss"] for r in map(json.loads, lines) if "loss" in r]

    assert play("cached", "cached") == 0
    for mode in ("online", "joint"):
        assert play(mode, mode) == 0
        assert losses(mode) == pytest.approx(losses("cached"), rel=1e-6)
        assert len(losses(mode)) == 2 + 4  # with mixing, the second iteration has twice the pairs
        assert not list((tmp_path / mode).rglob("reference"))
        assert play(f"killed-{mode}", mode, event=("training", 4)) < 0
        assert play(f"killed-{mode}", mode) == 0
        assert adapters(tmp_path / f"killed-{mode}") == adapters(tmp_path / mode)


def adapters(run: Path) -> list[bytes]:
    found = sorted(run.glob("iterations/*/adapter/*.safetensors"))
    assert len(found) == 2
    return [path.read_bytes() for path in found]
