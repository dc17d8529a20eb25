"""Held-out measures: how well an iterate fits the demonstrations, and how well it answers.

All iterates answer a prompt from the same uniform numbers, so that differences between them are not
blurred by luck; standard errors are those of a mean over prompts. What needs the model (`evaluate`)
is apart from what needs a judge (`compared`), so that another judge is asked about the answers that
are there.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphaspin.data.answers import checked_part, preference, word_f1
from alphaspin.data.chat import ChatFormat
from alphaspin.data.demonstrations import Demonstration, fingerprint
from alphaspin.errors import InputError
from alphaspin.evaluation.diversity import distinct, self_bleu
from alphaspin.evaluation.record import Evaluation
from alphaspin.evaluation.winrate import Estimate, at_equal_length, win_rate
from alphaspin.judges.base import Comparison, Judge, Prompt, preferences
from alphaspin.model.backbone import Backbone
from alphaspin.model.distributed import Team
from alphaspin.model.scoring import logps
from alphaspin.model.tree import Tree
from alphaspin.sampling.answer import Answer, Draw
from alphaspin.sampling.decode import Request, decode
from alphaspin.sampling.settings import SamplingConfig


def checked_answers(heldout: Sequence[Demonstration], pattern: str | None) -> list[str]:
    """The part of each demonstration that an answer must match; prompts alone have none.

    Raises:
        InputError: a demonstration without the pattern of `evaluate.answer`.
    """
    part = checked_part(pattern)
    answers: list[str] = []
    for demo in heldout:
        if demo.answer is None:
            continue
        answer = part(demo.answer)
        if answer is None:
            raise InputError(
                f"{demo.origin}: no match of evaluate.answer = {pattern!r} in the demonstration"
            )
        answers.append(answer)
    return answers


OF_DEMONSTRATIONS = (
    *(f"{name}{end}" for name in ("nll", "sampled", "greedy", "preferred") for end in ("", "_se")),
    "nll_per_token",
    "margin",
)
"""Measures that need the demonstrations."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What the evaluations of a run share.

    heldout: prompts with their demonstrations. chat: for decoding to text. pattern: which part of
    an answer must match (`evaluate.answer`). cap: longest answer in tokens. sampling: how answers
    are drawn. scored: pairs per scoring pass. team: processes that share the prompts and all get
    the result. ask: what answers, as `decode`, while it is `awake`; engine: its name.
    """

    backbone: Backbone
    chat: ChatFormat
    heldout: Sequence[Demonstration]
    seed: int
    pattern: str | None
    cap: int
    sampling: SamplingConfig
    scored: int
    team: Team
    ask: Callable[..., list[Answer]] = decode
    awake: Callable[[], AbstractContextManager[Any]] = nullcontext
    engine: str | None = None

    @classmethod
    def of(
        cls,
        config: Any,
        backbone: Backbone,
        chat: ChatFormat,
        heldout: Sequence[Demonstration],
        team: Team | None = None,
    ) -> "Bench":
        """With the settings of a composed configuration."""
        return cls(
            backbone,
            chat,
            heldout,
            config.seed,
            config.evaluate.answer,
            config.text.response_limit,
            config.sampling,
            config.train.scored_together,
            team or Team(backbone.device),
        )

    def inputs(self, adapter: str | None, scale: float) -> str:
        """Hash of what `evaluate` measures, the judge apart; its arguments have the same names."""
        backbone, sampling = self.backbone, self.sampling
        content = [
            (backbone.identity, backbone.adapter_ids[adapter], str(backbone.head.weight.dtype)),
            (fingerprint(self.heldout), [(demo.index, demo.answer) for demo in self.heldout]),
            (self.seed, self.cap, sorted(self.chat.stop_token_ids)),
            (sampling.temperature, sampling.top_p, sampling.top_k),
            (self.pattern, scale),
            *([self.engine] if self.engine else []),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def evaluate(
    bench: Bench,
    name: str,
    adapter: str | None,
    base: Evaluation | None,
    scale: float,
    progress: Callable[[int, int], None] = lambda answers, tokens: None,
    judge: Judge | None = None,
) -> Evaluation:
    """Measure one policy.

    Args:
        bench: prompts, and how they are answered.
        name: `base`, `0`, `1`, …
        adapter: its name in the backbone, None for the base.
        base: the base's evaluation; None when this is the base itself.
        scale: β, or what takes its place, for the margin (`Method.reward_scale`).
        progress: called with the answers finished and the tokens decoded.
        judge: compares the sampled answers with the base's.

    Raises:
        InputError: a demonstration without the pattern of `evaluate.answer`.
        JudgeError: the judge's.
    """
    backbone, chat, heldout, team = bench.backbone, bench.chat, bench.heldout, bench.team
    gold = checked_answers(heldout, bench.pattern)
    prompts = [demo.prompt for demo in heldout]
    draws = [Draw(bench.seed, 0, "evaluate", demo.index) for demo in heldout]

    def answers(
        indices: Sequence[int], noise: Sequence[Draw | None]
    ) -> list[tuple[list[int], bool]]:
        found = bench.ask(
            backbone,
            [Request(prompts[i], {adapter: 1.0}, bench.cap, noise[i]) for i in indices],
            stop_ids=chat.stop_token_ids,
            config=bench.sampling,
            progress=progress,
        )
        return [(answer.tokens.tolist(), answer.truncated) for answer in found]

    def scores(policy: str | None, trees: Sequence[Tree]) -> NDArray[np.float64]:
        return np.array(
            team.spread(
                lambda mine: logps(backbone, policy, [trees[i] for i in mine], bench.scored),
                len(trees),
            )
        )

    with bench.awake():
        sampled, greedy = (
            [
                Answer(np.array(tokens, np.int32), truncated)
                for tokens, truncated in team.spread(partial(answers, noise=noise), len(heldout))
            ]
            for noise in (draws, [None] * len(heldout))
        )
    texts = [chat.decode(answer.tokens) for answer in sampled]
    greedy_texts = [chat.decode(answer.tokens) for answer in greedy]

    own = [Tree(prompt, (y.tokens,)) for prompt, y in zip(prompts, sampled, strict=True)]
    said = scores(adapter, own)[:, 0]
    divergence = said - (said if adapter is None else scores(None, own)[:, 0])
    measured: dict[str, Any] = dict.fromkeys(OF_DEMONSTRATIONS)
    scored = np.zeros((0, 2))
    if len(gold) == len(heldout):
        others = [np.array(ids, np.int32) for ids in base.answer_tokens] if base else []
        pairs = [
            Tree(demo.prompt, (demo.response, tokens))
            for demo, tokens in zip(heldout, others or [y.tokens for y in sampled], strict=True)
        ]
        scored = scores(adapter, pairs)
        anchor = np.stack([base.demonstration_logps, base.base_answer_logps], 1) if base else scored
        theirs = base.answers if base else texts
        measured = {
            **_likelihoods(pairs, scored, anchor, scale),
            **_matches(bench, gold, texts, greedy_texts, theirs),
        }
    evaluation = Evaluation(
        name=name,
        **measured,
        **(
            {**_mean("kl", divergence.tolist()), **_mean("entropy", (-said).tolist())}
            if bench.sampling.untouched
            else {}
        ),
        **_mean("length", [float(len(answer.tokens)) for answer in sampled]),
        distinct_1=distinct(texts, 1),
        distinct_2=distinct(texts, 2),
        distinct_3=distinct(texts, 3),
        self_bleu=self_bleu(texts, bench.seed),
        answers=texts,
        greedy_answers=greedy_texts,
        answer_tokens=[answer.tokens.tolist() for answer in sampled],
        truncated=[answer.truncated for answer in sampled],
        demonstration_logps=scored[:, 0].tolist(),
        base_answer_logps=scored[:, 1].tolist(),
        inputs=bench.inputs(adapter, scale),
        judge=None,  # `compared` fills these
        verdicts=None,
    )
    return compared(evaluation, base or evaluation, heldout, judge) if judge else evaluation


def _likelihoods(
    pairs: Sequence[Tree], scored: NDArray[np.float64], anchor: NDArray[np.float64], scale: float
) -> dict[str, float]:
    """NLL and margin, from lp and the base's lp of demonstrations and its answers, [pairs, 2]."""
    gains = scored - anchor
    differ = [not np.array_equal(pair.responses[0], pair.responses[1]) for pair in pairs]
    margins = (gains[:, 0] - gains[:, 1])[np.array(differ)]
    tokens = sum(len(pair.responses[0]) for pair in pairs)
    return {
        **_mean("nll", (-scored[:, 0]).tolist()),
        "nll_per_token": float(-scored[:, 0].sum() / tokens),
        **_mean("margin", (scale * margins).tolist() or [0.0]),
    }


