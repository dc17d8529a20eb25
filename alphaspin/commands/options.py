"""Options of the commands that are not those of a run."""

from typing import Annotated, Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationInfo,
    model_validator,
)

from alphaspin.data.settings import TextConfig
from alphaspin.errors import InputError
from alphaspin.evaluation.benchmarks import BENCHMARK
from alphaspin.evaluation.benchmarks.base import Benchmark
from alphaspin.foundation.paths import Expanded, Place, Source
from alphaspin.foundation.section import (
    Fraction,
    Names,
    PositiveInt,
    Section,
    refuse_unused,
)
from alphaspin.judges import JUDGE
from alphaspin.judges.base import JudgeConfig
from alphaspin.judges.verifiable import Verifiable
from alphaspin.sampling.settings import GFlowNetConfig


class GFlowNetRun(Section):
    """Train one sampler of the exact mixture π_adapter^α π_base^(1-α): `alphaspin gflownet`."""

    adapter: Place
    """Folder of the adapter, in PEFT's format."""
    output: Place
    """Folder of the result; the same command goes on with what is there."""
    alpha: Fraction = 0.5
    """Weight α of the adapter."""
    model: Source = "tiny"
    """Frozen base: a Hugging Face folder, a hub id, or `tiny`, the embedded model."""
    data: Source = "tiny"
    """Demonstrations whose prompts are used: as for `alphaspin-train`."""
    split: str = "train"
    """Split of a folder, by the names of its files, or of a hub data set."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of all randomness."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the frozen base: as `train.dtype`."""
    check_prompts: PositiveInt = 64
    """Prompts that were not trained on, for the final comparison with token-level decoding."""
    check_answers: Annotated[int, Field(ge=2)] = 32
    """Answers to each of them."""
    text: TextConfig = TextConfig()
    gflownet: GFlowNetConfig = GFlowNetConfig()

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same, as `Config.identity`."""
        free: dict[str, Any] = {
            "output": True,
            "adapter": True,  # its hash counts, not its place
            "gflownet": {"accumulation", "checkpoint_every"},
            "text": self.text.free(),
        }
        return self.model_dump(mode="json", exclude=free)


def _benchmark(values: Any, info: ValidationInfo) -> Benchmark | None:
    """A benchmark from its name, or from its settings."""
    if values is None:
        return None
    return BENCHMARK.read({"kind": values} if isinstance(values, str) else values, info)


class EvaluateOptions(Section):
    """Compare base, iterates and control of a run: `alphaspin evaluate RUN [--KEY VALUE …]`.

    On held-out prompts, with the run's judge or another. Or --benchmark mt-bench (.questions
    FILE, .grading both, single or pairwise, .max_tokens), alpaca-eval (.outputs FILE, .temperature,
    .max_tokens), open-llm (.version 1 or 2): settings as --benchmark.KEY. Or --tasks.
    """

    model: Source | None = None
    """Where the run's base is now, if it has moved."""
    data: Source | None = None
    """Where the run's data are now, if they have moved and prompts were set aside from them."""

    iterations: Names = ("all",)
    """Iterations t to compare with the base, or `all`; the control after as many steps comes
    along."""
    prompts: PositiveInt | None = None
    """Use only the first of the held-out prompts, or of those of a benchmark."""
    heldout: Source | None = None
    """Other held-out demonstrations than the run's, read as `data` is."""
    judge: Annotated[SerializeAsAny[JudgeConfig], BeforeValidator(JUDGE.read)] = Verifiable()
    """Who compares answers with the base's, or judges a benchmark. With --judge.kind another than
    the run's judge; other keys alone change the run's (a server's address, for instance)."""
    benchmark: Annotated[Benchmark | None, BeforeValidator(_benchmark)] = None
    """`mt-bench`, `alpaca-eval` or `open-llm`, in the place of the comparison, with its settings as
    --benchmark.KEY; see docs/running.md."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness (extra `eval`), as `--benchmark.kind tasks` has them."""
    include_path: Expanded | None = None
    """Folder with further task definitions (YAML)."""
    chat: bool = False
    """Put the prompts of tasks and `open-llm` through the chat template."""
    batch_size: PositiveInt = 8
    """Sequences per pass on the tasks, whose logits are held in full."""

    @model_validator(mode="before")
    @classmethod
    def _tasks(cls, values: dict[str, Any]) -> dict[str, Any]:
        """`tasks` is a benchmark."""
        if not values.get("tasks"):
            return values
        if values.get("benchmark"):
            raise ValueError("tasks and benchmark do not go together: leave one of them out")
        return values | {"benchmark": {"kind": "tasks", "tasks": values["tasks"]}}

    @model_validator(mode="after")
    def _numbers(self) -> "EvaluateOptions":
        self.chosen()
        kind = self.benchmark.kind if self.benchmark else "none"
        users = {key: ("tasks", "open-llm") for key in ("include_path", "chat", "batch_size")}
        refuse_unused(self, "benchmark.kind", kind, users | {"heldout": ("none",)})
        return self

    def chosen(self) -> list[int] | None:
        """The iterations as numbers; None for all."""
        if self.iterations == ("all",):
            return None
        if not all(part.isdecimal() for part in self.iterations):
            shown = " ".join(self.iterations)
            raise ValueError(f"iterations = {shown}: expected numbers, or `all` alone")
        return [int(part) for part in self.iterations]


def _repository(name: str) -> str:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"is no name of a repository: {error}") from None
    return name


class ExportOptions(Section):
    """Write a policy for use elsewhere: `alphaspin export RUN (--to FOLDER | --push NAME)`.

    It is the adapter in PEFT's format, unless --merge is given.
    """

    to: Expanded | None = None
    """Folder to write, which must not exist."""
    push: Annotated[str, AfterValidator(_repository)] | None = None
    """Model repository of the Hugging Face Hub to upload it to, `user/name` or a `name` of your
    own, made where there is none; weights, JSON files and templates of an earlier push go."""
    private: bool = False
    """With --push: make a repository that only its owners see."""
    license: Annotated[str, Field(pattern=r"^[\w.+-]{1,50}$")] | None = None
    """License for the card, as the hub names it (`apache-2.0`); by default that of the base's
    card."""
    iteration: Annotated[int, Field(ge=0)] | None = None
    """Iteration t; by default the last one that is finished."""
    merge: bool = False
    """The base's weights with the adapter added: loads with transformers alone."""
    vllm: bool = False
    """Refuse an adapter that vLLM's LoRA loader does not take."""
    model: Source | None = None
    """Where the run's base is now, if it has moved."""

    @model_validator(mode="after")
    def _go_together(self) -> "ExportOptions":
        if not (self.to or self.push):
            raise ValueError("say where to: --to FOLDER, --push NAME, or both")
        if self.private and not self.push:
            raise ValueError("private has no effect without push: leave it out")
        if self.merge and self.vllm:
            raise ValueError("choose one of --merge and --vllm, which asks for an adapter")
        return self
