"""The base in 4 bits and its optimiser in 8: equal to a base of the dequantised weights."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import helpers
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_backbone import (
    CPU,
    PREVIOUS,
    make_folder,
    make_trees,
    mixed_batch,
    plain_logps,
    plain_model,
    relative,
    routed_layers,
)
from test_reference_modes import gradients, pairs
from test_resume import finish, result, settings
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from alphaspin.commands import exporting, job, plan
from alphaspin.commands.options import ExportOptions
from alphaspin.commands.played import Played
from alphaspin.commands.sizing import base_bytes
from alphaspin.config import Config
from alphaspin.errors import EXIT_INPUT, InputError
from alphaspin.model import routing
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import collate
from alphaspin.model.load import load_base
from alphaspin.model.routing import POLICY
from alphaspin.model.scoring import sequence_logps
from alphaspin.model.settings import LoraConfig
from alphaspin.model.speedups import dequantise, is_quantised, liger_problem
from alphaspin.training.checkpoint import load_optimizer, optimizer_tensors
from alphaspin.training.settings import TrainConfig
from alphaspin.training.trainer import _optimizer

LINEAR = 2 * 7  # layers of the models here that carry adapters
LORA = LoraConfig(r=4, alpha=6, dropout=0.3)


def load(folder: Path, quantization: Any = "nf4") -> Backbone:
    backbone, _ = load_base(str(folder), dtype="fp32", device=CPU, quantization=quantization)
    for name in (POLICY, PREVIOUS):
        backbone.load_adapter(name, folder / name)
    return backbone


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen2"])
def bases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder, and a copy whose weights are those that 4 bits leave of them; qwen2 has biases."""
    exact = make_folder(tmp_path_factory.mktemp("exact"), request.param, LORA)
    rounded = tmp_path_factory.mktemp("rounded") / "base"
    shutil.copytree(exact, rounded)
    model = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32)
    layers = dict(
        load_base(str(exact), dtype="fp32", device=CPU, quantization="nf4")[0].named_modules()
    )
    quantised = {k.removeprefix("model."): m for k, m in layers.items() if is_quantised(m)}
    assert len(quantised) == LINEAR
    for name, layer in quantised.items():
        weight = cast(Any, model.get_submodule(name)).weight
        error = (weight.data - dequantise(cast(Any, layer))).norm() / weight.data.norm()
        assert 0.05 < error < 0.15, "four bits"
        weight.data = dequantise(cast(Any, layer))
    model.save_pretrained(rounded)
    return exact, rounded


