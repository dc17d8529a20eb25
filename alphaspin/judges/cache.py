"""Verdicts on disk: no question is put twice, neither within a run nor after a kill."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from alphaspin.foundation.artefacts import write_atomically
from alphaspin.judges.base import Comparison, Judge, checked_verdicts, key_of


def _line(content: str) -> bytes:
    """A record of the cache: hash of the content, the content. It begins its own line, so that a
    torn record before it does not swallow it."""
    digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    return f"\n{digest} {content}".encode()


class CachedJudge:
    """A judge whose verdicts are durable in a file that only grows.

    One record per group of verdicts, flushed to disk before it is handed on, with a hash: one that
    was torn by a kill, or is damaged, does not count and is asked again. Verdicts are found by
    hash of the judge's identity, the prompt with its answer, and both responses in their order, so
    several judges may share a file; several processes at the same time may not.
    """

    def __init__(self, judge: Judge, path: Path):
        """Read what is there. `path` is made with the first verdict; its folder must exist."""
        self._judge = judge
        self._path = path
        self._verdicts: dict[str, float] = {}
        self.asked = 0
        """Questions put to the judge by this object."""
        for record in path.read_bytes().split(b"\n") if path.exists() else ():
            content = record[17:].decode(errors="replace")
            if record and b"\n" + record == _line(content):
                self._verdicts |= json.loads(content)

    @property
    def identity(self) -> str:
        """The judge's."""
        return self._judge.identity

    @property
    def both_orders(self) -> bool:
        """The judge's."""
        return self._judge.both_orders

    def compare(self, pairs: Sequence[Comparison]) -> Iterator[Mapping[int, float]]:
        """What is known, then the judge's groups as they become durable."""
        keys = [key_of(self.identity, pair).hex() for pair in pairs]
        known = {i: self._verdicts[key] for i, key in enumerate(keys) if key in self._verdicts}
        yield known
        rest = [i for i in range(len(pairs)) if i not in known]
        if not rest:
            return
        self.asked += len(rest)
        for group in checked_verdicts(self._judge, [pairs[i] for i in rest]):
            found = {rest[i]: float(verdict) for i, verdict in group.items()}
            record = {keys[i]: verdict for i, verdict in found.items()}
            self._append(json.dumps(record))
            self._verdicts |= record
            yield found

    def _append(self, content: str) -> None:
        if not self._path.exists():
            write_atomically(self._path, "")  # durable as an entry of its folder
        with self._path.open("ab") as file:
            file.write(_line(content))
            file.flush()
            os.fsync(file.fileno())
