"""Whole runs on a GPU that is not there: devices, waits, order of sums, old releases of torch."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pretend
import pytest
import smoke
import torch
from accelerate import Accelerator
from alphaspin_kernels import linear_logprob
from alphaspin_kernels._triton import common

from alphaspin.commands import doctor, job
from alphaspin.config import Config
from alphaspin.model import varlen
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import collate
from alphaspin.model.head import head_product
from alphaspin.model.repeatable import backward, repeatable
from alphaspin.model.routing import POLICY, RoutedLinear
from alphaspin.model.settings import LoraConfig
from alphaspin.model.stepper import Policy
from alphaspin.model.tree import Tree
from alphaspin.model.verify import Verdict
from alphaspin.sampling import gflownet
from alphaspin.sampling.answer import Answer
from alphaspin.sampling.decode import invert, running
from alphaspin.sampling.settings import GFlowNetConfig

ALONE = "ALPHASPIN_PRETEND"
"""Set in a process of these tests' own: torch takes another device only before its first backward
pass, and keeps it."""
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
    pytest.mark.skipif(ALONE not in os.environ, reason="see test_pretended_gpu_alone"),
]

KERNELS, TRAINER = "kernels/alphaspin_kernels", "alphaspin/training/trainer.py"
HEAD = f"{KERNELS}/_triton/frozen_head.py"
WAITS = {
    ("train", f"{KERNELS}/checks.py", "check_targets"): "a wrong target is refused, not scored",
    ("train", f"{KERNELS}/checks.py", "check_boundaries"): "the same of cu_seqlens",
    ("train", f"{KERNELS}/numerics.py", "active_rows"): "the grid of the head's kernels",
    ("train", HEAD, "selected"): "once a head: rows out of bf16's range are done again",
    ("train", TRAINER, "accumulate_gradients"): "once a step: the metrics that are written",
    ("score", f"{KERNELS}/checks.py", "check_targets"): "as in training",
    ("score", f"{KERNELS}/checks.py", "check_boundaries"): "as in training",
    ("score", f"{KERNELS}/numerics.py", "active_rows"): "as in training",
    ("score", "alphaspin/model/scoring.py", "score"): "once a pass: the log-probs are kept on disk",
    ("sample", "alphaspin/sampling/decode.py", "choose"): "once a token: which answers have ended",
    ("sample", "alphaspin/model/layout.py", "unlike"): "once a CUDA graph: is its replay right",
}
"""Where the host waits for the device in what is repeated, and why it has to."""


class OnCuda(Accelerator):
    """Finds the pretended GPU."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"cpu": True})

    device = property(lambda self: pretend.CUDA)


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that runs one of `smoke.RUNS` and returns its summary and what happened."""
    monkeypatch.setattr(job, "Accelerator", OnCuda)

    def run(name: str, verified: bool = False, **changes: Any) -> tuple[dict[str, Any], Any]:
        if not verified:
            kept = lambda *_, **__: Verdict({"longest": 0}, 0)  # noqa: E731
            monkeypatch.setattr(job, "verify", kept)
        settings = smoke.settings(name, tmp_path)
        for key, value in changes.items():
            settings[key] = settings.get(key, {}) | value
        with pretend.gpu() as events:
            return job.run(Config.model_validate(settings)), events

    return run


def check(summary: dict[str, Any], events: Any, iterations: int) -> None:
    """What has to hold of every run."""
    assert len(summary["rows"]) >= iterations + 1
    assert summary["trained_tokens"]["train"] > 0
    assert "one call a layer, by torch" in summary["environment"]["attention"]
    for kernel in ("_low_kernel", "_linear_kernel", "_update_kernel", "_weights_kernel"):
        assert events.kernels[kernel], f"{kernel} was never launched"
    assert events.operators["torch_attn._varlen_attn_backward.default"]
    assert not events.unordered
    assert events.recorded, "no step of the sampler was a CUDA graph"
    hot = {where for where in events.waits if where[0]}
    assert hot <= WAITS.keys(), f"the host waits in {hot - WAITS.keys()}"


def test_a_run_of_every_phase(play: Callable[..., Any]) -> None:
    """Load, verify, sample, score, train with noise, save, load, evaluate, and the control."""
    check(*play("spin", verified=True, selfplay={"iterations": 1}), 1)


@pytest.mark.parametrize("name", sorted(smoke.RUNS.keys() - {"spin", "spin-gflownet"}))
def test_other_references_and_methods(play: Callable[..., Any], name: str) -> None:
    """But the GFlowNet, of which a step is below: ten are minutes here."""
    iterations = 1 if name == "sppo" else 2
    check(*play(name, selfplay={"iterations": iterations}), iterations)


@pytest.mark.parametrize("version", [(2, 8), pretend.NEWEST], ids=str)
@pytest.mark.parametrize("name", smoke.CHECKS)
def test_operators(name: str, version: tuple[int, int]) -> None:
    """Values and gradients, with what the oldest torch has and with what the newest has."""
    with pretend.gpu(version) as events:
        smoke.kernels(name, "cuda")
    assert events.kernels
    summands = [op for op in events.operators if op.startswith("aten.addmm.dtype")]
    assert bool(summands) == (version >= (2, 10) and name == "linear_logprob")


@pytest.mark.parametrize(
    ("family", "dtype", "version", "reason"),
    [
        ("llama", torch.bfloat16, pretend.NEWEST, ""),
        ("mistral", torch.bfloat16, pretend.NEWEST, ""),
        ("gemma2", torch.bfloat16, pretend.NEWEST, "varlen_attn has no soft cap"),
        ("llama", torch.bfloat16, (2, 8), "torch: not installed"),
        ("llama", torch.float32, pretend.NEWEST, "they have no torch.float32"),
    ],
)
def test_attention(family: str, dtype: torch.dtype, version: tuple[int, int], reason: str) -> None:
    """A call a layer where there is a kernel, with gradients in one order; else one a length."""
    random = np.random.default_rng(0)
    prompt, *responses = (helpers.tokens(random, 3, 9) for _ in range(3))
    trees = [Tree(prompt, tuple(responses)), Tree(prompt, tuple(responses[::-1]))]
    with pretend.gpu(version) as events, repeatable():
        backbone = Backbone(helpers.make_model(family).to(dtype).to("cuda"), "a model", "its hash")
        config = LoraConfig(r=2, alpha=2, targets=("q_proj",))
        backbone.add_adapter("policy", config, seed=0, iteration=0)
        batch = collate([("policy", trees)], layout="packed").to(backbone.device)
        events.operators.clear(), events.waits.clear()
        backward(backbone(batch).sum(), backbone)
        (note,) = (x for x in backbone.notes() if x.startswith("attention"))
        assert note.endswith(*varlen.on(torch.device("cuda")))
        calls = [events.operators[f"torch_attn._varlen_attn{x}.default"] for x in ("", "_backward")]
    assert calls == ([0, 0] if reason else [2, 2])
    assert reason in note and ("by torch 2" in note) == (not reason)
    assert not events.waits and not events.unordered


def test_a_gradient_through_the_head() -> None:
    """Of a step of the GFlowNet, which mixes logits of 16-bit states: as in fp32 on the CPU."""
    targets: Policy = {"previous": 0.7, None: 0.3}
    config = GFlowNetConfig(prompts=1, answers=8, lora=LoraConfig(r=2, targets=("q_proj",)))
    prompt, *answers = (np.array(x, np.int32) for x in ([4, 2], [5, 3, 1], [6, 7, 8], [1]))
    wrapped = [[Answer(y, y[-1] != 1) for y in answers]]

    def differentiate(*to: Any) -> tuple[float, torch.Tensor]:
        model = helpers.make_model(num_hidden_layers=1, vocab_size=40).bfloat16().to(*to)
        backbone = Backbone(model, "a model", "its hash")
        backbone.add_adapter(POLICY, config.lora, seed=0, iteration=0)
        backbone.random_adapter("previous", POLICY, 1)
        backbone.random_adapter("other", POLICY, 2)
        backbone.set_adapter_state(POLICY, backbone.adapter_state("other"))
        stops, folder = frozenset([1, 9]), Path("nowhere")
        task = gflownet.Task(targets, [prompt], 3, stops, config, 0, 0, "g", folder)
        fresh = gflownet.trajectories(backbone, task, [prompt], wrapped)
        found = gflownet.accumulate(backbone, task, [0], fresh, [[]], 0.5, 0)
        grads = [p.grad.flatten().cpu() for p in backbone.policy_parameters().values()]
        return found["loss"], torch.cat(grads)

    with pretend.gpu() as events, repeatable():
        mine, found = differentiate("cuda")
    loss, expected = differentiate(torch.float32)
    assert events.operators["aten.mm.dtype"] and not events.unordered
    assert mine == pytest.approx(loss, rel=0.02)
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_with_an_out_dtype_have_a_gradient(dtype: torch.dtype) -> None:
    """Of rows of any size, also where the head is trained; torch has none, and says so."""
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*s, generator=generator) for s in ((3, 8), (50, 8), (3, 50)))
    x, w = x.to(dtype), w.to(dtype)
    dy *= torch.tensor([[1e-9], [0.0], [1e9 if dtype == torch.bfloat16 else 1.0]])
    with pretend.gpu():
        for trained in (False, True):
            head = torch.nn.Linear(8, 50, bias=False)
            head.weight = torch.nn.Parameter(w.to("cuda"), trained)
            leaf = x.to("cuda").requires_grad_()
            y = head_product(head, leaf)
            y.backward(dy.to("cuda"))
            exact = dy.double() @ w.double()
            error = (leaf.grad.host.double() - exact).norm(dim=1)
            assert error.le(2 * torch.finfo(dtype).eps * exact.norm(dim=1) + 6e-8).all(), error
            torch.testing.assert_close(y.host, x.float() @ w.float().T)
        with pytest.raises(RuntimeError, match="derivative for aten::mm is not implemented"):
            torch.mm(leaf, w.T.to("cuda"), out_dtype=torch.float32).sum().backward()


def test_doctor_finds_attention() -> None:
    with pretend.gpu():
        assert "one call a layer, by torch" in doctor._attention(pretend.CUDA)


def test_what_is_refused() -> None:
    """The pretended GPU does refuse, wait and count: a run that is right says something."""
    with pretend.gpu() as events:
        x = torch.randn(3, 4, device="cuda", requires_grad=True)
        with pytest.raises(RuntimeError, match="are on the CPU"):
            x + torch.ones(4)
        with pytest.raises(RuntimeError, match="are on the CPU"):
            torch.cat([x, torch.ones(1, 4)])
        with pytest.raises(TypeError, match="numpy"):
            x.detach().numpy()
        assert x.device == pretend.CUDA and x.is_cuda and not events.waits
        assert (x + torch.tensor(1.0)).shape == (3, 4)
        for wait in (x.sum().item, x.cpu, x.tolist, (x > 0).nonzero, lambda: x[x > 0]):
            before = events.waits.total()
            wait()
            assert events.waits.total() == before + 1, wait
        x.cumsum(0)
        torch.zeros(4, device="cuda").index_add_(0, torch.tensor([0, 0], device="cuda"), x[0, :2])
        x.softmax(1)[0, 0].backward()
        assert set(events.unordered) == {"cumsum", "index_add_", "_softmax_backward_data"}
        with pytest.raises(ValueError, match="weight is on cpu"):
            linear_logprob(x, torch.ones(5, 4), torch.zeros(3, dtype=torch.int64, device="cuda"))
    with pretend.gpu((2, 9)):
        a = torch.ones(2, 2, dtype=torch.bfloat16, device="cuda")
        with pytest.raises(RuntimeError, match="must have the same dtype"):
            torch.addmm(a.float(), a, a, out_dtype=torch.float32)
        c = torch.ones(2, 2, device="cuda")
        common.multiply_add(c, a, a, add=True)
        assert c.tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_cublas_and_attention_repeat_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    with repeatable():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
    assert not torch.are_deterministic_algorithms_enabled()


def test_adapters_are_rounded_once_until_they_change() -> None:
    with pretend.gpu():
        backbone = Backbone(helpers.make_model().bfloat16().to("cuda"), "a model", "its hash")
        config = LoraConfig(r=2, alpha=2, targets=("q_proj",))

        def rounded() -> Any:
            layer = next(m for m in backbone.model.modules() if isinstance(m, RoutedLinear))
            down, up = layer.lora_A["policy"].weight, layer.lora_B["policy"].weight
            near = layer._near("policy", down, up, torch.bfloat16)
            assert torch.equal(near[0].host, down.host.bfloat16())
            assert torch.equal(near[1].host, up.host.bfloat16())
            assert layer._near("policy", down, up, torch.bfloat16) is near
            return layer, near, down

        backbone.add_adapter("policy", config, seed=0, iteration=0)
        layer, near, down = rounded()
        with torch.no_grad():
            down.add_(1.0)
        assert rounded()[1] is not near
        down.data.add_(1.0)  # past it, as optimisers in C++ write
        torch.autograd.graph.increment_version([down])
        rounded()
        del down
        backbone.remove_adapter("policy")
        backbone.add_adapter("other", config, seed=1, iteration=0)
        backbone.add_adapter("policy", config, seed=2, iteration=0)
        rounded()
        assert list(layer.rounded) == ["policy"]


def test_running_sums_in_whole_numbers() -> None:
    """They end where cumsum does, never fall, and stand still where nothing is added."""
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(3, 500, generator=generator).double().pow(8)
    share[:, 100:200] = 0.0
    share /= share.sum(1, keepdim=True)
    uniform = torch.rand(3, generator=generator, dtype=torch.float64)
    with pretend.gpu():
        found = running(share.to("cuda")).host
        tokens = invert(share.to("cuda"), uniform.to("cuda")).host
    assert (found - share.cumsum(1)).abs().max() < 1e-15
    assert found.diff(dim=1).ge(0).all() and found[:, 99:200].diff(dim=1).eq(0).all()
    assert torch.equal(tokens, invert(share, uniform))
