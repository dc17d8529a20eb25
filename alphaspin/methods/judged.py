"""What judged methods share: responses of the current iterate, verdicts on them, a reference.

responses   y_1 … y_K ~ π_prev for each prompt
judge       P(y_i ≻ y_j) of all pairs; the best and the worst response of each prompt
reference   lp_prev of the two, and lp_base where it is wanted, in one pass, cached; with a
            mixture as the reference (α < 1) those of all K, for log Z(x)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from alphaspin.foundation import console
from alphaspin.foundation.batched import batched
from alphaspin.foundation.kinds import Need
from alphaspin.foundation.section import PositiveFloat
from alphaspin.judges.base import Comparison, Prompt, preferences
from alphaspin.judges.matrix import Labels, Matrix, Pair, pick_pair, win_probabilities
from alphaspin.losses.reference import mixture_reference
from alphaspin.methods.base import Method, Sections
from alphaspin.model.tree import Tree
from alphaspin.opponents.base import BASE, Player, Shard
from alphaspin.sampling.answer import Answer
from alphaspin.sampling.settings import WEIGHED
from alphaspin.sampling.weights import diagnose
from alphaspin.training.example import Example, Objective

if TYPE_CHECKING:
    from alphaspin.methods.session import Session

Responses = Mapping[int, Sequence[Answer]]
"""Answers to a prompt, by the number of its demonstration."""


class Pointwise(Method):
    """The best and the worst of K responses, each trained on its win probability."""

    responses: Annotated[int, Field(ge=2, le=2**14)] = 5
    """Responses K per prompt; the best and the worst of them are trained on."""
    labels: Labels = "soft"
    """Win probability each is trained on: P̂ against all K (`soft`, the paper), against the other
    one (`single`), 1 and 0 (`hard`), or P̂ of the Bradley-Terry fit (`bradley_terry`)."""
    eta: PositiveFloat = 1000.0
    """η = 1/β: a response with win probability P̂ should gain η(P̂ - ½) nats."""

    uses = ("judge", "reference")
    scores_base: ClassVar[bool] = False
    """Whether the loss takes lp of the base, or of `anchor`."""

    def anchor(self, iteration: int) -> int:
        """The iterate that takes the base's place in the loss."""
        del iteration
        return BASE

    def answers_per_prompt(self) -> int:
        """K."""
        return self.responses

    @abstractmethod
    def loss(
        self, policy_BK: Tensor, reference_BK: Tensor, win_BK: Tensor, base_BK: Tensor | None
    ) -> Tensor:
        """The loss [B] of each pair, the mean of its two responses' as in the public code.

        Args:
            policy_BK: lp_θ of (best, worst, *`beside`), fp32.
            reference_BK: lp of the reference of the first two, then 0; the others alike.
            win_BK: the probability each is trained on.
            base_BK: lp of `anchor`, where `scores_base`.
        """

    def beside(self, session: Session, iteration: int) -> Responses:
        """Further answers to each prompt, as many to each, that the loss takes: none."""
        del session, iteration
        return {}

    def needs(self, config: Any) -> tuple[Need, ...]:
        """Answers that can be weighed, for log Z(x) of a geometric mixture."""
        reference = config.reference
        mixed = reference.kind != "arithmetic" and 0 < reference.alpha < 1
        return (WEIGHED,) if mixed else ()

    def reward_scale(self, config: Sections, iteration: int) -> float:
        """1/η: rewards so aim at P̂ - ½."""
        return 1 / self.eta

    def examples(self, session: Session, iteration: int) -> tuple[list[Example], Objective]:
        """The best and the worst of K responses of the current iterate, and the loss.

        Prompts whose responses all tie teach nothing and are left out.
        """
        with session.timed("responses", iteration):
            responses = sample_responses(session, iteration, self.responses)
            beside = self.beside(session, iteration)
        with session.timed("judge", iteration):
            picked = self.pick(session, iteration, responses)
        chosen = [(e, pair) for e, pair in zip(responses, picked, strict=True) if pair]
        best, worst = [pair.p_best for _, pair in chosen], [pair.p_worst for _, pair in chosen]
        tell_pairs(session, iteration, responses, best, worst, len(responses) - len(chosen))
        with session.timed("reference", iteration):
            groups = [
                Tree(session.demonstrations[e].prompt, tuple(y.tokens for y in responses[e]))
                for e, _ in chosen
            ]
            sides = [(pair.best, pair.worst) for _, pair in chosen]
            anchors = [session.load_iterate(self.anchor(iteration))] * self.scores_base
            trees, reference, base = pointwise_reference(session, iteration, groups, sides, anchors)
        extras = [torch.tensor([(pair.p_best, pair.p_worst) for _, pair in chosen])]
        extras += [base] * self.scores_base
        examples: list[Example] = []
        for i, (tree, (e, _)) in enumerate(zip(trees, chosen, strict=True)):
            more = tuple(answer.tokens for answer in beside.get(e, ()))
            of, *rows = ((*row[i].tolist(), *(0.0 for _ in more)) for row in (reference, *extras))
            whole = Tree(tree.prompt, (*tree.responses, *more))
            examples.append(Example(whole, of, extras=tuple(rows)))

        def objective(
            policy: Tensor,
            reference: Tensor,
            lengths: Tensor,
            win: Tensor,
            base: Tensor | None = None,
        ) -> Tensor:
            del lengths
            return self.loss(policy, reference, win, base)

        return examples, objective

    def pick(self, session: Session, iteration: int, responses: Responses) -> list[Pair | None]:
        """The best and the worst response of each prompt; None where all tie."""
        matrices = win_matrices(session, iteration, list(responses), list(responses.values()))
        return [pick_pair(matrix, self.labels) for matrix in matrices]

    def deed(self, config: Sections, model: str) -> list[str]:
        """What is trained on."""
        tried = f"best and worst of {self.responses} responses of the previous iterate"
        return [f"{tried}, {self.labels} labels"]


