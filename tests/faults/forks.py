"""Processes forked from a server that has imported everything and computed nothing."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

from faults.disk import library

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["alphaspin.commands.job", "alphaspin.cli", "alphaspin.report.page"]
)


def fork(target: Callable[..., None], *args: Any) -> Any:
    """A process, not yet started, in which `disk.arm` works."""
    if "FAULTS" not in os.environ:  # the server inherits it when the first process asks for it
        os.environ |= {"FAULTS": str(library()), "LD_PRELOAD": str(library())}
        forkserver.ensure_running()
        del os.environ["LD_PRELOAD"]
    return _CONTEXT.Process(target=target, args=args)
