"""What an evaluation found: the record that is written, read again, tabled and plotted."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from alphaspin.errors import InputError


class Measures(BaseModel):
    """One policy's held-out measures, each one number: a row of `summary.json`.

    name: `base`, or t of an iterate, or `sft t` of the control. A measure's standard error over
    prompts ends with `_se`. nll: mean of -lp(demonstration), nats per answer; nll_per_token: the
    same over all tokens, nats. sampled, greedy: exact match, shares. margin: mean over prompts of
    β [(lp_t - lp_base)(demonstration) - (lp_t - lp_base)(base's sampled answer)] where they differ.
    preferred: share of prompts on which the sampled answer is preferred to the base's, ties counted
    half. kl: mean of lp_t - lp_base of the sampled answers, an unbiased estimate of KL(π_t‖π_base),
    nats per answer, and entropy: of -lp_t, which estimates π_t's entropy; both None where answers
    are not drawn from π_t itself (temperature, top_p, top_k); earlier versions had no entropy.
    length: mean tokens of the sampled answers. distinct_1 to 3, self_bleu: diversity of the sampled
    answers, see `diversity`. Of prompts without demonstrations nll, sampled, greedy, margin and
    preferred are None.

    With a judge: judged: mean of P(sampled answer ≻ the base's). controlled: the win rate at equal
    length in characters. low and high are the ends of a 95 % confidence interval, see `winrate`.
    """

    model_config = ConfigDict(frozen=True)

    name: Annotated[str, Field(pattern=r"^(base|(sft )?[0-9]+)$")]
    nll: float | None = None
    nll_se: float | None = None
    nll_per_token: float | None = None
    sampled: float | None = None
    sampled_se: float | None = None
    greedy: float | None = None
    greedy_se: float | None = None
    margin: float | None = None
    margin_se: float | None = None
    preferred: float | None = None
    preferred_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    entropy: float | None = None
    entropy_se: float | None = None
    length: float | None = None
    length_se: float | None = None
    distinct_1: float | None = None
    distinct_2: float | None = None
    distinct_3: float | None = None
    self_bleu: float | None = None
    judged: float | None = None
    judged_se: float | None = None
    judged_low: float | None = None
    judged_high: float | None = None
    controlled: float | None = None
    controlled_low: float | None = None
    controlled_high: float | None = None

    @property
    def control(self) -> bool:
        """Whether this is the control and no iterate of self-play."""
        return self.name.startswith("sft ")

    @property
    def iteration(self) -> int:
        """t; -1 for the base, which precedes iteration 0."""
        return -1 if self.name == "base" else int(self.name.removeprefix("sft "))

    def numbers(self) -> dict[str, Any]:
        """The name and the measures that there are."""
        return self.model_dump(include=set(Measures.model_fields), exclude_none=True)


class Evaluation(Measures):
    """One policy's measures, and the answers on the held-out prompts that they come from.

    answers: sampled, as text; answer_tokens, truncated: the same. demonstration_logps: lp_t of each
    demonstration; base_answer_logps: lp_t of the base's sampled answer; nats. inputs: hash of all
    that these depend on. judge: its name; verdicts: its P(sampled answer ≻ the base's) by prompt.
    """

    model_config = ConfigDict(extra="forbid")

    answers: list[str]
    greedy_answers: list[str]
    answer_tokens: list[list[int]]
    truncated: list[bool]
    demonstration_logps: list[float]
    base_answer_logps: list[float]
    inputs: str = ""
    judge: str | None = None
    verdicts: list[float] | None = None

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(self.model_dump()), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Read what `save` wrote.

        Raises:
            InputError: a version with other measures wrote it.
        """
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            raise InputError(
                f"{path}: not what this version of alphaspin writes; move its folder away, and "
                "evaluate again"
            ) from None
