"""Which engine answers, and a vLLM of the run's own: shared out over its processes, asleep while
the trainer works.

On GPUs each group of `tensor_parallel` processes of a node shares a vLLM on the group's GPUs, which
takes what memory the trainer leaves; asleep (level 1), it keeps the base in host memory and the
adapters' names, and nothing on the GPU but its context. On CPUs each process has its own, which
stays as it is: vLLM has no sleep mode there.
"""

import socket
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from alphaspin.data.chat import ChatFormat
from alphaspin.errors import InputError
from alphaspin.foundation import console, vllm
from alphaspin.foundation.vllm import Vllm
from alphaspin.model.backbone import Backbone
from alphaspin.model.distributed import Team
from alphaspin.model.load import local_path
from alphaspin.sampling.remote import ServerSampler
from alphaspin.sampling.settings import SamplingConfig

SHARED_ON_CPU = False
"""Whether processes share a vLLM on CPUs: version 0.32 there applies an adapter to the rows of the
base in a batch that has both (`lora_ops.bgmv_expand` takes the index -1 for the last adapter)."""
CPU_WORKERS = 32
"""Requests under way on a CPU, so that none takes as long as one that hangs."""
MOST_LORAS = 8
"""Adapters in a batch, of as many players that processes may ask at once."""


INSTEAD = "one at sampling.url; or, where the base fits one device, train.sharding = none"
"""The ways out for a base that is sharded, where vLLM is not there."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run asks of its engine.

    model: folder or hub id. rank: the largest of its adapters. longest: tokens of a prompt with its
    answer. folder: of the run, for the log. local: who needs the local sampler, if anybody.
    """

    model: str
    rank: int
    longest: int
    folder: Path
    local: str | None


def choose(
    config: SamplingConfig, chat: ChatFormat, backbone: Backbone, team: Team, needs: Needs
) -> "ServerSampler | OwnSampler | None":
    """What answers under `sampling.engine`; None is the local sampler, never of a sharded base.

    Raises:
        InputError: an engine that is not there or cannot do what is asked of it; a key that is not
            set; a server with another model's name or too short a context.
    """
    if config.engine == "local":
        return None
    if not config.owned:
        server = ServerSampler(config, chat)
        with team.together():
            if team.main:
                server.check(needs.longest)
        return server
    reason = team.from_main(
        lambda: why_not(config, team.device, needs.rank, needs.local) or _unknown(config, backbone)
    )
    if reason and config.engine == "auto" and not team.sharded:
        console.note(f"sampling.engine = auto: the local sampler answers: {reason}")
        return None
    with team.together():
        if reason:
            raise InputError(
                f"sampling.engine = {config.engine} without sampling.url: {reason}; {INSTEAD}"
                if team.sharded
                else f"sampling.engine = vllm without sampling.url: {reason}; or set it to local"
            )
    return OwnSampler(config, chat, backbone, team, needs)


def check_sharded(
    config: SamplingConfig, device: torch.device, rank: int, local: str | None
) -> None:
    """Whether somebody else than a sharded base answers: it would be gathered for each token.

    Args:
        config: of the run.
        device: of this process.
        rank: the largest of its adapters.
        local: who needs the local sampler, if anybody.

    Raises:
        InputError: nobody does.
    """
    engine, reason = config.engine, None
    if engine == "local":
        reason = "each token of an answer would gather the whole base"
    elif config.owned:
        reason = why_not(config, device, rank, local)
    if reason and local:
        raise InputError(
            f"train.sharding = fsdp: {local} needs the local sampler, in which each token would "
            "gather the whole base: choose another, or train.sharding = none"
        )
    if reason:
        raise InputError(
            f"train.sharding = fsdp with sampling.engine = {engine}: {reason}; let an engine "
            f"answer: sampling.engine = vllm, which the run starts, or {INSTEAD}"
        )


def why_not(
    config: SamplingConfig, device: torch.device, rank: int, local: str | None
) -> str | None:
    """Why no vLLM can be started; with `auto`, why none should be. As for `check_sharded`."""
    auto = config.engine == "auto"
    if auto and local:
        return f"{local} needs it"
    if auto and device.type != "cuda":
        return "there is no GPU"
    package = vllm.installed(config.vllm_python)
    if package is None:
        where = config.vllm_python or "this environment"
        return (
            f"vllm is not installed in {where}: pip install vllm, or, as it pins packages, into an "
            "environment of its own, whose interpreter sampling.vllm_python names"
        )
    if rank > vllm.RANKS[-1]:
        return f"vLLM takes adapters up to rank {vllm.RANKS[-1]}, and {rank} is asked for"
    return None