def test_one_pass_equals_plain_models_of_the_dequantised_weights(bases: tuple[Path, Path]) -> None:
    backbone = load(bases[0]).eval()
    assert not is_quantised(backbone.head) and backbone.head.weight.dtype == torch.float32
    batch, groups = mixed_batch()
    with torch.no_grad():
        found = sequence_logps(backbone, batch)
        expected = torch.cat(
            [plain_logps(plain_model(bases[1], n), trees) for n, trees in groups.items()]
        )
        exact = torch.cat([plain_logps(plain_model(bases[0], n), t) for n, t in groups.items()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert (exact - expected).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["cached", "online", "joint"])
def test_training_equals_that_on_the_dequantised_weights(
    bases: tuple[Path, Path], mode: str
) -> None:
    """Loss, metrics and gradients, with dropout; with recomputed activations too."""
    trees = pairs(3)
    plain = load(bases[1], "none")
    plain.whole_reason = "as the base in 4 bits: the same dropout"
    expected, expected_gradients = gradients(plain, trees, mode)
    for checkpointing in (False, True):
        backbone = load(bases[0])
        if checkpointing:
            backbone.enable_activation_checkpointing()
        found, found_gradients = gradients(backbone, trees, mode)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert relative(found_gradients, expected_gradients) < 1e-5


class Dequantised:
    """Counts the weights that are made, and those that are alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.storages: list[StorageWeakRef] = []
        self.most = 0

        def counted(layer: Any) -> Tensor:
            weight = dequantise(layer)
            self.storages.append(StorageWeakRef(weight.untyped_storage()))
            self.most = max(self.most, self.alive())
            return weight

        monkeypatch.setattr(routing, "dequantise", counted)

    def alive(self) -> int:
        return sum(not storage.expired() for storage in self.storages)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_each_weight_is_dequantised_once_in_each_direction(
    bases: tuple[Path, Path], joint: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of policies; what a pass has made is gone before the next."""
    backbone = load(bases[0]).train()
    if checkpointing:
        backbone.enable_activation_checkpointing()
    trees = make_trees(4, 1)
    groups = [(name, trees) for name in (POLICY, PREVIOUS, None)]
    policy = collate(groups[: 1 if joint else 3], layout="packed")
    frozen = collate(groups[1:], layout="packed") if joint else None
    made = Dequantised(monkeypatch)
    output = backbone(policy, frozen)
    hidden = output[0] if joint else cast(Tensor, output)
    assert len(made.storages) == LINEAR
    assert made.alive() == 0, "the graph keeps none"
    # Between the two runs of a joint pass a decoder layer's are kept, never those of two.
    assert made.most == (LINEAR // 2 if joint else 1)
    made.most = 0
    hidden.sum().backward()
    assert len(made.storages) == LINEAR * (3 if checkpointing else 2)
    assert (made.alive(), made.most) == (0, 1)


def test_weights_and_their_scales_are_stored_rounded(bases: tuple[Path, Path]) -> None:
    backbone = load(bases[0])
    for layer in routed_layers(backbone):
        base = cast(Any, layer.base_layer)
        assert base.weight.untyped_storage().nbytes() == base.in_features * base.out_features // 2
        assert base.weight.quant_state.absmax.dtype == torch.uint8


def test_a_base_in_bf16_gets_its_weights_in_bf16(bases: tuple[Path, Path]) -> None:
    backbone, _ = load_base(str(bases[0]), dtype="bf16", device=CPU, quantization="nf4")
    backbone.load_adapter(POLICY, bases[0] / POLICY)
    backbone.eval()
    batch = collate([(POLICY, make_trees(4, 1)), (None, make_trees(2, 2))], layout="packed")
    with torch.no_grad():
        found = sequence_logps(backbone, batch)
        for layer in routed_layers(backbone):
            old = cast(Any, layer.base_layer)
            layer.base_layer = torch.nn.Linear(old.in_features, old.out_features, bias=False)
            layer.base_layer.weight = torch.nn.Parameter(dequantise(old), requires_grad=False)
            layer.base_layer.bias = old.bias
            assert layer.base_layer.weight.dtype == torch.bfloat16
        expected = sequence_logps(backbone, batch)
    assert torch.equal(found, expected)


def test_weights_keep_their_format_on_cpus_with_bf16_units(
    bases: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There bitsandbytes packs them otherwise when its own forward pass first runs."""
    before = [dequantise(cast(Any, la.base_layer)) for la in routed_layers(load(bases[0]))]
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    after = [dequantise(cast(Any, la.base_layer)) for la in routed_layers(load(bases[0]))]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_plan_knows_what_the_base_takes(family: str, tmp_path: Path) -> None:
    """With a head of its own and with a tied one."""
    helpers.save_model(tmp_path, family, hidden_size=256, intermediate_size=1024)
    _, facts = plan.gather(Config.model_validate({"model": str(tmp_path)}))
    backbone, _ = load_base(str(tmp_path), dtype="fp32", device=CPU, quantization="nf4")
    found = sum(p.untyped_storage().nbytes() for p in backbone.parameters())
    for layer in filter(is_quantised, backbone.modules()):
        state = cast(Any, layer).weight.quant_state
        found += state.absmax.nbytes + state.state2.absmax.nbytes
    assert base_bytes(facts, "nf4", 4) == pytest.approx(found, rel=0.01)
    plain = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(tmp_path).parameters())
    assert base_bytes(facts, "none", 4) == plain > 2 * found


# The optimiser


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "rmsprop"])
def test_a_saved_optimiser_goes_on_with_the_same_bits(kind: Any, tmp_path: Path) -> None:
    """Large and small matrices: bitsandbytes keeps 32 bits for the latter."""
    config = TrainConfig(optimizer=kind, weight_decay=0.1)
    random = torch.Generator().manual_seed(0)
    shapes = {"large": (64, 100), "another": (80, 60), "small": (4, 5)}
    gradients = [{n: torch.randn(s, generator=random) for n, s in shapes.items()} for _ in range(6)]

    def fresh(values: dict[str, Tensor]) -> tuple[dict[str, Any], torch.optim.Optimizer]:
        parameters = {name: torch.nn.Parameter(v.clone()) for name, v in values.items()}
        return parameters, _optimizer(parameters, config)

    def step(parameters: dict[str, Any], optimizer: Any, gradient: dict[str, Tensor]) -> None:
        optimizer.param_groups[0]["lr"] = 1e-2
        for name, parameter in parameters.items():
            parameter.grad = gradient[name].clone()
        optimizer.step()

    start = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    parameters, optimizer = fresh(start)
    for gradient in gradients[:3]:
        step(parameters, optimizer, gradient)
    save_file(optimizer_tensors(optimizer), tmp_path / "optimizer.safetensors")
    again, resumed = fresh({name: p.detach() for name, p in parameters.items()})
    load_optimizer(resumed, load_file(tmp_path / "optimizer.safetensors"))
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        types = {key: type(value) for key, value in resumed.state[again[name]].items()}
        assert types == {key: type(value) for key, value in state.items()}
    for gradient in gradients[3:]:
        step(parameters, optimizer, gradient)
        step(again, resumed, gradient)
    assert all(torch.equal(parameters[name], again[name]) for name in shapes)
    assert (optimizer.state[parameters["large"]].get("state1", Tensor()).dtype is torch.uint8) == (
        kind == "adamw_8bit"
    )


def test_eight_bits_step_like_thirty_two() -> None:
    """Ten steps of each end within 2 % of the way of one another."""
    ends: list[Tensor] = []
    for kind in ("adamw", "adamw_8bit"):
        random = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = _optimizer({"p": parameter}, TrainConfig(optimizer=cast(Any, kind)))
        optimizer.param_groups[0]["lr"] = 1e-2
        slope = torch.randn(64, 64, generator=random)
        for _ in range(10):
            parameter.grad = slope + 0.1 * torch.randn(64, 64, generator=random)
            optimizer.step()
        ends.append(parameter.detach())
    assert 0 < (ends[0] - ends[1]).norm() / ends[0].norm() < 0.02


# Whole runs

NARROW = {
    "train.quantization": "nf4",
    "train.optimizer": "adamw_8bit",
    "lora.r": "128",  # so that the moments do take 8 bits
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    helpers.save_model(folder / "model")
    helpers.write_rows(folder / "data.jsonl", helpers.arithmetic(40))
    assert finish(settings(folder, folder / "run", **NARROW), folder / "log") == 0
    return folder


def test_a_killed_run_ends_with_the_same_bits(world: Path, tmp_path: Path) -> None:
    events = json.loads((world / "log.events").read_text())
    arguments = settings(world, tmp_path / "run", **NARROW)
    killed = ("saving", events["saving"] // 2 + 2)  # a checkpoint is there by then
    assert finish(arguments, tmp_path / "log", killed) == -signal.SIGKILL
    (checkpoint,) = (tmp_path / "run").rglob("step-*/optimizer.safetensors")
    assert any(t.dtype == torch.uint8 for t in load_file(checkpoint).values())
    assert finish(arguments, tmp_path / "log") == 0
    assert result(tmp_path / "run") == result(world / "run")


def test_a_quantised_run_is_another_run(world: Path) -> None:
    plain, narrow = (Config.model_validate({"train": {"quantization": q}}) for q in ("none", "nf4"))
    assert plain.digest() == Config().digest() != narrow.digest()
    other = settings(world, world / "run", **NARROW | {"train.quantization": "none"})
    assert finish(other, world / "log-other") == EXIT_INPUT
    assert "quantization" in (world / "log-other").read_text()


def test_a_quantised_run_is_evaluated_and_exported(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluated on the rounded base it was trained on, merged into the exact one."""
    shutil.copytree(world / "run", tmp_path / "run")
    played = Played.open(tmp_path / "run")
    assert len(list(filter(is_quantised, played.load(CPU)[0].modules()))) == LINEAR
    assert not any(map(is_quantised, played.load(CPU, whole=True)[0].modules()))
    run, out, log = (str(tmp_path / name) for name in ("run", "out", "log"))
    assert finish(["evaluate", run], log) == 0
    # Merging needs no bitsandbytes.
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    exporting.run(Played.open(Path(run)), ExportOptions(to=out, merge=True))
    ids = torch.arange(5, 25)[None]
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    adapted = PeftModel.from_pretrained(base, f"{run}/iterations/1/adapter").eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert "4 bits" in Path(out, "README.md").read_text()


# Liger


def test_ligers_kernels_change_nothing_but_rounding() -> None:
    """Packed trees, routed adapters, gradients, in Triton's interpreter."""
    script = Path(__file__).with_name("interpreted_liger.py")
    command = [sys.executable, str(script), "llama:joint", "gemma:joint"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("gradients differ by") == 2, done.stderr


def test_liger_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert "CUDA" in str(liger_problem(cpu)) and liger_problem(gpu) is None
    assert Config.model_validate({"train": {"liger": "off"}}).digest() == Config().digest()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'alphaspin[cuda]'" in str(liger_problem(gpu))


# What is refused


def test_a_base_that_is_quantised_already_is_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"bits": 4}}))
    for quantization in ("none", "nf4"):
        with pytest.raises(InputError, match=r"model = .*: its weights are quantised already"):
            load_base(str(tmp_path / "model"), dtype="fp32", device=CPU, quantization=quantization)


@pytest.mark.parametrize(
    ("key", "value"), [("train.quantization", "nf4"), ("train.optimizer", "adamw_8bit")]
)
def test_without_bitsandbytes_nothing_is_begun(
    world: Path, tmp_path: Path, key: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = {"model": str(world / "model"), "data": str(world / "data.jsonl")}
    config |= {"output": str(tmp_path / "run"), "train": {key.split(".")[1]: value}}
    expected = rf"{key} = {value}: bitsandbytes is not installed: pip install 'alphaspin\[quantiz"
    with pytest.raises(InputError, match=expected):
        job.run(Config.model_validate(config))
    assert not (tmp_path / "run").exists()


def test_a_quantised_base_is_not_sharded() -> None:
    with pytest.raises(ValueError, match=r"train\.quantization = nf4 and train\.sharding = fsdp"):
        Config.model_validate({"train": {"quantization": "nf4", "sharding": "fsdp"}})
