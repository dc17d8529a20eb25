"""Two processes do what one does, sharded or not, and survive the death of one of them.

Processes are forked from a server that has imported everything, and find each other over gloo as
those of `accelerate launch` and torchrun do: by RANK, WORLD_SIZE and MASTER_PORT.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import fake_vllm
import numpy as np
import pytest
import torch
from faults.forks import fork
from helpers import arithmetic, make_model, save_model, tokens, write_rows
from safetensors.torch import load_file, save_file
from test_resume import child, result, settings
from torch.distributed.tensor import DTensor

from alphaspin.commands import job
from alphaspin.errors import EXIT_INPUT, EXIT_RESUMABLE, InputError
from alphaspin.foundation.artefacts import TEMPORARY
from alphaspin.foundation.runs import Metrics, Run
from alphaspin.losses.dpo import DPO
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import collate
from alphaspin.model.distributed import Team
from alphaspin.model.load import load_base
from alphaspin.model.routing import POLICY
from alphaspin.model.settings import LoraConfig
from alphaspin.model.tree import Tree
from alphaspin.training.example import Example
from alphaspin.training.settings import TrainConfig
from alphaspin.training.trainer import Job, accumulate_gradients, train

KINDS = ("sampling", "scoring", "training", "saving")
SWEEP = bool(os.environ.get("ALPHASPIN_SWEEP"))

Fault = tuple[int, tuple[str, int], str]
"""Which process, at which event (kind, k), does what."""


def join(rank: int, port: int, body: Any, *arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    body(*arguments)


def both(body: Any, *arguments: tuple[Any, ...]) -> list[int]:
    """Exit codes of two processes that run `body`, each with its own arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [fork(join, rank, port, body, *own) for rank, own in enumerate(arguments)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in codes, "a process hangs"
    return codes


def gathering(arguments: list[str], *rest: Any) -> None:
    """A run whose sampler may gather a sharded base for each token, as a real one's may not."""
    job.check_sharded = lambda *_: None
    child(arguments, *rest)


def answered(site: Path, *rest: Any) -> None:
    """A run where the vLLM that is none is installed."""
    os.environ["PYTHONPATH"] = f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    os.environ["FAKE_VLLM"] = str(site.parent)
    child(*rest)


def play(
    arguments: list[str], log: Path, fault: Fault | None = None, body: Any = gathering
) -> list[int]:
    """Exit codes of a run of two processes, which log into `log`0 and `log`1."""
    rank, event, action = fault or (0, None, "")
    return both(
        body,
        *((arguments, event if i == rank else None, action, f"{log}{i}") for i in range(2)),
    )


def options(folder: Path, run: Path, **changes: str) -> list[str]:
    """Two micro-batches a step: what two processes add up are the same two numbers as in one.

    Shards are uneven in number and in size, so that the processes' passes through a sharded base
    are too.
    """
    short = {"control": "none", "sampling.shard_size": "5", "train.accumulation": "2"}
    return settings(folder, run, **(short | changes))


def outcome(run: Path) -> dict[str, str]:
    """What neither kills nor the number of processes change, not by a bit."""
    found = result(run, adapters=2)
    # Evaluation decodes other prompts side by side, which moves last digits.
    return {k: v for k, v in found.items() if "evaluation" not in k and k != "rows"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Model and data, and what a single process makes of them."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    rows = arithmetic(28)
    # What repeats stands in one shard only, of whichever process.
    write_rows(folder / "data.jsonl", rows + rows[:12])
    alone = fork(child, options(folder, folder / "alone"), None, "", str(folder / "log"))
    alone.start()
    alone.join()
    assert alone.exitcode == 0, (folder / "log").read_text()
    return folder, outcome(folder / "alone")


@pytest.fixture(scope="module")
def pair(world: tuple[Path, dict[str, str]]) -> list[Counter[str]]:
    """An undisturbed run of two processes: how often each event happened in each."""
    folder, expected = world
    log = folder / "pair"
    assert play(options(folder, folder / "run"), log) == [0, 0], Path(f"{log}0").read_text()
    assert outcome(folder / "run") == expected
    return [Counter(json.loads(Path(f"{log}{i}.events").read_text())) for i in range(2)]


def test_two_processes_do_what_one_does(
    world: tuple[Path, dict[str, str]], pair: list[Counter[str]]
) -> None:
    folder, _ = world
    for kind in ("sampling", "scoring", "training"):
        assert all(events[kind] for events in pair), f"one process took no part in {kind}"
    one, two = (json.loads((folder / run / "summary.json").read_text()) for run in ("alone", "run"))
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert row.pop("name") == other.pop("name")
        assert other == pytest.approx(row, rel=1e-5, abs=1e-6)
    # One writer a file: every record once, and together they write what one writes alone, but for
    # folders that both may find missing.
    alone = json.loads((folder / "log.events").read_text())["saving"]
    assert alone <= sum(events["saving"] for events in pair) <= alone + 8
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    steps = Counter((r["stage"], r["step"]) for r in map(json.loads, lines) if "loss" in r)
    assert set(steps.values()) == {1}


@pytest.mark.parametrize("point", range(6 if SWEEP else 1))
@pytest.mark.parametrize("kind", KINDS)
def test_one_of_the_processes_is_killed(
    world: tuple[Path, dict[str, str]],
    pair: list[Counter[str]],
    tmp_path: Path,
    kind: str,
    point: int,
) -> None:
    folder, expected = world
    number = KINDS.index(kind) + 10 * point
    rank = number % 2
    k = int(np.random.default_rng(number).integers(1, pair[rank][kind], endpoint=True))
    # Sharded runs come to the same bits; sampling and scoring join each other's passes there.
    changes = {"reference.mode": "cached"}
    if (kind == "sampling") != point % 2:
        changes["train.sharding"] = "fsdp"
    arguments, log = options(folder, tmp_path / "run", **changes), tmp_path / "log"
    codes = play(arguments, log, (rank, (kind, k), "SIGKILL"))
    # Nobody is there to kill the other one: it must notice by itself.
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] != 0
    assert play(arguments, log) == [0, 0], Path(f"{log}0").read_text()
    assert outcome(tmp_path / "run") == expected
    assert not list((tmp_path / "run").rglob(f"{TEMPORARY}*"))


def test_a_sharded_base_is_gathered_once_for_all_policies(
    world: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """What `reference.mode: auto` does with a sharded base and one epoch; bits of one process.

    An engine answers in both, and a function of the request, also where the base is evaluated.
    """
    body = partial(answered, fake_vllm.install(tmp_path / "site"))
    folder, changes = world[0], {"sampling.engine": "vllm", "sampling.workers": "2"}
    alone = options(folder, tmp_path / "alone", **{"reference.mode": "joint"}, **changes)
    process = fork(body, alone, None, "", str(tmp_path / "log"))
    process.start()
    sharded = options(folder, tmp_path / "sharded", **{"train.sharding": "fsdp"}, **changes)
    codes = play(sharded, tmp_path / "log", body=body)
    assert codes == [0, 0], (tmp_path / "log0").read_text()
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert "gathered once" in (tmp_path / "log0").read_text()
    found = [
        [
            p.read_bytes()
            for p in sorted((tmp_path / run).glob("iterations/*/adapter/*.safetensors"))
        ]
        for run in ("alone", "sharded")
    ]
    assert found[0] == found[1] and len(found[0]) == 2
    (path,) = (tmp_path / "sharded").glob("iterations/1/evaluation/evaluation.json")
    answers = json.loads(path.read_text())["answer_tokens"]
    # Each after the one before it, as the fake answers, and perhaps an end.
    assert all(ids[k] == 5 + (ids[0] - 5 + k) % 290 for ids in answers for k in range(len(ids) - 1))
    assert max(map(len, answers)) > 2


def test_a_sharded_base_does_not_sample(tmp_path: Path) -> None:
    """Refused before anything is loaded: there is nothing in the model's folder."""
    (tmp_path / "model").mkdir()
    write_rows(tmp_path / "data.jsonl", arithmetic(4))
    arguments = options(tmp_path, tmp_path / "run", **{"train.sharding": "fsdp"})
    assert play(arguments, tmp_path / "log", body=child) == [EXIT_INPUT, EXIT_INPUT]
    told = "".join((tmp_path / f"log{rank}").read_text() for rank in range(2))
    assert "would gather the whole base" in told and "sampling.engine = vllm" in told
    assert not (tmp_path / "run").exists()


def test_a_signal_to_one_stops_all_and_one_can_go_on_alone(
    world: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, expected = world
    # No checkpoint but the one that the signal asks for, of which the other process must hear.
    changes = {"train.checkpoint_every": "50"}
    arguments, log = options(folder, tmp_path / "run", **changes), tmp_path / "log"
    codes = play(arguments, log, (1, ("training", 3), "SIGTERM"))
    assert codes == [EXIT_RESUMABLE, EXIT_RESUMABLE]
    assert len(list((tmp_path / "run").rglob("step-*"))) == 1
    told = [Path(f"{log}{i}").read_text().count("goes on from here") for i in range(2)]
    assert sum(told) == 1
    alone = fork(child, arguments, None, "", str(log))
    alone.start()
    alone.join()
    assert alone.exitcode == 0, log.read_text()
    assert outcome(tmp_path / "run") == expected


def test_an_error_in_one_is_told_once_and_ends_all(
    world: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, _ = world
    log = tmp_path / "log"
    fault = (1, ("saving", 3), "full disk")
    assert play(options(folder, tmp_path / "run"), log, fault) == [EXIT_INPUT, EXIT_INPUT]
    first, second = (Path(f"{log}{i}").read_text() for i in range(2))
    assert "No space left" in second and "Traceback" not in first + second
    assert "error:" not in first and second.count("error:") == 1


def test_other_settings_in_one_process_are_refused(
    world: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, _ = world
    log = tmp_path / "log"
    changed = [options(folder, tmp_path / "run", **{"train.lr": lr}) for lr in ("1e-3", "2e-3")]
    codes = both(child, *((changed[i], None, "", f"{log}{i}") for i in range(2)))
    assert codes == [EXIT_INPUT, EXIT_INPUT]
    assert "process 1 was started with other settings: its config.train.lr is [0.002]" in (
        Path(f"{log}1").read_text()
    )
    assert not (tmp_path / "run").exists()


def test_a_judge_is_asked_by_one_process(
    world: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, _ = world
    changes = {
        "method": "sppo",
        "selfplay.history": "1",
        "selfplay.mixing": "false",
        "selfplay.iterations": "1",
        "reference.alpha": "1.0",
        "loss.nll_weight": "0",
        "preference.responses": "2",
        "judge.kind": "callable",
        "judge.function": "test_distributed:prefers",
    }
    log = tmp_path / "log"
    arguments = options(folder, tmp_path / "two", **changes)
    assert play(arguments, log) == [0, 0], Path(f"{log}0").read_text()
    arguments = options(folder, tmp_path / "one", **changes)
    alone = fork(child, arguments, None, "", str(log))
    alone.start()
    alone.join()
    assert alone.exitcode == 0, log.read_text()
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "verdicts").read_bytes().count(b"\n") == (
        (two / "verdicts").read_bytes().count(b"\n")
    )
    for path in one.rglob("*.safetensors"):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path
    rows = [json.loads((run / "summary.json").read_text())["rows"][-1] for run in (one, two)]
    assert rows[1].pop("name") == rows[0].pop("name")
    assert rows[1] == pytest.approx(rows[0], rel=1e-5, abs=1e-6)


def prefers(pair: Any) -> float:
    assert os.environ.get("RANK", "0") == "0", "asked in a second process"
    return float(np.clip(0.5 + 0.01 * (len(pair.first) - len(pair.second)), 0, 1))


def test_a_job_keeps_its_folder_until_its_last_process_ends(tmp_path: Path) -> None:
    first = Run(tmp_path / "run", {"seed": 1})
    with pytest.raises(InputError, match=f"process {os.getpid()} is working"):
        Run.join(tmp_path / "run", first.owner)  # not shared yet
    first.share()
    second = Run.join(tmp_path / "run", first.owner)
    first.close()
    with pytest.raises(InputError, match=f"process {os.getpid()} is working"):
        Run(tmp_path / "run", {"seed": 1})
    second.close()
    third = Run(tmp_path / "run", {"seed": 1})
    third.share()
    with pytest.raises(InputError, match="not the folder that process 0 opened"):
        Run.join(tmp_path / "run", first.owner)
    with pytest.raises(InputError, match="not the folder that process 0 opened"):
        Run.join(tmp_path / "elsewhere", third.owner)
    third.close()


# Steps of two epochs, compared number by number

CASES: dict[str, dict[str, Any]] = {
    # Micro-batches of unequal sizes; three for two processes become four.
    "plain": {"accumulation": 4},
    "rounded-up": {"accumulation": 3, "dropout": 0.0},
    "one-each": {"accumulation": 1, "dropout": 0.0},
    "fsdp": {"accumulation": 4, "fsdp": True},
    "fsdp-tied-checkpointed": {
        "accumulation": 4,
        "fsdp": True,
        "family": "gemma2",
        "activation_checkpointing": True,
    },
    # One informative example a step: the second process has no work of its own.
    "fsdp-idle": {"accumulation": 2, "fsdp": True, "informative": 1},
}


def two_epochs(team: Team, folder: Path, case: str) -> None:
    """Gradients of the first batch and the adapter after two epochs, into `folder`."""
    options = CASES[case]
    model = make_model(options.get("family", "llama"))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    backbone = Backbone(model, "model", "hash")
    if options.get("fsdp") and team.world_size > 1:
        team.shard(backbone)
    if options.get("activation_checkpointing"):
        backbone.enable_activation_checkpointing()
    lora = LoraConfig(r=2, alpha=4, dropout=options.get("dropout", 0.1))
    backbone.add_adapter(POLICY, lora, seed=0, iteration=0)
    random = np.random.default_rng(0)
    examples = [
        Example(
            Tree(tokens(random, 3, 9), (tokens(random, 2, 9), tokens(random, 2, 9))),
            (-30.0, -30.0),
            informative=i % 7 < options.get("informative", 6),
        )
        for i in range(35 if SWEEP else 21)
    ]
    loss = DPO(beta=(0.1,), nll_weight=0.1)
    job = Job(
        objective=lambda policy, ref, lengths: loss(policy, ref, lengths, 0),
        config=TrainConfig(
            batch_size=7,
            epochs=2,
            accumulation=options["accumulation"],
            lr=(1e-3,),
            checkpoint_every=4,
        ),
        beta=0.1,
        iteration=0,
        seed=0,
        stage="train/0",
        checkpoints=folder / case / "checkpoints",
    )
    parameters = backbone.policy_parameters()
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    values = accumulate_gradients(team, backbone, examples[:7], job, 0)
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    metrics = Metrics(folder / case / "metrics.jsonl", writes=team.main)
    train(team, backbone, examples, job, metrics)
    if team.sharded:  # still, and after a pass without a backward pass again
        with torch.no_grad():
            trees = [example.tree for example in examples[:2]]
            backbone(collate([(POLICY, trees)], layout="packed"))
        for name, parameter in backbone.named_parameters():
            name = name.removeprefix("model.base_model.model.").replace(".base_layer", "")
            if "lora" not in name:
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                share = 1 if parameter is backbone.head.weight else 2
                assert local.numel() == sizes[name] / share, name
    own = folder / case / str(team.rank)
    own.mkdir()
    save_file(gradients, own / "gradients")
    save_file(backbone.adapter_state(POLICY), own / "adapter")
    (own / "values").write_text(json.dumps(values))


def all_cases(folder: Path) -> None:
    from accelerate import Accelerator

    torch.set_num_threads(1)
    team = Team.of(Accelerator(cpu=True), None)
    assert team.world_size == 2
    for case in CASES:
        two_epochs(team, folder, case)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for case in CASES:
        for folder in (one, two):
            (folder / case).mkdir()
        two_epochs(Team(torch.device("cpu")), one, case)
    assert both(all_cases, (two,), (two,)) == [0, 0]
    return one, two


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_adapters_do_not_depend_on_the_number_of_processes(
    steps: tuple[Path, Path], case: str
) -> None:
    one, two = (folder / case for folder in steps)
    for name, bound in (("gradients", 1e-6), ("adapter", 1e-5)):
        expected, *found = (load_file(f / name) for f in (one / "0", two / "0", two / "1"))
        assert max(tensor.abs().max() for tensor in expected.values()) > 1e-3
        for other in found:
            assert other.keys() == expected.keys()
            for key in expected:
                torch.testing.assert_close(other[key], expected[key], rtol=0, atol=bound)
        for key in expected:  # the processes agree to the bit
            assert torch.equal(found[0][key], found[1][key])
    values = json.loads((one / "0/values").read_text())
    for other in (two / "0/values", two / "1/values"):
        assert json.loads(other.read_text()) == pytest.approx(values, rel=1e-5)


@pytest.mark.skipif(not SWEEP, reason="imports everything thrice; needs ALPHASPIN_SWEEP=1")
@pytest.mark.parametrize(("launcher", "processes"), [("torchrun", 2), ("accelerate", 1)])
def test_launchers(
    world: tuple[Path, dict[str, str]], tmp_path: Path, launcher: str, processes: int
) -> None:
    """accelerate starts one process on a CPU, whatever it is told (several need MPI)."""
    folder, expected = world
    module = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes=2"],
    }[launcher]
    command = ["-m", *module, "-m", "alphaspin.cli", *options(folder, tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcome(tmp_path / "run") == expected
    environment = json.loads((tmp_path / "run/summary.json").read_text())["environment"]
    assert environment["processes"] == str(processes)
    assert (tmp_path / "run/report.html").is_file()


def test_processes_of_a_node_share_the_pages_of_a_base(tmp_path: Path) -> None:
    """What is loaded is the mapped file itself; only the head is written to, when it is tried."""
    base = save_model(tmp_path / "base", hidden_size=256, intermediate_size=2048)
    second = torch.device("cpu:1")  # as Accelerate calls it in the second process of a node
    backbone, _ = load_base(str(base), dtype="fp32", device=second)
    backbone.add_adapter(POLICY, LoraConfig(r=2), seed=0, iteration=0)
    mapped, ours, written = list[range](), False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            ours = line.endswith("base/model.safetensors")
            if ours:
                mapped.append(range(*(int(end, 16) for end in words[0].split("-"))))
        elif words[0] == "Anonymous:" and ours:
            written += 1024 * int(words[1])
    frozen = [p for p in backbone.decoder.parameters() if not p.requires_grad]
    assert frozen and mapped
    for p in frozen:
        assert any(p.data_ptr() in part for part in mapped), f"a copy, {tuple(p.shape)}"
    assert written <= backbone.head.weight.nbytes + 2 * os.sysconf("SC_PAGE_SIZE")