def pointwise_reference(
    session: Session,
    iteration: int,
    groups: Sequence[Tree],
    sides: Sequence[tuple[int, int]],
    anchors: Sequence[str | None],
) -> tuple[list[Tree], Tensor, Tensor]:
    """Each prompt's best and worst response, and their lp_ref and lp of the anchor, [prompts, 2].

    A geometric mixture's log Z(x) shifts a pointwise loss. The K responses, drawn from π_{t-1},
    estimate it: log Ẑ(x) = log mean_k e^{α lp_prev + (1-α) lp_base - lp_{t-1}}(y_k), and all of
    them are scored for that.

    Args:
        iteration: t.
        groups: each prompt with its K responses.
        sides: which of them are the best and the worst.
        anchors: the policy whose lp is wanted besides, or none.
    """
    config, alpha = session.config, session.config.reference.alpha
    pairs = [
        Tree(tree.prompt, (tree.responses[i], tree.responses[j]))
        for tree, (i, j) in zip(groups, sides, strict=True)
    ]
    previous = session.load_reference_adapter(iteration)
    if config.reference.kind == "arithmetic" or alpha in (0, 1) or not pairs:
        policies = [previous, *[None] * (alpha < 1), *anchors]
        logps = session.frozen_logps(iteration, pairs, policies)
        base = logps[1] if alpha < 1 else logps[0]
        mixed = mixture_reference(logps[0], base, alpha=alpha, kind=config.reference.kind)
        return pairs, mixed, logps[-1]
    parent = session.load_iterate(config.preference.parent(iteration))
    policies = [previous, None, parent, *anchors]
    prev, base, drawn, *rest = session.frozen_logps(iteration, groups, policies)
    weights = diagnose(mixture_reference(prev, base, alpha=alpha) - drawn)
    log_z = weights.log_z[:, None].float()
    console.note(f"t={iteration}: mean log Z {log_z.mean():.3f}; {weights.note()}")
    mixed = mixture_reference(prev, base, alpha=alpha, log_z=log_z)
    index = torch.tensor(sides)
    return pairs, mixed.gather(1, index), [base, *rest][-1].gather(1, index)


