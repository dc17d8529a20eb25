"""vLLM as a child of this process: started, put to sleep, woken, and ended with it.

A server process and not the library: it may have an environment of its own, its death leaves this
process alone, and its end gives back all memory. It listens at a socket in a folder that is nobody
else's, so no port is taken, no key is needed and nobody else can be behind the address.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from alphaspin.errors import InputError, Interrupted, ServerError
from alphaspin.foundation import keeper
from alphaspin.foundation.openai_api import Client

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM can be told (0.32; `vllm.config.lora.MaxLoRARanks`)."""
LAUNCHERS = ("TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_")
LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
"""What torchrun tells its processes, which vLLM would take for its own place among others."""
SHARE = 0.95
"""Of the GPU memory that the trainer leaves, what vLLM takes."""
CPU_CACHE = 2**30
"""Bytes of keys and values on a CPU."""
START = 1800.0
"""Seconds that a start may take: a large base is read, compiled and captured in graphs."""


def installed(python: str | None) -> Path | None:
    """The folder of the package in the environment of an interpreter; None where it is not there.

    Raises:
        InputError: no such interpreter.
    """
    find = "from importlib.util import find_spec as f; s = f('vllm'); print(s and s.origin or '')"
    try:
        found = subprocess.run(
            [python or sys.executable, "-c", find],
            env=environment(python),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"sampling.vllm_python = {python}: cannot be run: {error}") from None
    return Path(found).parent if found else None


def knows(package: Path, architecture: str) -> bool:
    """Whether vLLM's table of models has an architecture, read without the minute of an import."""
    with contextlib.suppress(OSError):
        registry = package / "model_executor" / "models" / "registry.py"
        return f'"{architecture}"' in registry.read_text(encoding="utf-8")
    return False


