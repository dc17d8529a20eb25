"""What responses share is computed once, and every loss keeps its value and its gradient.

Compared in float64, so that little but the fp32 parts of transformers' own code (norms, rotary
tables) is rounded: the largest differences seen are 3e-7, and 1e-14 where there are no such parts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import helpers
import numpy as np
import pytest
import torch
from test_backbone import load, make_folder, plain_logps, plain_model, policy_gradients, relative
from torch import Tensor

from alphaspin.losses import LOSSES
from alphaspin.losses.inpo import inpo
from alphaspin.losses.nash_md import nash_md
from alphaspin.losses.rspo import rspo
from alphaspin.losses.sppo import sppo
from alphaspin.losses.t_spin import t_spin
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import collate
from alphaspin.model.routing import POLICY
from alphaspin.model.scoring import sequence_logps
from alphaspin.model.tree import Tree

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    **{family: {} for family in ("llama", "qwen2", "gemma2")},
    "qwen3_moe": MOE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
WIN = torch.tensor([0.8, 0.3])
FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    **{
        f"{name}{'-nll' if more else ''}": lambda p, r, n, kind=kind, more=more: kind(**more)(
            p, r, n, 0
        )
        for name, kind in LOSSES.items()
        for more in cast("list[dict[str, Any]]", [{}, {"nll_weight": 0.5}])
    },
    "ipo-mean": lambda p, r, n: LOSSES["ipo"](**{"ipo_length": "mean"})(p, r, n, 0),
    "slic-lambda": lambda p, r, n: LOSSES["slic"](**{"slic_lambda": 0.3})(p, r, n, 0),
    "sppo": lambda p, r, n: sppo(p, r, WIN, eta=2.0).mean(1),
    "rspo": lambda p, r, n: rspo(p, r, 1.1 * r, WIN, eta=2.0, lam=0.1, regulariser="reverse_kl"),
    "nash_md": lambda p, r, n: nash_md(p, r, WIN, tau=0.1),
    "inpo": lambda p, r, n: inpo(p, r, 1.1 * r, WIN[0], eta=2.0, tau=0.1),
    "t_spin": lambda p, r, n: t_spin(p[:, 0], p[:, 1], r[:, 0], alpha=0.3),
}


def pairs() -> list[Tree]:
    """Beginning alike, not at all, equal, and one the other's beginning; prompts of 1 token too."""
    random = np.random.default_rng(5)
    trees: list[Tree] = []
    for shared, one, other, prompt in (
        (7, 5, 3, 9), (0, 4, 8, 1), (6, 0, 0, 5), (4, 0, 6, 3), (5, 6, 0, 1), (0, 1, 1, 12)
    ):  # fmt: skip
        start = helpers.tokens(random, shared, shared)
        ends = (helpers.tokens(random, n, n) for n in (one, other))
        trees.append(
            Tree(
                helpers.tokens(random, prompt, prompt),
                tuple(np.concatenate([start, end]) for end in ends),
            )
        )
    return trees


@pytest.fixture(scope="module", params=FAMILIES)
def gradients_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[float, float]]:
    """Of a loss, how far its value and the policy's gradients are from plain PEFT's, relatively."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    make_folder(folder, family, changes=FAMILIES[family])
    backbone, trees = load(folder, POLICY).train().double(), pairs()
    assert (backbone.layout, backbone.whole_reason) == ("packed", "")
    plain = plain_model(folder, POLICY, trainable=True).double()
    for config in (cast(Any, backbone.decoder).config, plain.get_base_model().config):
        config._experts_implementation = "eager"  # the grouped one has no float64
    batch = collate([(POLICY, trees)], layout="packed")
    mine_B, plain_B = sequence_logps(backbone, batch), plain_logps(plain, trees)
    # Gains of about a nat: an exponential of many would magnify the rounding of a log-prob.
    noise_B = torch.randn(len(plain_B), generator=torch.Generator().manual_seed(6))
    reference_B2 = (plain_B.detach() + noise_B).view(-1, 2)
    lengths_B2 = batch.lengths.view(-1, 2)

    def both(name: str) -> tuple[float, float]:
        values: list[Tensor] = []
        for model, logps_B in ((backbone, mine_B), (plain, plain_B)):
            model.zero_grad()
            loss_B = FUNCTIONS[name](logps_B.view(-1, 2), reference_B2, lengths_B2)
            loss_B.sum().backward(retain_graph=True)
            values.append(loss_B.detach())
        expected = {
            key.replace(".default.", "."): cast(Tensor, p.grad)
            for key, p in plain.named_parameters()
            if p.requires_grad
        }
        mine, theirs = values
        assert mine.dtype == torch.float64
        value = float((mine - theirs).abs().max() / theirs.abs().max())
        return value, relative(policy_gradients(cast(Backbone, backbone)), expected)

    return both


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_every_loss_keeps_its_gradient(
    loss: str, gradients_of: Callable[[str], tuple[float, float]]
) -> None:
    value, gradient = gradients_of(loss)
    assert value < 1e-6 and gradient < 1e-6


def test_a_difference_takes_nothing_from_what_is_shared(tmp_path: Path) -> None:
    """Equal responses: the gradient is 0 to the bit, and one of them is computed."""
    backbone = load(make_folder(tmp_path, "llama"), POLICY).train()
    trees = [Tree(tree.prompt, tree.responses[:1] * 2) for tree in pairs()]
    batch = collate([(POLICY, trees)], layout="packed")
    assert len(batch.targets) == sum(len(tree.responses[0]) for tree in trees)
    policy_B2 = sequence_logps(backbone, batch).view(-1, 2)
    assert torch.equal(policy_B2[:, 0], policy_B2[:, 1])
    lengths_B2 = batch.lengths.view(-1, 2)
    LOSSES["dpo"]()(policy_B2, 0.9 * policy_B2.detach(), lengths_B2, 0).sum().backward()
    assert not any(gradient.any() for gradient in policy_gradients(backbone).values())
