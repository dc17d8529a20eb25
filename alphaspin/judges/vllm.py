"""A generative judge in a vLLM that the run starts, on the main process's GPU."""

import tempfile
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from alphaspin.errors import InputError, ServerError
from alphaspin.foundation import console, vllm
from alphaspin.foundation.artefacts import folder_hash
from alphaspin.foundation.openai_api import Client
from alphaspin.foundation.paths import Place, Source, check_there
from alphaspin.foundation.section import Names, PositiveInt
from alphaspin.judges.base import Judge, JudgeConfig
from alphaspin.judges.server import ServerGrader, ServerJudge

NAME = "judge"
"""Of the model, as the server has it."""


class Served(JudgeConfig):
    """A generative judge that the run itself serves, by vLLM."""

    kind: str = "vllm"
    model: Source
    """Folder or hub id, of a model that follows instructions."""
    vllm_python: Place | None = None
    """Interpreter of the environment in which vLLM is installed; by default this one's."""
    vllm_arguments: Names | None = None
    """Further arguments of the server, as `--max-model-len=4096`."""
    workers: PositiveInt = 32
    """Requests under way at once."""

    free = frozenset({"vllm_python", "workers"})

    def load(self, pattern: str | None) -> Judge:
        """Nothing is started yet."""
        del pattern
        return self._of(ServerJudge, self._server(), counting=False)

    def counting(self, pattern: str | None) -> tuple[Judge, Judge | None]:
        """Nothing is started yet."""
        del pattern
        server = self._server()
        judge, grader = (self._of(k, server, counting=True) for k in (ServerJudge, ServerGrader))
        return judge, grader

    def _server(self) -> vllm.Vllm:
        """Raises InputError: no such model, or no vLLM."""
        check_there("judge.model", self.model)
        if vllm.installed(self.vllm_python) is None:
            where = self.vllm_python or "this environment"
            raise InputError(
                f"judge.kind = vllm: vllm is not installed in {where}: name the interpreter of an "
                "environment that has it by judge.vllm_python, or a server by judge.kind = server"
            )
        return vllm.Vllm(Path(tempfile.mkdtemp(prefix="alphaspin-judge-")) / "vllm.log")

    def _of(self, kind: type[ServerJudge], server: vllm.Vllm, *, counting: bool) -> ServerJudge:
        local = Path(self.model).is_dir()
        which = (
            folder_hash(Path(self.model), ("*.safetensors", "*.json", "*.jinja"))
            if local
            else self.model
        )
        judge = kind(
            "http://localhost/v1",
            NAME,
            counting=counting,
            reach=lambda: self._awake(server),
            identity=f"vllm:{which}",
        )
        weakref.finalize(judge, server.close)
        return judge

    @contextmanager
    def _awake(self, server: vllm.Vllm) -> Generator[Client]:
        """The server, which sleeps otherwise (level 1); on CPUs it stays as it is.

        Raises:
            ServerError: it cannot be started, or ends; with the last lines of its log.
        """
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        if not server.alive:
            server.close()
            devices = [vllm.name_of(device)] if cuda else []
            own, variables = vllm.placed(devices, vllm.room(device))
            arguments = [
                f"--model={self.model}",
                f"--served-model-name={NAME}",
                *own,
                *(self.vllm_arguments or ()),
            ]
            server.start(self.vllm_python, arguments, variables)
            console.note(f"the judge's vLLM starts, which takes minutes; log: {server.log}")
            server.wait()
        elif cuda:
            server.wake()
        try:
            yield server.client(workers=self.workers, timeout=600.0, attempts=3)
        except ServerError:
            if server.alive:
                raise
            raise server.failure("ended") from None
        finally:
            if cuda and server.alive:
                server.sleep()

    def title(self) -> str:
        """With its name."""
        return f"vllm {self.model}"
