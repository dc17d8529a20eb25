"""One optimiser step on the same pairs: this project, TRL's `DPOTrainer`, and three naive passes.

`pytest benchmarks/test_end_to_end.py --benchmark` writes tables and numbers; without the flag
every case runs once, small. All variants start from the same base and the same adapter, take the
same steps, interleaved in one run, and must have the same losses: the table is refused otherwise.
Peak memory is that of one step in a process of its own, above what was resident with the model.

A pair is a prompt and two responses. Tokens are counted as TRL processes them, each pair's prompt
twice: (prompt + winner) + (prompt + loser), no padding. The floor is the step's matrix products
alone: two per frozen layer (output, input gradient), six per adapter, two with the head, each
prompt once, no padding; attention is not in it. Run it on a machine without other work.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import pytest
import torch
from datasets import Dataset
from measure import ROOT, Goal
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from alphaspin.losses.dpo import DPO
from alphaspin.losses.reference import mixture_reference
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import Segment, collate
from alphaspin.model.distributed import Team
from alphaspin.model.load import load_base
from alphaspin.model.routing import POLICY
from alphaspin.model.scoring import OnlineReference, ReferenceCache, score, sequence_logps
from alphaspin.model.settings import LoraConfig
from alphaspin.model.tree import Tree
from alphaspin.training.example import Example
from alphaspin.training.settings import TrainConfig
from alphaspin.training.trainer import Job, accumulate_gradients

PREVIOUS = "previous"
BETA, RATE = 0.1, 1e-3
STEPS = 3
LORA = LoraConfig(r=16, alpha=32)


def adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """What both train with: transformers' default is fused, and so is ours."""
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)