def sample_responses(
    session: Session, iteration: int, count: int, rival: Player | None = None
) -> dict[int, list[Answer]]:
    """`count` responses of π_{t-1} per prompt, by example; those not on disk are sampled now.

    Response k of an example is drawn from numbers of its own: a function of (seed, t, k,
    example). With `rival`, from that player in the place of π_{t-1}.
    """
    config = session.config
    player = rival or Player.single(config.preference.parent(iteration))
    kind, purpose = ("opponents", "opponent") if rival else ("responses", "response")
    examples = session.examples(iteration)
    size = max(1, config.sampling.shard_size // count)
    folder = session.folder(iteration) / kind
    shards = [
        Shard(
            folder / f"{number:05d}",
            player,
            [(e, f"{purpose}/{k}") for e in part for k in range(count)],
        )
        for number, part in enumerate(batched(examples, size))
    ]
    result: dict[int, list[Answer]] = {e: [] for e in examples}
    for example, answer in session.answers(iteration, shards, kind):
        result[example].append(answer)
    return result


def win_matrices(
    session: Session, iteration: int, examples: Sequence[int], answers: Sequence[Sequence[Answer]]
) -> list[Matrix]:
    """P(y_i ≻ y_j) of each example's answers.

    Verdicts are durable as they come: whatever stops this phase, none is asked twice.
    """
    assert session.judge
    judge = replace(session.judge, label=f"t={iteration} judge")
    return win_probabilities(judge, _prompts(session, examples), _texts(session, answers))


def win_rates_against(
    session: Session, iteration: int, responses: Responses, rivals: Responses
) -> list[list[float]]:
    """P̂_i = (1/R) Σ_k P(y_i ≻ y'_k) of each example's responses, against R of an opponent."""
    assert session.judge
    prompts = _prompts(session, list(responses))
    mine, theirs = _texts(session, list(responses.values())), _texts(session, list(rivals.values()))
    pairs = [
        Comparison(prompt, one, other)
        for prompt, ones, others in zip(prompts, mine, theirs, strict=True)
        for one in ones
        for other in others
    ]
    judge = replace(session.judge, label=f"t={iteration} judge")
    found = iter(preferences(judge, pairs))
    return [
        [math.fsum(next(found) for _ in others) / len(others) for _ in ones]
        for ones, others in zip(mine, theirs, strict=True)
    ]


def _prompts(session: Session, examples: Sequence[int]) -> list[Prompt]:
    demos = [session.demonstrations[e] for e in examples]
    return [Prompt(demo.messages, demo.answer) for demo in demos]


def _texts(session: Session, answers: Sequence[Sequence[Answer]]) -> list[list[str]]:
    return [[session.chat.decode(answer.tokens) for answer in group] for group in answers]


def tell_pairs(
    session: Session,
    iteration: int,
    responses: Responses,
    best: Sequence[float],
    worst: Sequence[float],
    ties: int,
) -> None:
    """What iteration t has to learn from, for the console, the metrics and the summary.

    `best` and `worst` are the win probabilities of the two sides of each pair.
    """
    answers = [answer for group in responses.values() for answer in group]
    values = {
        "prompts": len(responses),
        "pairs": len(best),
        "ties": ties,
        "truncated": sum(answer.truncated for answer in answers),
        "length": float(np.mean([len(answer.tokens) for answer in answers])),
        "p_best": float(np.mean(best)) if best else 0.5,
        "p_worst": float(np.mean(worst)) if worst else 0.5,
    }
    session.metrics.rewind("pairs", iteration - 1)
    session.metrics.write("pairs", iteration, values)
    console.note(
        f"t={iteration}: {len(best)} pairs with mean win probabilities {values['p_best']:.3f} "
        f"and {values['p_worst']:.3f}; {ties} prompts without a difference, "
        f"{values['truncated']} of {len(answers)} responses cut at the length cap, "
        f"{values['length']:.1f} tokens each"
    )
    if not best:
        text = f"no pair with a difference, π_{iteration} = π_{iteration - 1}"
        console.alarm(f"t={iteration}: {text}")
        session.metrics.write("pairs", iteration, {"alarm": text})