def _unknown(config: SamplingConfig, backbone: Backbone) -> str | None:
    """With `auto`, that vLLM has no such model."""
    name, package = type(backbone._causal_lm).__name__, vllm.installed(config.vllm_python)
    if config.engine == "auto" and package and not vllm.knows(package, name):
        return f"vLLM's table of models has no {name}"
    return None


class OwnSampler:
    """Sampling from a vLLM that the run starts when it is first asked, and ends."""

    def __init__(
        self,
        config: SamplingConfig,
        chat: ChatFormat,
        backbone: Backbone,
        team: Team,
        needs: Needs,
    ):
        """Divide the processes of each node into groups; all call this at once.

        Raises:
            InputError: their number is no multiple of the groups' size.
        """
        self._config, self._team, self._needs = config, team, needs
        self._bf16 = backbone.head.weight.dtype == torch.bfloat16
        self._longest = min(needs.longest, backbone.max_positions or needs.longest)
        hosts: list[str] = team.gather(socket.gethostname())
        local = [rank for rank, host in enumerate(hosts) if host == hosts[team.rank]]
        self._cuda = team.device.type == "cuda"
        together = team.sharded if self._cuda else SHARED_ON_CPU
        size = config.tensor_parallel or (len(local) if together else 1)
        with team.together():
            if config.tensor_parallel and not self._cuda:
                raise InputError(
                    f"sampling.tensor_parallel = {size}: there is no GPU: leave it out"
                )
            if len(local) % size:
                raise InputError(
                    f"sampling.tensor_parallel = {size} does not divide the {len(local)} "
                    "processes of a node"
                )
        first = local.index(team.rank) // size * size
        self._group = local[first : first + size]
        log = needs.folder / f"vllm-{self._group[0]}.log"
        self._vllm = Vllm(log, lambda: team.interrupted)
        asked = config.workers if self._cuda else min(config.workers, CPU_WORKERS)
        config = config.model_copy(update={"workers": asked})
        self._server = ServerSampler(config, chat, self._vllm)
        self.decode = self._server.decode

    @contextmanager
    def awake(self) -> Generator[None]:
        """All processes call this at once; inside, `decode` is answered.

        Raises:
            ServerError: vLLM cannot be started.
        """
        rooms: list[float] = self._team.gather(vllm.room(self._team.device))
        devices: list[str] = self._team.gather(vllm.name_of(self._team.device))
        group, leads = self._group, self._group[0] == self._team.rank
        with self._team.together():
            if leads and not self._vllm.alive:
                self._vllm.close()
                share = min(rooms[r] for r in group)
                own, variables = vllm.placed([devices[r] for r in group if self._cuda], share)
                arguments = [*self._arguments(), *own, *(self._config.vllm_arguments or ())]
                self._vllm.start(self._config.vllm_python, arguments, variables)
                console.note(f"vLLM starts, which takes minutes; log: {self._vllm.log}")
                self._vllm.wait()
            elif leads and self._cuda:
                self._vllm.wake()
            if leads:
                self._vllm.allow(1)
        places = self._team.gather(self._vllm.place)
        if not leads:
            self._vllm.join(tuple(places[group[0]]))
        self._server.forget()
        yield
        with self._team.together():
            if leads:
                self._vllm.allow(0)  # begun anew, it would take the trainer's memory
                if self._cuda:
                    self._vllm.sleep()

    def _arguments(self) -> list[str]:
        """Of the server; where it is placed follows, and the user's, which hold."""
        rank = next(r for r in vllm.RANKS if r >= self._needs.rank)
        return [
            f"--model={local_path(self._needs.model)}",
            f"--served-model-name={ServerSampler.BASE}",
            f"--dtype={'bfloat16' if self._bf16 else 'float32'}",
            f"--max-model-len={self._longest}",
            "--enable-lora",
            f"--max-lora-rank={rank}",
            f"--max-loras={min(len(self._group), MOST_LORAS)}",
            "--seed=0",
        ]

    def close(self) -> None:
        """End vLLM."""
        self._vllm.close()