@dataclass(frozen=True)
class Size:
    """A random Llama with a tied head, and pairs of random tokens."""

    vocabulary: int
    hidden: int = 512
    layers: int = 6
    pairs: int = 32
    prompt: int = 64
    shortest: int = 64
    longest: int = 192

    def trees(self) -> list[Tree]:
        random = np.random.default_rng(0)

        def tokens(low: int, high: int) -> np.ndarray:
            length = random.integers(low, high + 1)
            return random.integers(5, self.vocabulary, length).astype(np.int32)

        pair = (self.shortest, self.longest)
        return [
            Tree(tokens(self.prompt, self.prompt), (tokens(*pair), tokens(*pair)))
            for _ in range(self.pairs)
        ]

    def folder(self, folder: Path) -> Path:
        """Base, tokenizer, and the previous iterate's adapter, from which the policy starts."""
        measure.llama(self.vocabulary, self.hidden, self.layers, end=1).save_pretrained(folder)
        words = {word: number for number, word in enumerate(("<pad>", "<eos>", "a", "b", "c"))}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
        ).save_pretrained(folder)
        backbone = base(folder)
        backbone.add_adapter(PREVIOUS, LORA, seed=0, iteration=0)
        generator = torch.Generator().manual_seed(0)
        state = backbone.adapter_state(PREVIOUS)
        noise = {k: 0.01 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
        backbone.set_adapter_state(PREVIOUS, {k: v + noise[k] for k, v in state.items()})
        (folder / PREVIOUS).mkdir()
        backbone.save_adapter(PREVIOUS, folder / PREVIOUS)
        return folder


def base(folder: Path) -> Backbone:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_base(str(folder), dtype="auto", device=device)[0]


class Variant:
    """A way to take optimiser steps on the same pairs."""

    optimizer: torch.optim.Optimizer

    def use(self, trees: list[Tree]) -> None:
        """Take these pairs, with references of 0."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Compute the references once, where they are precomputed."""

    def step(self) -> float:
        """One optimiser step; the loss before it."""
        raise NotImplementedError


class Ours(Variant):
    """The trainer's own step: `accumulate_gradients` and the optimiser."""

    def __init__(
        self,
        folder: Path,
        micro: int,
        alpha: float = 1.0,
        mode: str = "cached",
        beta: float = BETA,
        skip: bool = True,
        **train: Any,
    ):
        self.backbone = base(folder)
        for name in (POLICY, PREVIOUS):
            self.backbone.load_adapter(name, folder / PREVIOUS)
        self.micro, self.alpha, self.mode, self.settings = micro, alpha, mode, train
        self.beta, self.skip = beta, skip  # pairs with equal responses, as methods.spin does
        self.parameters = self.backbone.policy_parameters()
        self.optimizer = adamw(self.parameters.values())

    def use(self, trees: list[Tree]) -> None:
        self.trees = trees
        self.references: list[tuple[float, ...]] = [(0.0, 0.0)] * len(trees)
        parts = max(1, len(trees) // self.micro)
        self.train = TrainConfig(batch_size=len(trees), accumulation=parts, **self.settings)

    @property
    def policies(self) -> list[str | None]:
        return [PREVIOUS, None] if self.alpha < 1 else [PREVIOUS]

    def mix(self, *logps: Tensor) -> Tensor:
        return mixture_reference(logps[0], logps[-1], alpha=self.alpha)

    def prepare(self) -> None:
        if self.mode != "cached":
            return
        cache = ReferenceCache()
        score(self.backbone, cache, self.policies, self.trees, self.train.scored_together)
        ids = [self.backbone.adapter_ids[policy] for policy in self.policies]
        logps = [torch.tensor([cache.lookup(i, tree) for tree in self.trees]) for i in ids]
        self.references = [tuple(row) for row in self.mix(*logps).tolist()]

    def step(self) -> float:
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        online = None
        if self.mode != "cached":
            online = OnlineReference(tuple(self.policies), self.mix, self.mode == "joint")
        job = Job(
            objective=lambda policy, reference, lengths: DPO(beta=(self.beta,))(
                policy, reference, lengths, 0
            ),
            config=self.train,
            beta=self.beta,
            iteration=0,
            seed=0,
            stage="benchmark",
            checkpoints=Path("unused"),
            online=online,
        )
        examples = [
            Example(t, r, informative=not (self.skip and np.array_equal(*t.responses)))
            for t, r in zip(self.trees, self.references, strict=True)
        ]
        values = accumulate_gradients(Team(self.backbone.device), self.backbone, examples, job, 0)
        self.optimizer.step()
        return values["loss"]


class Unshared(Ours):
    """Packed, each response with a prompt of its own."""

    def logps(self, policy: str | None) -> Tensor:
        trees = [Tree(tree.prompt, (y,)) for tree in self.trees for y in tree.responses]
        batch = collate([(policy, trees)], layout="packed").to(self.backbone.device)
        return sequence_logps(self.backbone, batch)

    def step(self) -> float:
        self.optimizer.zero_grad()
        self.backbone.train()
        if self.mode == "cached":
            reference_B2 = torch.tensor(self.references, device=self.backbone.device)
        else:
            with torch.no_grad():
                reference_B2 = self.mix(*[self.logps(policy) for policy in self.policies]).view(
                    -1, 2
                )
        policy_B2 = self.logps(POLICY).view(-1, 2)
        lengths = torch.ones_like(policy_B2)
        loss = DPO(beta=(BETA,))(policy_B2, reference_B2, lengths, 0).mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class Separate(Unshared):
    """Packed and shared, but a pass for each policy."""

    def logps(self, policy: str | None) -> Tensor:
        batch = collate([(policy, self.trees)], layout="packed").to(self.backbone.device)
        return sequence_logps(self.backbone, batch)


class Naive(Unshared):
    """Padded rows, the logits of all positions, a pass for each policy."""

    def logps(self, policy: str | None) -> Tensor:
        parts = [(t.prompt, y) for t in self.trees for y in t.responses]
        width = max(len(prompt) + len(y) for prompt, y in parts)
        ids, seen, scored = (torch.zeros(len(parts), width, dtype=torch.long) for _ in range(3))
        for row, (prompt, y) in enumerate(parts):
            end = len(prompt) + len(y)
            ids[row, :end] = torch.from_numpy(np.concatenate([prompt, y])).long()
            seen[row, :end], scored[row, len(prompt) : end] = 1, 1
        ids, seen, scored = (x.to(self.backbone.device) for x in (ids, seen, scored))
        self.backbone.routed([Segment(policy, 0, len(parts))])
        model: Any = self.backbone.model
        logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
        logps = torch.log_softmax(logits[:, :-1].float(), -1)
        return (logps.gather(2, ids[:, 1:, None])[..., 0] * scored[:, 1:]).sum(1)


class Trl(Variant):
    """`DPOTrainer`'s own collator and loss with precomputed references, and the same optimiser.

    The Trainer's loop around them is left out, in TRL's favour. `padding_free` is not set: TRL 1.16
    says that it ignores it.
    """

    def __init__(self, folder: Path, micro: int, beta: float = BETA):
        from trl import DPOConfig, DPOTrainer

        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model = PeftModel.from_pretrained(plain, str(folder / PREVIOUS), is_trainable=True)
        self.output = tempfile.TemporaryDirectory()
        args = DPOConfig(
            output_dir=self.output.name,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            activation_checkpointing=False,
            max_length=None,
            report_to="none",
            beta=beta,
        )
        # Text, because DPOTrainer tokenises for itself; the ids that it is given come below.
        text = {"prompt": "a", "chosen": " b", "rejected": " c"}
        self.trainer = DPOTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list([text]),
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        )
        self.micro = micro
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        self.optimizer = adamw(trained)

    def use(self, trees: list[Tree]) -> None:
        self.features: list[dict[str, Any]] = [
            {
                "prompt_ids": tree.prompt.tolist(),
                "chosen_ids": tree.responses[0].tolist(),
                "rejected_ids": tree.responses[1].tolist(),
                "ref_chosen_logps": 0.0,
                "ref_rejected_logps": 0.0,
            }
            for tree in trees
        ]
        self.trainer.precompute_ref_logps = True

    def batches(self) -> list[Any]:
        starts = range(0, len(self.features), self.micro)
        parts = [self.features[i : i + self.micro] for i in starts]
        device = self.trainer.accelerator.device
        return [
            {key: value.to(device) for key, value in self.trainer.data_collator(part).items()}
            for part in parts
        ]

    def prepare(self) -> None:
        model = self.trainer.model
        parts = [self.trainer.compute_ref_log_probs(model, batch) for batch in self.batches()]
        chosen, rejected = (torch.cat(side).tolist() for side in zip(*parts, strict=True))
        for feature, w, l in zip(self.features, chosen, rejected, strict=True):  # noqa: E741
            feature |= {"ref_chosen_logps": w, "ref_rejected_logps": l}

    def step(self) -> float:
        self.optimizer.zero_grad()
        self.trainer.model.train()
        batches, total = self.batches(), 0.0
        for batch in batches:
            loss = self.trainer.compute_loss(self.trainer.model, batch) / len(batches)
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        return total


class Floor(Variant):
    """The matrix products of a step, and nothing else; with `shared`, each prompt once."""

    def __init__(self, folder: Path, shared: bool = True):
        self.shared = shared
        backbone = base(folder)
        self.head = backbone.head.weight
        linears = [m for m in backbone.decoder.modules() if isinstance(m, torch.nn.Linear)]
        self.weights = [linear.weight for linear in linears]
        self.adapters = [
            (w.new_ones(LORA.r, w.shape[1]), w.new_ones(len(w), LORA.r)) for w in self.weights
        ]

    def use(self, trees: list[Tree]) -> None:
        if not self.shared:
            trees = [Tree(tree.prompt, (y,)) for tree in trees for y in tree.responses]
        batch = collate([(None, trees)], layout="packed")
        self.tokens, self.targets = batch.input_ids.numel(), len(batch.targets)

    @torch.no_grad()
    def step(self) -> float:
        for weight_OI, (a_RI, b_OR) in zip(self.weights, self.adapters, strict=True):
            x_TI = weight_OI.new_ones(self.tokens, weight_OI.shape[1])
            low_TR = x_TI @ a_RI.T
            y_TO = (x_TI @ weight_OI.T).addmm_(low_TR, b_OR.T)
            low_TR = y_TO @ b_OR
            (y_TO @ weight_OI).addmm_(low_TR, a_RI)
            low_TR.T @ x_TI, y_TO.T @ low_TR
        hidden_NH = self.head.new_ones(self.targets, self.head.shape[1])
        for part_VH in self.head.split(4096):
            logits_NV = hidden_NH @ part_VH.T
            logits_NV @ part_VH
        return math.nan


@dataclass
class Row:
    """What was measured of a variant."""

    wall: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: int | None = None

    @property
    def seconds(self) -> float:
        return statistics.median(self.wall)


@dataclass(frozen=True)
class Case:
    """Variants that take the same steps; those of one group must have the same losses."""

    size: Size
    groups: list[dict[str, Callable[[Path], Variant]]]
    goals: Callable[[dict[str, Row]], list[Goal]]

    @property
    def variants(self) -> dict[str, Callable[[Path], Variant]]:
        return {label: make for group in self.groups for label, make in group.items()}


FLOOR, OURS, TRL = "matrix products alone", "alphaspin, cached", "TRL DPOTrainer"
MIXTURE = "alphaspin, mixture"


def throughput(vocabulary: int, pairs: int, **lengths: int) -> Case:
    """One reference against TRL's, and the mixture of two against three naive passes."""
    ways = {f"{pairs} pairs at once": pairs, "one pair at a time": 1}
    single: dict[str, Callable[[Path], Variant]] = {
        f"{name}, {way}": partial(kind, micro=micro)
        for name, kind in ((OURS, Ours), (TRL, Trl))
        for way, micro in ways.items()
    }
    mixture: dict[str, Callable[[Path], Variant]] = {
        f"{MIXTURE}, online": partial(Ours, micro=pairs, alpha=0.7, mode="online"),
        "three padded passes, full logits": partial(Naive, micro=pairs, alpha=0.7, mode="online"),
    }

    def goals(rows: dict[str, Row]) -> list[Goal]:
        theirs = min(rows[f"{TRL}, {way}"].seconds for way in ways)
        ours = min(rows[f"{OURS}, {way}"].seconds for way in ways)
        online = rows[f"{MIXTURE}, online"].seconds
        found = [
            # A cached reference is two numbers a pair, whatever it is a mixture of.
            Goal("throughput, cached reference / TRL", theirs / ours, 5, " ×", True),
            Goal("throughput, online mixture / TRL", theirs / online, 5, " ×", True),
            Goal(
                "throughput, matrix products alone / TRL",
                theirs / rows[FLOOR].seconds,
                5,
                " ×",
                True,
            ),
            Goal("the floor / our step", rows[FLOOR].seconds / ours, 0.75, "", True),
        ]
        for way in ways:
            mine, other = rows[f"{OURS}, {way}"].memory, rows[f"{TRL}, {way}"].memory
            if mine and other:
                found.append(Goal(f"memory / TRL, {way}", mine / other, 1 / 3))
        return found

    size = Size(vocabulary, pairs=pairs, **lengths)
    return Case(size, [{FLOOR: Floor}, single, mixture], goals)


def references(vocabulary: int, pairs: int) -> Case:
    """What each way to the mixture reference costs."""
    both = {"micro": pairs, "alpha": 0.7}
    group: dict[str, Callable[[Path], Variant]] = {
        "cached": partial(Ours, **both),
        "online": partial(Ours, mode="online", **both),
        "joint": partial(Ours, mode="joint", **both),
        "three passes": partial(Separate, mode="online", **both),
    }

    def goals(rows: dict[str, Row]) -> list[Goal]:
        online = rows["online"].seconds - rows["cached"].seconds
        forward = rows["a policy forward"].seconds
        return [
            Goal("online reference / policy forwards", online / forward, 1, " ×"),
            Goal("the same for each of the two", online / forward / 2, 1, " ×"),
        ]

    forward = {"a policy forward": partial(Forward, micro=pairs)}
    return Case(Size(vocabulary, pairs=pairs), [group, forward], goals)


class Forward(Ours):
    """The policy's log-probs alone, with the graph."""

    def step(self) -> float:
        batch = collate([(POLICY, self.trees)], layout="packed").to(self.backbone.device)
        sequence_logps(self.backbone.train(), batch)
        return math.nan


def sharing(vocabulary: int, pairs: int) -> Case:
    """A prompt as long as its responses, computed once or twice."""
    size = Size(vocabulary, pairs=pairs, prompt=128, shortest=128, longest=128)
    group: dict[str, Callable[[Path], Variant]] = {
        "prompt shared": partial(Ours, micro=pairs),
        "packed, not shared": partial(Unshared, micro=pairs),
    }
    floors: dict[str, Callable[[Path], Variant]] = {
        f"{FLOOR}, shared": Floor,
        f"{FLOOR}, not shared": partial(Floor, shared=False),
    }

    def goals(rows: dict[str, Row]) -> list[Goal]:
        gain = rows["packed, not shared"].seconds / rows["prompt shared"].seconds
        bound = rows[f"{FLOOR}, not shared"].seconds / rows[f"{FLOOR}, shared"].seconds
        return [
            Goal("throughput, shared / not shared", gain, 1.2, " ×", True),
            Goal(f"the same of the {FLOOR}", bound, 1.2, " ×", True),
        ]

    return Case(size, [group, floors], goals)


CASES: dict[str, Callable[[], Case]] = {
    "end-to-end-35m-32k": lambda: throughput(32_000, 8),
    "end-to-end-85m-128k": lambda: throughput(128_000, 4),
    "end-to-end-gsm8k-lengths": lambda: throughput(32_000, 8, prompt=59, shortest=36, longest=106),
    "end-to-end-reference": lambda: references(32_000, 8),
    "end-to-end-sharing": lambda: sharing(32_000, 8),
}
if torch.cuda.is_available():  # a billion parameters, a head as large as a decoder of six layers
    long = {"hidden": 2048, "layers": 16, "prompt": 256, "shortest": 128, "longest": 512}
    CASES = {"end-to-end-1b-128k": lambda: throughput(128_256, 16, **long)} | CASES


def smaller(case: Case) -> Case:
    small = Size(300, hidden=64, layers=2, pairs=case.size.pairs, prompt=6, shortest=5, longest=9)
    return replace(case, size=small)


def memory(name: str, label: str, folder: Path) -> None:
    """Print the growth of the resident set in one step, in KiB."""
    case = CASES[name]()
    variant = case.variants[label](folder)

    def warm_up() -> None:
        variant.use(smaller(case).size.trees()[:1])
        variant.step()

    def run() -> None:
        variant.step()

    warm_up()
    variant.use(case.size.trees())
    print(measure.growth(lambda: None, run))


def on_gpu() -> int | None:
    """Bytes allocated there, from which the peak is counted from now on; None without one."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def measured_memory(name: str, label: str, folder: Path) -> int:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    printed = subprocess.run(
        [sys.executable, __file__, name, label, str(folder)],
        env=os.environ | {"PYTHONPATH": ":".join(paths)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return int(printed.split()[-1]) << 10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_end_to_end(
    name: str, measuring: bool, record: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    case = CASES[name]() if measuring else smaller(CASES[name]())
    folder = case.size.folder(tmp_path / "model")
    trees = case.size.trees()
    variants = {label: make(folder) for label, make in case.variants.items()}
    rows = {label: Row() for label in variants}
    for variant in variants.values():
        variant.use(trees)
        variant.prepare()
    for _ in range(STEPS):
        for label, variant in variants.items():
            before = on_gpu()
            started = time.perf_counter()
            rows[label].losses.append(variant.step())
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            rows[label].wall.append(time.perf_counter() - started)
            if before is not None:
                rows[label].memory = torch.cuda.max_memory_allocated() - before
    for group in case.groups:
        first = rows[next(iter(group))].losses
        for label in group:  # the floor has no loss
            # In bf16 each way rounds on its own.
            near = 2e-2 if torch.cuda.is_available() else 2e-3
            np.testing.assert_allclose(rows[label].losses, first, rtol=near, err_msg=label)
    del variants
    if measuring and not torch.cuda.is_available():
        for label in rows:
            rows[label].memory = measured_memory(name, label, folder)
    finish(name, case, trees, rows, record)


def finish(
    name: str, case: Case, trees: list[Tree], rows: dict[str, Row], record: Callable[..., Path]
) -> None:
    header = ["variant", "s a step", "pairs/s", "tokens/s", "MiB", "losses"]
    tokens = sum(2 * len(tree.prompt) + sum(map(len, tree.responses)) for tree in trees)
    table = [
        [
            label,
            f"{row.seconds:.2f}",
            f"{len(trees) / row.seconds:.2f}",
            f"{tokens / row.seconds:.0f}",
            "" if row.memory is None else f"{row.memory / 2**20:.0f}",
            ", ".join(f"{loss:.4f}" for loss in row.losses if loss == loss),
        ]
        for label, row in rows.items()
    ]
    goals = case.goals(rows)
    lines = [["measure", "goal", "measured", ""], ["---"] * 4, *(goal.row() for goal in goals)]
    text = (
        f"{len(trees)} pairs a step, {tokens} tokens as TRL counts them; {case.size}. "
        f"Medians of {STEPS} interleaved steps. MiB: peak of one step above the loaded model. "
        f"{measure._load()}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
    )
    raw = {label: vars(row) for label, row in rows.items()}
    path = record(name, header, table, text, raw)
    print("\n" + path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    memory(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
