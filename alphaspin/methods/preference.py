"""SPPO, RSPO and Nash-MD: the phases of an iteration that has a judge in place of demonstrations.

See `selfplay` for the loop, `losses` for the equations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from alphaspin.foundation import console
from alphaspin.judges.base import Matrix, Prompt, pick_pair, win_probabilities
from alphaspin.losses.equations import mixture_reference, nash_md, pointwise, regularised
from alphaspin.methods.session import Session, Shard
from alphaspin.model.batching import Tree
from alphaspin.model.scoring import batched
from alphaspin.opponents.base import BASE, Player
from alphaspin.sampling.decode import Answer
from alphaspin.sampling.mixture import diagnose
from alphaspin.training.trainer import Example, Objective


def judged_pairs(session: Session, iteration: int) -> tuple[list[Example], Objective]:
    """The best and the worst of K responses of the current iterate, and the loss.

    Prompts whose responses all tie teach nothing and are left out.
    """
    config, settings = session.config, session.config.preference
    with session.timed("responses", iteration):
        responses = sample_responses(session, iteration)
    with session.timed("judge", iteration):
        matrices = win_matrices(session, iteration, list(responses), list(responses.values()))
    picked = [pick_pair(matrix, settings.labels) for matrix in matrices]
    chosen = [(e, pair) for e, pair in zip(responses, picked, strict=True) if pair]
    best, worst = [pair.p_best for _, pair in chosen], [pair.p_worst for _, pair in chosen]
    tell_pairs(session, iteration, responses, best, worst, len(responses) - len(chosen))
    with session.timed("reference", iteration):
        groups = [
            Tree(session.demonstrations[e].prompt, tuple(y.tokens for y in responses[e]))
            for e, _ in chosen
        ]
        sides = [(pair.best, pair.worst) for _, pair in chosen]
        trees, reference, base = pointwise_reference(session, iteration, groups, sides)
    facts = [torch.tensor([(pair.p_best, pair.p_worst) for _, pair in chosen])]
    facts += [base] * (config.method == "rspo")
    examples = [
        Example(
            tree, tuple(reference[i].tolist()), facts=tuple(tuple(f[i].tolist()) for f in facts)
        )
        for i, tree in enumerate(trees)
    ]
    loss = pointwise if config.method == "sppo" else regularised

    def objective(policy: Tensor, reference: Tensor, lengths: Tensor, *facts: Tensor) -> Tensor:
        del lengths
        return loss(settings, policy, reference, *facts)

    return examples, objective


def mirror_descent(session: Session, iteration: int) -> tuple[list[Example], Objective]:
    """Nash-MD: responses of the iterate, judged against the mixture's, and the loss."""
    config, tau = session.config, session.config.preference.tau
    with session.timed("responses", iteration):
        responses = sample_responses(session, iteration)
        opposed = sample_responses(session, iteration, config.preference.mixture)
    with session.timed("judge", iteration):
        both = [[responses[e][0], opposed[e][0]] for e in responses]
        wins = [
            matrix[0, 1].item()
            for matrix in win_matrices(session, iteration, list(responses), both)
        ]
    tell_pairs(session, iteration, responses, wins, [1 - win for win in wins], wins.count(0.5))
    trees = [Tree(session.demonstrations[e].prompt, (y.tokens,)) for e, (y,) in responses.items()]
    with session.timed("reference", iteration):
        (base,) = session.frozen_logps(iteration, trees, [None])
    rows = zip(trees, base.tolist(), wins, strict=True)
    examples = [Example(tree, tuple(lp), facts=((win,),)) for tree, lp, win in rows]

    def objective(policy: Tensor, base: Tensor, lengths: Tensor, win: Tensor) -> Tensor:
        del lengths
        return nash_md(policy, base, win, tau=tau)[:, 0]

    return examples, objective


def pointwise_reference(
    session: Session, iteration: int, groups: Sequence[Tree], sides: Sequence[tuple[int, int]]
) -> tuple[list[Tree], Tensor, Tensor]:
    """Each prompt's best and worst response, and their lp_ref and lp_base, [prompts, 2].

    A geometric mixture's log Z(x) shifts a pointwise loss. The K responses, drawn from π_{t-1},
    estimate it: log Ẑ(x) = log mean_k e^{α lp_prev + (1-α) lp_base - lp_{t-1}}(y_k), and all of
    them are scored for that.

    Args:
        iteration: t.
        groups: each prompt with its K responses.
        sides: which of them are the best and the worst.
    """
    config, alpha = session.config, session.config.reference.alpha
    pairs = [
        Tree(tree.prompt, (tree.responses[i], tree.responses[j]))
        for tree, (i, j) in zip(groups, sides, strict=True)
    ]
    previous = session.load_reference_adapter(iteration)
    if config.reference.kind == "arithmetic" or alpha in (0, 1) or not pairs:
        policies = [previous] + [None] * (alpha < 1 or config.method == "rspo")
        logps = session.frozen_logps(iteration, pairs, policies)
        prev, base = logps[0], logps[-1]
        mixed = mixture_reference(prev, base, alpha=alpha, kind=config.reference.kind)
        return pairs, mixed, base
    policies = [previous, None, session.load_iterate(iteration - 1)]
    prev, base, drawn = session.frozen_logps(iteration, groups, policies)
    weights = diagnose(mixture_reference(prev, base, alpha=alpha) - drawn)
    log_z = weights.log_z[:, None].float()
    console.note(f"t={iteration}: mean log Z {log_z.mean():.3f}; {weights.note()}")
    mixed = mixture_reference(prev, base, alpha=alpha, log_z=log_z)
    index = torch.tensor(sides)
    return pairs, mixed.gather(1, index), base.gather(1, index)


def sample_responses(
    session: Session, iteration: int, mixture: float | None = None
) -> dict[int, list[Answer]]:
    """K responses of π_{t-1} per prompt, by example; those not on disk are sampled now.

    Response k of an example is drawn from numbers of its own: a function of (seed, t, k,
    example). K = 1 for `nash_md`; with `mixture`, its m, from the mixture with the base.
    """
    config = session.config
    count = config.preference.responses if config.method != "nash_md" else 1
    kind, purpose = "responses", "response"
    player = Player.single(max(iteration - 1, BASE))
    if mixture is not None:
        kind, purpose = "opponents", "opponent"
        player = Player.mixture("mixture", iteration - 1, 1 - mixture)
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
    demos = [session.demonstrations[e] for e in examples]
    texts = [[session.chat.decode(answer.tokens) for answer in group] for group in answers]
    prompts = [Prompt(demo.messages, demo.answer) for demo in demos]
    judge = replace(session.judge, label=f"t={iteration} judge")
    return win_probabilities(judge, prompts, texts)


def tell_pairs(
    session: Session,
    iteration: int,
    responses: Mapping[int, Sequence[Answer]],
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