def _matches(
    bench: Bench,
    gold: Sequence[str],
    sampled: Sequence[str],
    greedy: Sequence[str],
    others: Sequence[str],
) -> dict[str, float]:
    """Exact matches of answers with demonstrations, and how often they are preferred to others."""
    part = checked_part(bench.pattern)

    def qualities(texts: Sequence[str]) -> list[tuple[bool, float]]:
        return [
            (part(text) == want, word_f1(text, demo.answer or ""))
            for text, want, demo in zip(texts, gold, bench.heldout, strict=True)
        ]

    ours = qualities(sampled)
    return {
        **_mean("sampled", [float(same) for same, _ in ours]),
        **_mean("greedy", [float(same) for same, _ in qualities(greedy)]),
        **_mean("preferred", list(map(preference, ours, qualities(others)))),
    }


def compared(
    evaluation: Evaluation, base: Evaluation, heldout: Sequence[Demonstration], judge: Judge
) -> Evaluation:
    """The evaluation with a judge's verdicts on its sampled answers against the base's.

    Raises:
        JudgeError: the judge's.
    """
    asked = [
        Comparison(Prompt(demo.messages, demo.answer), ours, theirs)
        for demo, ours, theirs in zip(heldout, evaluation.answers, base.answers, strict=True)
    ]
    verdicts = preferences(judge, asked)
    found = controlled = Estimate(0.5, 0.5, 0.5)  # the base against itself: no estimate, a fact
    if evaluation.name != base.name:
        ours, theirs = ([len(text) for text in e.answers] for e in (evaluation, base))
        found, controlled = win_rate(verdicts), at_equal_length(verdicts, ours, theirs)
    said = {
        "judge": judge.identity,
        "verdicts": verdicts,
        **_mean("judged", verdicts),
        "judged_low": found.low,
        "judged_high": found.high,
        "controlled": controlled.value,
        "controlled_low": controlled.low,
        "controlled_high": controlled.high,
    }
    return evaluation.model_copy(update=said)