def environment(python: str | None) -> dict[str, str]:
    """Of a child that knows nothing of the job's other processes, nor tells of itself outside."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHED and not name.startswith(LAUNCHERS)
    }
    if python:  # whose modules are its own
        kept.pop("PYTHONPATH", None)
    return kept | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_SERVER_DEV_MODE": "1",  # sleep and wake_up
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def room(device: torch.device) -> float:
    """The share of a GPU's memory that a server may take: most of what is free; 1 of a CPU's."""
    if device.type != "cuda":
        return 1.0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return SHARE * free / total


def name_of(device: torch.device) -> str:
    """A GPU as CUDA_VISIBLE_DEVICES has it."""
    index, visible = device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


def placed(devices: Sequence[str], share: float) -> tuple[list[str], dict[str, str]]:
    """Arguments and variables of a server on some GPUs, by `name_of`, or on the CPU without any."""
    own = [
        "--generation-config=vllm",
        "--disable-log-stats",
        "--disable-uvicorn-access-log",
        f"--tensor-parallel-size={len(devices) or 1}",
    ]
    if devices:
        own += [f"--gpu-memory-utilization={share:.3f}", "--enable-sleep-mode"]
        return own, {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
    # On CPUs nothing may wait for a compiler, as vLLM's log-probs would, for minutes, nor be bound
    # to cores that others use too.
    variables = {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return [*own, f"--kv-cache-memory-bytes={CPU_CACHE}", "--enforce-eager"], variables


class Vllm:
    """One server. Of several processes that share it one starts it, and the others `join`."""

    def __init__(self, log: Path, stop: Callable[[], bool] = lambda: False):
        """Nothing is started yet.

        Args:
            log: what the server prints goes there.
            stop: asked while one waits; ends the waiting.
        """
        self.log, self._stop = log, stop
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: str | None = None
        self.place: tuple[str, int] | None = None
        """Its socket, and the process that keeps it."""

    def start(
        self, python: str | None, arguments: Sequence[str], variables: Mapping[str, str]
    ) -> None:
        """Start it; `wait` until it answers.

        Args:
            python: interpreter of the environment that has vLLM; None for this one.
            arguments: of its server, without an address.
            variables: of its environment, beside those of this process.
        """
        self._folder = tempfile.mkdtemp(prefix="alphaspin-")
        socket = f"{self._folder}/vllm"
        command = [python or sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        keep = [sys.executable, "-I", str(keeper.__file__), socket]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*keep, *command, "--uds", socket, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**environment(python), **variables},
                start_new_session=True,  # Ctrl-C is for the run, which finishes its shard
            )
        self.place = socket, self._process.pid

    def join(self, place: tuple[str, int]) -> None:
        """Use what another process of this machine has started."""
        self.place = place

    @property
    def alive(self) -> bool:
        """Whether it has been started and has not ended for good."""
        if self._process:
            return self._process.poll() is None
        with contextlib.suppress(OSError):
            if self.place:
                return bool(Path(f"/proc/{self.place[1]}/cmdline").read_bytes())  # not of the dead
        return False

    def client(self, *, workers: int = 1, timeout: float = 10.0, attempts: int = 1) -> Client:
        """Requests to it."""
        assert self.place
        return Client(
            "http://localhost/v1",
            setting="vllm",
            workers=workers,
            attempts=attempts,
            timeout=timeout,
            socket_path=self.place[0],
        )

    def wait(self) -> None:
        """Until it answers.

        Raises:
            ServerError: it ended, or does not answer; with the last lines of its log.
            Interrupted: a signal came.
        """
        client, deadline = self.client(), time.monotonic() + START
        while True:
            if self._stop():
                raise Interrupted
            with contextlib.suppress(ServerError):
                client.send("http://localhost/health", None, bytes, wanted="health")
                return
            if not self.alive:
                raise self.failure("ended")
            if time.monotonic() > deadline:
                raise self.failure(f"did not answer in {START / 60:g} minutes")
            time.sleep(0.2)

    def allow(self, failures: int) -> None:
        """How often it is begun anew from now on, by itself, when it fails: 0 or 1."""
        if self._process and self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(b"%d" % failures)
                self._process.stdin.flush()

    def revive(self, error: ServerError) -> None:
        """After a request that failed: wait until it answers again; one that hangs is ended first.

        Raises:
            ServerError: as `wait`.
        """
        assert self.place
        if "timed out" in str(error):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.place[1], keeper.signal.SIGUSR1)
        time.sleep(4 * keeper.TICK)  # what has failed may still answer for a moment
        self.wait()

    def ask(self, path: str) -> None:
        """A request without content, to one of the addresses for developers: `/sleep?level=1`."""
        self.client(timeout=START).send(f"http://localhost{path}", {}, bytes, wanted=path)

    def wake(self) -> None:
        """End its sleep; one that does not answer is waited for, as by `revive`.

        Raises:
            ServerError: as `wait`.
        """
        try:
            self.ask("/wake_up")
        except ServerError as error:
            self.revive(error)

    def sleep(self) -> None:
        """Leave the GPU: its base goes to host memory (level 1)."""
        self.ask("/sleep?level=1")

    def failure(self, what: str) -> ServerError:
        """An error with the first and last that the log tells of, or its last lines."""
        text = ""
        with contextlib.suppress(OSError):
            text = self.log.read_text(encoding="utf-8", errors="replace")[-10_000_000:]
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        plain = "\n".join(line for line in lines if "WARNING" not in line)
        errors = re.findall(r"\b[A-Z]\w*(?:Error|Exception): .+", plain)
        told = " | ".join(dict.fromkeys([errors[0], errors[-1]] if errors else lines[-3:]))
        plain = "".join(sign if sign.isprintable() else " " for sign in told)
        return ServerError(f"vLLM {what} (log: {self.log}); last: {plain[:600]}")

    def close(self) -> None:
        """End it, and wait until its memory is free."""
        if self._process:
            assert self._process.stdin
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            shutil.rmtree(self._folder or "", ignore_errors=True)
        self._process = self.place = None
