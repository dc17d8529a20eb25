"""Settings without effect, or that must fail later, are refused; what a run changes is put back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from test_backbone import LORA, PREVIOUS, load, make_folder

from alphaspin.cli import main, parse
from alphaspin.config import Config
from alphaspin.errors import InputError
from alphaspin.evaluation.record import Evaluation
from alphaspin.foundation import console
from alphaspin.foundation.section import RECORDED
from alphaspin.model.backbone import Backbone
from alphaspin.model.distributed import Team
from alphaspin.model.load import choose_bf16
from alphaspin.model.repeatable import repeatable
from alphaspin.model.routing import POLICY
from alphaspin.model.stepper import Stepper

SERVER = {"url": "http://x/v1", "model": "m"}
WITHOUT_EFFECT: list[tuple[dict[str, Any], str]] = [
    ({"loss": {"kind": "ipo", "beta": 0.7}}, "loss.beta"),
    ({"loss": {"kind": "slic", "beta": 0.7}}, "loss.beta"),
    ({"loss": {"kind": "hinge", "label_smoothing": 0.2}}, "loss.label_smoothing"),
    ({"loss": {"kind": "dpo", "ipo_tau": 0.2}}, "loss.ipo_tau"),
    ({"loss": {"kind": "slic", "ipo_length": "mean"}}, "loss.ipo_length"),
    ({"loss": {"kind": "dpo", "slic_delta": 2.0}}, "loss.slic_delta"),
    ({"loss": {"kind": "slic"}, "reference": {"alpha": 0.3}}, "reference.alpha"),
    ({"loss": {"kind": "slic"}, "reference": {"mode": "online"}}, "reference.mode"),
    ({"loss": {"kind": "slic"}, "reference": {"kind": "arithmetic"}}, "reference.kind"),
    ({"reference": {"ema_decay": 0.9}}, "reference.ema_decay"),
    (
        {"method": "rspo", "judge": {}, "preference": {"reverse_weight": 2.0}},
        "preference.reverse_weight",
    ),
    ({"method": "rspo", "preference": {"clamp": 3.0}}, "preference.clamp"),
]


@pytest.mark.parametrize(("settings", "key"), WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key} = \S+ has no effect with"):
        Config.model_validate(settings)
    Config.model_validate(settings, context=RECORDED)  # a finished run opens


@pytest.mark.parametrize(
    "settings",
    [
        {
            "loss": {"kind": "slic"},
            "reference": {"alpha": 0.3},
            "selfplay": {"opponent": "mixture-token"},
        },
        {
            "loss": {"kind": "slic"},
            "reference": {"ema_decay": 0.3},
            "selfplay": {"opponent": "ema"},
        },
        {"reference": {"kind": "ema", "ema_decay": 0.3}},
        {"method": "rspo", "preference": {"clamp": 3.0, "regulariser": "chi2"}},
    ],
)
def test_what_has_an_effect_is_taken(settings: dict[str, Any]) -> None:
    Config.model_validate(settings)


@pytest.mark.parametrize("words", [["--loss.kind=slic"], ["--loss.kind", "ipo"]])
@pytest.mark.parametrize("recipe", ["tiny", "default"])
def test_a_loss_on_the_command_line_takes_the_place_of_the_recipes(
    recipe: str, words: list[str]
) -> None:
    config, _ = parse([recipe, *words])
    assert config.loss.kind == words[-1].split("=")[-1]
    with pytest.raises((InputError, SystemExit)):
        parse([recipe, *words, "--loss.beta=0.3"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"sampling": {"engine": "transformers", **SERVER}, "selfplay": {"iterations": 2}},
            "needs selfplay.iterations = 1",
        ),
        (
            {"selfplay": {"opponent": "mixture-gflownet"}, "train": {"sharding": "fsdp"}},
            "needs train.sharding = none",
        ),
    ],
)
def test_what_would_fail_later_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Config.model_validate(settings)


@pytest.mark.parametrize("cap", [None, 1.0])
def test_sixteen_bit_logits_are_sums_in_fp32(cap: float | None) -> None:
    """The sampler draws from what is scored: no logit is rounded, alone or in a mixture."""
    changes = {"final_logit_softcapping": cap} if cap else {}
    family = "gemma2" if cap else "llama"
    backbone = Backbone(helpers.make_model(family, **changes).bfloat16(), "", "")
    backbone.head.weight.data *= 40
    hidden = torch.randn(5, backbone.head.in_features).bfloat16()
    exact = hidden.double() @ backbone.head.weight.double().T
    exact = cap * torch.tanh(exact / cap) if cap else exact
    error = (backbone.logits(hidden).double() - exact).abs().max()
    assert error < 1e-5 * exact.abs().max(), "bf16 rounds to 4e-3"
    backbone.add_adapter(POLICY, LORA, seed=0, iteration=0)
    prompts = [np.array([7, 8, 9], np.int32)]
    mixed, log_z = (
        Stepper(backbone, log_normalisers=record).prefill(prompts, [{POLICY: 0.5, None: 0.5}])
        for record in (False, True)
    )
    torch.testing.assert_close(mixed.logits, log_z.logits, rtol=0, atol=0)


def test_emulated_bf16_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert not choose_bf16("auto", torch.device("cuda"))
    assert choose_bf16("bf16", torch.device("cuda"))


def test_the_trained_policy_has_no_identity(tmp_path: Path) -> None:
    """Its weights change, and a cache that is asked for it must not find older ones."""
    backbone = load(make_folder(tmp_path, "llama"), POLICY, PREVIOUS)
    assert backbone.adapter_ids[POLICY] != backbone.adapter_ids[PREVIOUS]
    backbone.policy_parameters()  # for an optimiser
    assert POLICY not in backbone.adapter_ids and PREVIOUS in backbone.adapter_ids


def test_torchs_settings_are_put_back() -> None:
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    with pytest.raises(KeyError), repeatable():
        assert torch.are_deterministic_algorithms_enabled()
        assert not memory.fill_uninitialized_memory
        raise KeyError
    after = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    assert after == before and not console.console.quiet


def test_together_within_together_is_found_in_one_process() -> None:
    team = Team(torch.device("cpu"))
    with pytest.raises(AssertionError, match="within"), team.together(), team.together():
        pass
    with team.together():
        pass


@pytest.mark.parametrize("command", ["evaluate", "export", "gflownet"])
def test_commands_of_one_process_refuse_several(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["alphaspin", command, "run"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert "runs in one process" in " ".join((printed.out + printed.err).split())


def test_an_evaluation_of_another_version_is_named(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({"name": "0", "unheard_of": 1.0}))
    with pytest.raises(InputError, match="not what this version"):
        Evaluation.load(file)


def test_torch_before_2_10_adds_products_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `addmm` takes no fp32 summand beside 16-bit factors (pytorch 167931)."""
    from alphaspin_kernels._triton import common

    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("self and mat2 must have the same dtype")

    class Cuda(torch.Tensor):
        is_cuda = True  # pyright: ignore[reportAssignmentType]

    product: Callable[..., torch.Tensor] = torch.mm
    a, b, c = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16(), torch.ones(3, 5)
    monkeypatch.setattr(torch, "addmm", refuses)
    monkeypatch.setattr(torch, "mm", lambda x, y, out_dtype: product(x.float(), y.float()))
    expected = c + product(a.float(), b.float())
    monkeypatch.setattr(common, "TORCH", (2, 9))
    common.multiply_add(c, a.as_subclass(Cuda), b.as_subclass(Cuda), add=True)
    torch.testing.assert_close(c, expected)
    monkeypatch.setattr(common, "TORCH", (2, 10))
    with pytest.raises(RuntimeError, match="same dtype"):
        common.multiply_add(c, a.as_subclass(Cuda), b.as_subclass(Cuda), add=True)