def _mean(name: str, values: list[float]) -> dict[str, float]:
    """The mean and its standard error, under `name` and `name_se`."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {name: float(np.mean(values)), f"{name}_se": error}


JUDGED = ["judge vs base %", "KL to base", "tokens"]


def header(judged: bool = False) -> list[str]:
    """Column names of the table by iteration."""
    names = ["t", "NLL/answer", "sampled %", "greedy %", "margin", "wins vs base %"]
    return names + JUDGED * judged


def row(evaluation: Evaluation) -> list[str]:
    """An evaluation as a row of that table; ± is one standard error."""
    e = evaluation

    def percent(value: float | None, error: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} ± {100 * (error or 0):.1f}"

    is_base = e.name == "base"
    cells = [
        e.name,
        "-" if e.nll is None else f"{e.nll:.3f} ± {e.nll_se:.3f}",
        percent(e.sampled, e.sampled_se),
        percent(e.greedy, e.greedy_se),
        "-" if e.margin is None else f"{e.margin:+.3f}",
        percent(None if is_base else e.preferred, e.preferred_se),
    ]
    if e.judged is not None:
        cells.append(percent(None if is_base else e.judged, e.judged_se))
        divergence = "-" if e.kl is None else f"{e.kl:.3f} ± {e.kl_se:.3f}"
        cells += [divergence, f"{e.length:.1f} ± {e.length_se:.1f}"]
    return cells


COMPARED = [
    "t",
    "judge vs base %",
    "at equal length %",
    "distinct-1",
    "distinct-2",
    "distinct-3",
    "self-BLEU",
]
"""Column names of the table of what a judge and diversity say."""


def comparison(evaluation: Evaluation) -> list[str]:
    """An evaluation as a row of that table; brackets are 95 % confidence intervals."""
    e = evaluation

    def share(value: float | None, low: float | None, high: float | None) -> str:
        if e.name == "base" or value is None or low is None or high is None:
            return "-"
        return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    diversity = (e.distinct_1, e.distinct_2, e.distinct_3, e.self_bleu)
    return [
        e.name,
        share(e.judged, e.judged_low, e.judged_high),
        share(e.controlled, e.controlled_low, e.controlled_high),
        *("-" if value is None else f"{value:.3f}" for value in diversity),
    ]


def line(evaluation: Evaluation) -> str:
    """An evaluation in one line."""
    names, cells = header(evaluation.judged is not None), row(evaluation)
    return ", ".join(f"{k} {v}" for k, v in zip(names[1:], cells[1:], strict=True))
