"""One gradient step of TRL's trainers: TRL alone, with Liger, and with `patch_trl`.

`pytest benchmarks/test_trl.py --benchmark` writes a table and its numbers; without the flag every
case runs once, small. The variants of a case start from the same random Llama and get the same
batch, in turn, and must have the same loss. A step is `compute_loss` and the backward pass, with
references given. Peak memory is that of one step in a process of its own, above what was resident
before it. Liger in TRL 1.16 is its layer kernels: TRL does not take its losses any more.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import measure
import numpy as np
import pytest
import torch
from alphaspin_kernels import patch_trl
from datasets import Dataset
from measure import ROOT
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

STEPS = 3
LARGE = {"vocabulary": 32_000, "hidden": 512, "layers": 6, "rows": 6, "prompt": 64, "longest": 192}
SMALL = {"vocabulary": 300, "hidden": 64, "layers": 2, "rows": 4, "prompt": 6, "longest": 9}
TEXT = {"prompt": "a", "chosen": " b", "rejected": " c"}  # what the constructors tokenise
VARIANTS = ("TRL", "TRL + Liger", "TRL + patch_trl")
CASES = ("DPO, LoRA", "DPO, all weights", "GRPO, LoRA", "SimPO, LoRA")


def words() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(("<pad>", "<eos>", "a", "b", "c"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def add_liger(model: Any) -> None:
    """The layers of this model alone: Liger changes transformers' module for all others too.

    That leaves its rotary embedding out, which is a function of the module.

    Raises:
        RuntimeError: no GPU, without which Liger's kernels do not run.
    """
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.models.llama import modeling_llama

    if not torch.cuda.is_available():
        raise RuntimeError("Liger's Triton kernels need a GPU")
    before = dict(vars(modeling_llama))
    only_layers = ("rope", "cross_entropy", "fused_linear_cross_entropy")
    apply_liger_kernel(model, dict.fromkeys(only_layers, False))
    vars(modeling_llama).update(before)


class Step:
    """A trainer and its batch."""

    def __init__(self, case: str, variant: str, size: dict[str, int]):
        self.patched = variant.endswith("patch_trl")
        self.output = tempfile.TemporaryDirectory()
        kind, _, trained = case.partition(", ")
        model = measure.llama(size["vocabulary"], size["hidden"], size["layers"], end=1)
        if trained == "LoRA":
            projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
            model = get_peft_model(model, LoraConfig(r=16, target_modules=projections))
        settings = {
            "output_dir": self.output.name,
            "report_to": "none",
            "use_cpu": not torch.cuda.is_available(),
            "bf16": torch.cuda.is_available(),
            "activation_checkpointing": False,
            "per_device_train_batch_size": size["rows"],
        }
        with self.context():
            self.trainer = getattr(self, kind.lower())(model, settings)
        if variant.endswith("Liger"):
            add_liger(model)
        self.kind = kind.lower()
        self.trainer.model.train()
        self.use(size)

    def context(self) -> Any:
        return patch_trl() if self.patched else nullcontext(ExitStack())

    def dpo(self, model: Any, settings: dict[str, Any]) -> Any:
        import trl

        trainer = trl.DPOTrainer(
            model=model,
            ref_model=None if hasattr(model, "peft_config") else measure.llama(8, 64, 1, end=1),
            args=trl.DPOConfig(max_length=None, **settings),
            train_dataset=Dataset.from_list([TEXT]),
            processing_class=words(),
        )
        trainer.precompute_ref_logps = True
        return trainer

    def grpo(self, model: Any, settings: dict[str, Any]) -> Any:
        import trl

        return trl.GRPOTrainer(
            model=model,
            args=trl.GRPOConfig(num_generations=2, **settings),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_list([{"prompt": "a"}] * 2),
            processing_class=words(),
        )

    def simpo(self, model: Any, settings: dict[str, Any]) -> Any:
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return CPOTrainer(
            model=model,
            args=CPOConfig(loss_type="simpo", cpo_alpha=0.0, **settings),
            train_dataset=Dataset.from_list([TEXT]),
            processing_class=words(),
        )

    def use(self, size: dict[str, int]) -> None:
        """A batch of rows with a prompt of one length and responses of many."""
        random = np.random.default_rng(0)
        device = self.trainer.accelerator.device

        def tokens(length: int) -> torch.Tensor:
            return torch.from_numpy(random.integers(5, size["vocabulary"], length))

        prompts = [tokens(size["prompt"]) for _ in range(size["rows"] // 2)] * 2
        low, high = size["longest"] // 3, size["longest"] + 1
        answers = [tokens(random.integers(low, high)) for _ in prompts]
        whole = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
        marks = [torch.ones_like(y) for y in answers]

        def padded(parts: list[torch.Tensor], value: int = 0) -> torch.Tensor:
            return pad_sequence(parts, batch_first=True, padding_value=value).to(device)

        half, flat = len(prompts) // 2, -math.log(size["vocabulary"])
        references = torch.tensor([flat * len(y) for y in answers], device=device).split(half)
        mask = padded([torch.ones_like(x) for x in whole])
        scored = [torch.cat([0 * x, m]) for x, m in zip(prompts, marks, strict=True)]
        if self.kind == "dpo":
            self.batch = {"input_ids": padded(whole), "attention_mask": mask}
            self.batch |= {"completion_mask": padded(scored)}
            names = ("ref_chosen_logps", "ref_rejected_logps")
            self.batch |= dict(zip(names, references, strict=True))
        elif self.kind == "grpo":
            self.trainer.current_gradient_accumulation_steps = 1
            signs = torch.tensor([1.0, -0.5] * half, device=device)
            self.batch = {"prompt_ids": padded(prompts), "completion_ids": padded(answers)}
            self.batch |= {"prompt_mask": torch.ones_like(self.batch["prompt_ids"])}
            self.batch |= {"completion_mask": padded(marks), "advantages": signs}
            self.batch |= {"num_items_in_batch": self.batch["completion_mask"].sum()}
        else:
            labels = [x.masked_fill(s == 0, -100) for x, s in zip(whole, scored, strict=True)]
            self.batch = {}
            for name, part in (("chosen", slice(half)), ("rejected", slice(half, None))):
                self.batch |= {f"{name}_input_ids": padded(whole[part])}
                self.batch |= {f"{name}_attention_mask": padded([0 * x + 1 for x in whole[part]])}
                self.batch |= {f"{name}_labels": padded(labels[part], -100)}

    def __call__(self) -> tuple[float, float]:
        """Loss and seconds."""
        self.trainer.model.zero_grad()
        with self.context():
            started = time.perf_counter()
            loss = self.trainer.compute_loss(self.trainer.model, self.batch)
            loss.backward()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            value = loss.item()
            return value, time.perf_counter() - started


def measured_memory(case: str, variant: str) -> int:
    """MiB of one step; on a GPU of what torch allocates."""
    folders = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": ":".join(folders)}
    command = [sys.executable, "-W", "ignore", __file__, case, variant]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1]) >> 10


def memory(case: str, variant: str) -> int:
    """KiB."""
    step = Step(case, variant, LARGE)
    if torch.cuda.is_available():
        step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) >> 10

    def warm_up() -> None:
        step.use(SMALL | {"vocabulary": LARGE["vocabulary"], "rows": 2})
        step()
        step.use(LARGE)

    return measure.growth(warm_up, step)


@pytest.mark.filterwarnings("ignore")
def test_trl(measuring: bool, record: Callable[..., Path]) -> None:
    trl = pytest.importorskip("trl")
    size = LARGE if measuring else SMALL
    table: list[list[str]] = []
    raw: dict[str, Any] = {}
    for case in CASES:
        steps: dict[str, Step] = {}
        failures: dict[str, str] = {}
        walls: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        losses: dict[str, float] = {}
        for variant in VARIANTS:
            try:
                steps[variant] = Step(case, variant, size)
                losses[variant] = steps[variant]()[0]
            except Exception as error:
                if not variant.endswith("Liger"):
                    raise
                steps.pop(variant, None)
                line = (str(error).splitlines() or [""])[0]
                failures[variant] = line[:60]
        for _ in range(STEPS):
            for variant, step in steps.items():
                walls[variant].append(step()[1])
        for loss in losses.values():
            np.testing.assert_allclose(loss, losses["TRL"], rtol=1e-4, atol=1e-5, err_msg=case)
        measured = list(steps)
        steps.clear()
        for variant in VARIANTS:
            if variant in failures:
                table.append([case, variant, failures[variant], "", "", ""])
                continue
            seconds = statistics.median(walls[variant])
            ratio = statistics.median(walls["TRL"]) / seconds
            extra = measured_memory(case, variant) if measuring and variant in measured else None
            shown = "" if extra is None else str(extra)
            row = [case, variant, f"{seconds:.2f}", f"{ratio:.2f}", shown, f"{losses[variant]:.5f}"]
            table.append(row)
            raw[f"{case}: {variant}"] = {
                "seconds": walls[variant],
                "MiB": extra,
                "loss": losses[variant],
            }
    header = ["trainer", "variant", "s a step", "× TRL", "MiB", "loss"]
    text = (
        f"{size}; trl {trl.__version__}. Medians of {STEPS} interleaved steps; × TRL: how often "
        f"as fast. MiB: peak of one step above what was resident before it. On the CPU TRL scores "
        f"prompts and padding too, but for SimPO, where it builds logits. {measure._load()}"
    )
    path = record("trl", header, table, text, raw)
    print("\n" + path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    print(memory(sys.argv[1], sys.argv[2]))
