"""The processes of one job: who does what, and what they tell each other.

All processes walk through the same phases. A phase's shards and a step's micro-batches are dealt
out in turn, process k taking k, k+P, …; what is made once (adapters, metrics, verdicts) is made by
process 0. None goes on before what it will read is durable, and an error or a signal in one process
stops all of them at the same point (`Team.together`). What one has made the others read in the run
folder, which all must see: several nodes need a file system in common.

The frozen base is copied to every process, or sharded (`Team.shard`). A pass through a sharded base
is a collective operation that all processes must join, while phases like sampling need more passes
in one process than in another. So there each pass is announced, and a process that is done joins
the others' passes with a single token until all are done.
"""

import json
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from alphaspin.errors import EXIT_CODES, Elsewhere, Interrupted, exit_code
from alphaspin.foundation.runs import SignalGuard
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import Segment

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long a process waits for others that sample, score or judge. It is no safeguard against a
death, which closes the connection and ends the wait at once."""


class Team:
    """This process, its number among the job's processes, and its line to them."""

    def __init__(
        self,
        device: torch.device,
        guard: SignalGuard | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Process `rank` of `world_size`; where several, all call this at once."""
        self.device = device
        self.guard = guard
        self.rank = rank
        self.world_size = world_size
        self.main = rank == 0
        # Small messages between hosts go over gloo even where gradients go over NCCL.
        self._line = dist.new_group(backend="gloo", timeout=PATIENCE) if world_size > 1 else None
        self._sharded: Backbone | None = None
        self._announcing = False

    @classmethod
    def of(cls, accelerator: Accelerator, guard: SignalGuard) -> "Team":
        """The processes that `accelerate launch` or torchrun started; else this one alone."""
        return cls(accelerator.device, guard, accelerator.process_index, accelerator.num_processes)

    @property
    def interrupted(self) -> bool:
        """Whether a signal came to this process."""
        return self.guard is not None and self.guard.requested

    # What is said

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, in their order; numbers, texts, lists, dicts with text keys."""
        if self.world_size == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        self._wait(
            dist.all_gather(lengths, torch.tensor([len(content)]), self._line, async_op=True)
        )
        longest = max(int(length) for length in lengths)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        content = torch.nn.functional.pad(content, (0, longest - len(content)))
        self._wait(dist.all_gather(texts, content, self._line, async_op=True))
        return [
            json.loads(text[: int(length)].numpy().tobytes())
            for text, length in zip(texts, lengths, strict=True)
        ]

    def sum(self, values: Tensor) -> None:
        """Replace `values`, on this process's device, by the sum over the processes, in place.

        All get the same bits, and the same ones each time.
        """
        if self.world_size > 1:
            dist.all_reduce(values)

    @contextmanager
    def together(self) -> Generator[None]:
        """All processes run the body, each its part of it, and none goes on before the others.

        Raises:
            Exception: the body's, in the first process in which it failed.
            Interrupted: a signal came to one of the processes, in the first of these.
            Elsewhere: in all others.
        """
        assert not self._announcing, "together within together"
        if self.world_size == 1:
            self._announcing = True
            try:
                yield
            finally:
                self._announcing = False
            if self.interrupted:
                raise Interrupted
            return
        error: Exception | None = None
        self._announcing = True
        try:
            yield
        except tuple(EXIT_CODES) as caught:
            error = caught
        self._join_passes()
        self._announcing = False
        if error is None and self.interrupted:
            error = Interrupted()
        codes: list[int] = self.gather(0 if error is None else exit_code(error))
        first = next((i for i, code in enumerate(codes) if code), None)
        if first is None:
            return
        if first == self.rank:
            assert error
            raise error
        raise Elsewhere(codes[first])

    def each(
        self,
        items: Sequence[T],
        work: Callable[[int, T], None],
        others: Callable[[int, T], None] = lambda number, item: None,
    ) -> None:
        """Deal out items: `work(number, item)` on one's own, `others` on the rest when it is done.

        A round of one item per process at a time, so that a signal or an error is heard of after
        an item and not after all of them.
        """
        for start in range(0, len(items), self.world_size):
            dealt = list(enumerate(items[start : start + self.world_size], start))
            with self.together():
                for number, item in dealt[self.rank : self.rank + 1]:
                    work(number, item)
            for number, item in dealt:
                if number != start + self.rank:
                    others(number, item)

    def spread(self, work: Callable[[Sequence[int]], Sequence[T]], count: int) -> list[T]:
        """All `count` results of work(indices) → results, which `gather` must take, by index."""
        indices = range(self.rank, count, self.world_size)
        mine: Sequence[T] = []
        with self.together():
            if indices:
                mine = work(indices)
        parts = self.gather(list(mine))
        return [parts[i % self.world_size][i // self.world_size] for i in range(count)]

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` gives in process 0, which alone runs it; as `gather` takes it."""
        found: T | None = None
        with self.together():
            if self.main:
                found = work()
        return self.gather(found)[0]

    def _wait(self, work: Any) -> None:
        """Wait in Python, where signals are handled."""
        while not work.is_completed():
            time.sleep(0.0005)
        work.wait()

    # A sharded base

    def shard(self, backbone: Backbone) -> None:
        """Spread the frozen base over the processes' devices, layer by layer (FSDP2).

        A layer's weights are gathered when a pass reaches it, for the rows of all policies in that
        pass, and dropped behind it: once more in the backward pass, as whoever shards has no room
        to keep them. Adapters come later and stay whole in every process: they are small, change
        with each iteration, and their gradients are summed as without sharding. The head is
        whole too (V·H numbers), since log-probs are taken straight from its weight, and so is an
        embedding that is tied to it.
        """
        decoder = cast(Any, backbone.decoder)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        head = cast(nn.Parameter, backbone.head.weight)
        parts = [*decoder.layers]
        if decoder.get_input_embeddings().weight is not head:
            parts.append(decoder.get_input_embeddings())
        for part in [*parts, decoder]:
            fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params={head})
        backbone.to(self.device)
        decoder.register_forward_pre_hook(lambda *_: self._announce(), prepend=True)
        self._sharded = backbone

    @property
    def sharded(self) -> bool:
        """Whether every pass, and every backward pass, needs all processes."""
        return self._sharded is not None

    def _announce(self) -> None:
        if self._announcing:
            self._any(True)

    @torch.no_grad()
    def _join_passes(self) -> None:
        """Take part in the others' passes until nobody announces one."""
        if self._sharded is None:
            return
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self._announcing = False  # one announcement a pass, and the loop makes it
        while self._any(False):
            self._sharded.routed([Segment(None, 0, 1)])(input_ids=token, use_cache=False)

    def _any(self, flag: bool) -> bool:
        found = torch.tensor([int(flag)])
        self._wait(dist.all_reduce(found, dist.ReduceOp.MAX, self._line, async_op=True))
        return bool(found)
