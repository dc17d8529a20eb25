"""Passes of fixed shapes as CUDA graphs: launched once, whatever the number of their kernels.

A decoding step is thousands of launches with a few µs of work in each, and starting them costs the
host more than running them costs the GPU. A graph has the kernels of one pass with the places of
all they read and write; it is started as one, on what these places hold by then.

What may be recorded so depends on nothing but those places: no number that the host looks at, no
tensor that is made anew each time. A pass that breaks the first rule cannot be recorded; one that
breaks the second plays something old: so the first replay, on other inputs, is held against the
pass itself.
"""

from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Work = Callable[..., Tensor]

MOST = 64  # graphs at once; some MB each for a large model


def rounded(count: int) -> int:
    """A number of rows of which there are few: four in each octave, at most a quarter more."""
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return -(-count // step) * step


def record(work: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], Tensor], Any]:
    """What `work` does, on the same places, at each call; it runs once. CUDA only.

    Args:
        work: its result and all between lie in memory of the graph's own.
        pool: memory of others that it may share, as returned for one of them, if none of these is
            replayed between a replay of this one and the last look at its result; None for none.

    Returns:
        The replay, and the pool.

    Raises:
        RuntimeError: it waits for the GPU, or there is no memory for its results.
    """
    graph = torch.cuda.CUDAGraph()
    stream, memory = pool or (torch.cuda.Stream(), None)  # a pool belongs to a stream
    torch.cuda.synchronize()
    # By hand: torch.cuda.graph empties the allocator, and stays on its stream after a failure.
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=memory, capture_error_mode="thread_local")
        try:
            output = work()
        except BaseException:
            with suppress(RuntimeError):  # that the capture is void
                graph.capture_end()
            raise
        graph.capture_end()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay, (stream, graph.pool())


@dataclass(slots=True)
class _Kept:
    """A recorded pass, the inputs that it reads, and whether a replay was held against it."""

    inputs: tuple[Tensor, ...]
    replay: Callable[[], Tensor]
    right: bool = False


class Graphs:
    """Passes by what tells them apart; the least recently asked for goes when there are many."""

    def __init__(self, differs: Callable[[Tensor, Tensor], str]):
        """`differs`: what is wrong with a result, given the right one, or nothing."""
        self._kept: dict[Hashable, _Kept] = {}
        self._pool: Any = None
        self._differs = differs

    def forget(self) -> None:
        """What passes read and write has moved."""
        self._kept.clear()
        self._pool = None

    def run(self, key: Hashable, work: Work, *inputs: Tensor) -> Tensor:
        """work(*inputs), whose result is one tensor.

        Args:
            key: equal for passes that differ in the contents of tensors alone. All tensors but the
                inputs stay where they are until `forget`.
            work: may be repeated: twice on the same inputs leaves what once does.
            inputs: of the same shapes and dtypes for the same key.

        Raises:
            RuntimeError: it cannot be recorded, or the recorded pass has another result.
        """
        kept = self._kept.pop(key, None)
        if kept is None:
            result = work(*inputs)  # this also makes what kernels need at their first call
            own = tuple(given.clone() for given in inputs)
            replay, self._pool = record(lambda: work(*own), self._pool)
            kept = _Kept(own, replay)
        else:
            for own, given in zip(kept.inputs, inputs, strict=True):
                own.copy_(given)
            result = kept.replay().clone()  # the next replay writes there
            if not kept.right:
                if problem := self._differs(result, work(*inputs)):
                    raise RuntimeError(problem)
                kept.right = True
        self._kept[key] = kept  # the latest
        if len(self._kept) > MOST:
            del self._kept[next(iter(self._kept))]
        return result
