"""What a method is: which pairs an iteration trains on, and with which objective; one file each.

A method is the section of its own settings (`preference` in recipes, as it was the section of the
judged methods first), with what the loop, the plan and the report ask of it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from alphaspin.data.settings import TextConfig
from alphaspin.evaluation.settings import EvaluateConfig
from alphaspin.foundation.kinds import Kind
from alphaspin.foundation.section import Section
from alphaspin.losses import LOSS
from alphaspin.losses.base import Loss
from alphaspin.losses.dpo import DPO
from alphaspin.losses.reference import ReferenceConfig
from alphaspin.model.settings import LoraConfig
from alphaspin.opponents import OPPONENT
from alphaspin.opponents.base import SelfPlayConfig
from alphaspin.opponents.iterates import History
from alphaspin.sampling.settings import GFlowNetConfig, SamplingConfig
from alphaspin.training.example import REMEDY, Example, Objective
from alphaspin.training.settings import TrainConfig

if TYPE_CHECKING:  # torch's friends take seconds to import, and `--help` need not wait
    from alphaspin.methods.session import Session


class Method(Kind):
    """How an iteration makes pairs of answers, and what it trains on them."""

    judged: ClassVar[bool] = True
    """Whether a judge compares answers."""

    @abstractmethod
    def examples(self, session: Session, iteration: int) -> tuple[list[Example], Objective]:
        """The phases of iteration t before training: what is trained on, and the loss.

        Each phase leaves durable artefacts and begins by looking for them; all of it is a function
        of (seed, t, example).
        """

    def parent(self, iteration: int) -> int:
        """The iterate that iteration t goes on from, which is "the previous one" to all phases."""
        return iteration - 1

    def answers_per_prompt(self) -> int:
        """Answers sampled in training for a prompt."""
        return 1

    def sequences(self, iteration: int) -> int:
        """Responses of a prompt that are trained on, for a control of equal cost."""
        del iteration
        return 2

    @abstractmethod
    def reward_scale(self, config: Sections, iteration: int) -> float:
        """Factor of lp_θ - lp_ref in the rewards that are logged."""

    def remedy(self, config: Sections) -> str:
        """What helps when the log-probs of chosen and rejected fall together."""
        del config
        return REMEDY

    def warning(self, config: Sections) -> str | None:
        """What the theory says against these settings."""
        del config
        return None

    @abstractmethod
    def deed(self, config: Sections, model: str) -> list[str]:
        """What is done, in clauses, the first after "3 iterations of ": for report and card."""


class Sections(Section):
    """The sections that methods look at."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of all randomness, which is a function of (seed, iteration, purpose, example)."""
    method: str = "spin"
    """`spin`: demonstrations against sampled answers (`loss`, `reference`). `t_spin`: the same, and
    those answers against the base's, without a reference (`preference`). `sppo`, `rspo`, `inpo`,
    `comal`, `egpo`: sampled answers against each other, as a `judge` compares them (`preference`).
    `nash_md`: sampled answers against those of a mixture with the base, judged too; one gradient
    pass an iteration. Or `module:Name`, a `Method` of your own."""
    control: Literal["none", "sft"] = "none"
    """`sft` also trains the control: plain further SFT with the same adapter, steps and tokens."""
    text: TextConfig = TextConfig()
    selfplay: Annotated[SerializeAsAny[SelfPlayConfig], BeforeValidator(OPPONENT.read)] = History()
    reference: ReferenceConfig = ReferenceConfig()
    loss: Annotated[SerializeAsAny[Loss], BeforeValidator(LOSS.read)] = DPO()
    preference: SerializeAsAny[Method]
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    gflownet: GFlowNetConfig = GFlowNetConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


def iterations(config: Sections) -> str:
    """How a deed begins."""
    many = config.selfplay.iterations
    return f"{many} iteration{'s' * (many > 1)} of "
