"""What a run's measures say, in plain words: did it help, is more of it worth while, what next.

Pure functions of `summary.json`. What is claimed follows rules fixed beforehand: the last iterate
by the primary measure (`paired.primary`); a difference counts where its 95 % interval leaves out 0;
whatever is picked after looking (the best iterate, second measures) gets a wider one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from alphaspin.config import Config
from alphaspin.evaluation.paired import AGAINST_BASE, Difference, Paired, difference, primary, value
from alphaspin.evaluation.record import Measures

SECOND = {
    "nll": "in the likelihood of the demonstrations",
    "sampled": "in exact matches of sampled answers",
    "greedy": "in exact matches of greedy answers",
}
"""Measures that are looked at beside the primary one, and how a policy is better by them."""

DOES = {
    "sampled": "matches {} of the prompts' demonstrations",
    "preferred": "is closer to the demonstrations than the base on {} of the prompts",
    "judged": "is preferred to the base on {} of the prompts",
}
"""What a share of the prompts is the share of, by primary measure."""

STATE = {
    "kl": "{:.3f} nats an answer from the base (KL)",
    "length": "{:.1f} tokens an answer",
    "entropy": "{:.2f} nats of entropy",
    "distinct_2": "{:.2f} of the word pairs differ",
}
"""What tells an over-optimised policy, and how it is written."""

AT_THE_BASE = "no distance from the base that so many prompts can measure (KL)"
"""An estimate below zero, which no KL is."""

UNBROKEN = re.compile(r"(?<=\d) (?=%)|(?<=\bt) (?==)|(?<=\bt =) (?=\d)")
"""Blanks at which no line ends."""

LONGER = 0.15
"""Relative change in length, or in different pairs of words, that is pointed out."""

MOSTLY = 0.5
"""Share of equal pairs from which on they are pointed out."""


class Answer(NamedTuple):
    """A question, its short answer, and why; mood: `good`, `bad` or `open`."""

    question: str
    short: str
    why: str
    mood: str


UNKNOWN = ("Unknown.", "No measure of quality is known with its error.", "open")
"""The rest of an answer where nothing can be said."""


@dataclass
class Facts:
    """What a verdict is about.

    rows: base, iterates, control. known: how sure their differences are. equal: iteration → share
    of pairs that teach nothing as their answers are equal. config: the run's settings.
    """

    rows: Sequence[Measures]
    known: Paired | None
    equal: Mapping[int, float]
    config: Config
    plays: list[int] = field(init=False)
    measure: str | None = field(init=False)

    def __post_init__(self) -> None:
        """Find the iterates, and the measure that counts."""
        self.plays = [k for k, row in enumerate(self.rows) if not row.control and k]
        self.measure = primary(self.rows)

    @property
    def last(self) -> int:
        """The row of the last iterate."""
        return self.plays[-1]

    def control(self) -> int | None:
        """The row of the control that cost as much as the last iterate."""
        t = self.rows[self.last].iteration
        same = [k for k, row in enumerate(self.rows) if row.control and row.iteration == t]
        return same[0] if same else None

    def gain(self, measure: str, one: int, other: int, looks: int = 1) -> Difference | None:
        """How much better rows[one] is than rows[other]: of an NLL, how much less."""
        found = difference(self.rows, self.known, measure, one, other, looks)
        if found and measure == "nll":
            return Difference(-found.value, -found.high, -found.low)
        return found

    def said(self, measure: str, row: int) -> str:
        """A share of the prompts."""
        return f"{100 * (value(self.rows[row], measure) or 0):.1f} %"


def verdict(facts: Facts) -> list[Answer]:
    """The paragraph on top of the page."""
    if not facts.rows or not facts.plays:
        why = "No held-out prompts were measured, so that nothing here says whether it helped."
        advice = "Set `evaluate.prompts`, or name prompts with `--heldout`."
        return [
            Answer("Better than the base?", "Unknown.", why, "open"),
            Answer("What next?", "", advice, "open"),
        ]
    answers = [
        better_than_base(facts),
        better_than_control(facts),
        improving(facts),
        overdone(facts),
    ]
    answers.append(Answer("What next?", "", " ".join(suggestions(facts)), "open"))
    return [answer._replace(why=UNBROKEN.sub("\xa0", answer.why)) for answer in answers]


def better_than_base(facts: Facts) -> Answer:
    """Of the last iterate."""
    question, measure = "Better than the base?", facts.measure
    t = f"t = {facts.rows[facts.last].iteration}"
    gain = facts.gain(measure, facts.last, 0) if measure else None
    if not measure or not gain:
        return Answer(question, *UNKNOWN)
    where = f" of {facts.known.prompts} held-out prompts" if facts.known else " of held-out prompts"
    share = facts.said(measure, facts.last)
    if measure == "sampled":
        base = facts.said(measure, 0)
        text = f"Sampled, {t} answers {share}{where} as demonstrated, the base {base}"
    elif measure == "judged":
        text = f"The judge prefers the answer of {t} to the base's on {share}{where}, ties as half"
    else:
        text = (
            "Answers hardly ever match the demonstrations, so closeness counts: on "
            f"{share}{where}, ties as half, {t} shares more words with them than the base does"
        )
    change = points(gain)
    why = f"{text}: {change}{' against an even 50 %' * (measure in AGAINST_BASE)}{luck(gain)}."
    return Answer(question, short(gain, "No, worse."), why + other_measures(facts, 0), mood(gain))


def better_than_control(facts: Facts) -> Answer:
    """Than plain SFT, where it was trained."""
    question, measure = "Better than plain SFT at equal cost?", facts.measure
    control = facts.control()
    if control is None:
        return Answer(question, "Not tried.", "There was no control to compare with.", "open")
    gain = facts.gain(measure, facts.last, control) if measure else None
    if not measure or not gain:
        return Answer(question, *UNKNOWN)
    own = facts.gain(measure, control, 0)
    does = DOES[measure].format(facts.said(measure, control))
    why = f"SFT {does}; self-play differs from it by {points(gain)}{luck(gain)}."
    if own and own.sign < 0:
        why += " SFT itself fell below the base."
    return Answer(
        question, short(gain, "No, SFT is ahead."), why + other_measures(facts, control), mood(gain)
    )


def improving(facts: Facts) -> Answer:
    """The last step, and which iterate is the best."""
    question, measure = "Still improving?", facts.measure
    if len(facts.plays) < 2:
        return Answer(question, "Unknown.", "One iteration shows no trend.", "open")
    gain = facts.gain(measure, facts.last, facts.plays[-2]) if measure else None
    if not measure or not gain:
        return Answer(question, *UNKNOWN)
    why = f"The last iteration changed this by {points(gain)}{luck(gain)}."
    names = {k: f"t = {facts.rows[k].iteration}" for k in facts.plays}
    best, lead = top(facts)
    if best == facts.last:
        why += f" {names[best]} has the highest value so far."
    elif lead and lead.sign > 0:
        why += (
            f" The best is {names[best]} with {facts.said(measure, best)}: its lead over the last "
            f"is more than luck, even as the pick of {len(facts.plays)}."
        )
    else:
        why += (
            f" {names[best]} has the highest value, {facts.said(measure, best)}, but as the pick "
            f"of {len(facts.plays)} its lead over the last may be luck."
        )
    low = facts.gain(measure, best, 0, len(facts.plays)) if best != facts.last else None
    if low and low.sign > 0 and (now := facts.gain(measure, facts.last, 0)) and now.sign < 1:
        why += " It is better than the base, though the last is not shown to be."
    return Answer(question, short(gain, "No, it got worse."), why, mood(gain))


def top(facts: Facts) -> tuple[int, Difference | None]:
    """The iterate with the highest value, the latest of equals; and its lead over the last."""
    measure = facts.measure
    assert measure
    best = max(facts.plays, key=lambda k: (value(facts.rows[k], measure) or 0, k))
    return best, facts.gain(measure, best, facts.last, len(facts.plays) - 1)


def overdone(facts: Facts) -> Answer:
    """Whether it pleases the measure at the cost of the rest."""
    signs = [f"{sign}." for sign in symptoms(facts)]
    measured = [
        (AT_THE_BASE if m == "kl" and now <= 0 else text.format(now))
        + (f", the base {text.format(base).split()[0]}" if m != "kl" else "")
        for m, text in STATE.items()
        if (now := value(facts.rows[facts.last], m)) is not None
        and (base := value(facts.rows[0], m)) is not None
    ]
    why = signs + ([f"The last iterate: {'; '.join(measured)}."] if measured else [])
    if facts.equal:
        first, final = (f"{100 * facts.equal[f(facts.equal)]:.0f} %" for f in (min, max))
        course = first if len(facts.equal) < 2 else f"{first} at first, {final} at the end"
        judged = facts.config.preference.judged
        idle = "Prompts whose answers all tie" if judged else "Pairs of equal answers"
        why.append(f"{idle}, which teach nothing: {course}.")
    short = ("There are signs of it." if signs else "No sign of it.") if measured else "Unknown."
    mood = "bad" if signs else "good" if measured else "open"
    return Answer("Over-optimised?", short, " ".join(why), mood)


def symptoms(facts: Facts) -> list[str]:
    """Signs of over-optimisation."""
    base, now, found = facts.rows[0], facts.rows[facts.last], list[str]()
    if fell(facts) and now.kl is not None:
        best = facts.rows[top(facts)[0]].kl
        if best is not None and now.kl > best:
            found.append("Quality fell while the distance from the base grew")
    apart = difference(facts.rows, facts.known, "length", facts.last, 0, 3)
    if apart and apart.sign and base.length and abs(apart.value) > LONGER * base.length:
        more = 100 * apart.value / base.length
        found.append(f"Answers became {abs(more):.0f} % {'longer' if more > 0 else 'shorter'}")
    gain = facts.gain(facts.measure, facts.last, 0) if facts.measure else None
    idle = not gain or gain.sign < 1
    if idle and base.entropy and now.entropy is not None and now.entropy < base.entropy / 2:
        found.append("Its entropy is less than half of the base's, for no better answers")
    unlikely = facts.gain("nll", facts.last, 0, 3)
    if not facts.config.preference.judged and unlikely and unlikely.sign < 0:
        found.append("It gives the demonstrations less likelihood than the base does")
    if hollow(facts):
        ends = (now.controlled, now.controlled_low, now.controlled_high)
        at, low, high = (f"{100 * (share or 0):.1f}" for share in ends)
        found.append(
            f"At equal length the judge prefers it on {at} % (95 % interval {low} to {high}), "
            "which may be luck"
        )
    if base.distinct_2 and now.distinct_2 is not None and base.self_bleu is not None:
        repeats = (now.self_bleu or 0) > base.self_bleu * (1 + LONGER)
        if now.distinct_2 < (1 - LONGER) * base.distinct_2 and repeats:
            found.append("Answers repeat each other more than the base's")
    return found


def fell(facts: Facts) -> bool:
    """Whether quality fell, beyond luck: from the best iterate, or below the base."""
    if not facts.measure:
        return False
    best, lead = top(facts)
    below = facts.gain(facts.measure, facts.last, 0)
    return bool((best != facts.last and lead and lead.sign > 0) or (below and below.sign < 0))


def hollow(facts: Facts) -> bool:
    """Whether the judge prefers the last iterate, but is not shown to at equal length."""
    now = facts.rows[facts.last]
    if facts.measure != "judged" or now.controlled_low is None or now.judged_low is None:
        return False
    return now.judged_low > 0.5 >= now.controlled_low


def suggestions(facts: Facts) -> list[str]:
    """What follows from the measures, the two weightiest."""
    config, measure = facts.config, facts.measure
    found: list[str] = []
    gain = facts.gain(measure, facts.last, 0) if measure else None
    control = facts.control()
    versus = facts.gain(measure, facts.last, control) if measure and control is not None else None
    equal = facts.equal[max(facts.equal)] if facts.equal else 0.0
    beta = not config.preference.judged and hasattr(config.loss, "beta")
    rein = "a larger `loss.beta`" if beta else "a smaller `train.lr`"
    if measure and fell(facts):
        best = top(facts)[0]
        t = facts.rows[best].iteration
        better = facts.gain(measure, best, 0, len(facts.plays))
        if best != facts.last and better and better.sign > 0:
            found.append(f"Use t = {t} (`alphaspin export RUN --iteration {t}`).")
        found.append(f"If you train again, try {rein} or fewer iterations.")
    if versus and versus.sign < 0:
        text = "On these data plain SFT makes more of the same cost: go on with it"
        if config.method == "spin" and equal > MOSTLY and config.loss.ignores_equal_pairs():
            text += ", or try `--loss.nll_weight 1`, which learns from equal pairs too"
            if config.reference.alpha in (0, 1):
                text += ", as does `--loss.kind space`"
        found.append(text + ".")
    elif equal > MOSTLY:
        found.append(
            f"Most {'prompts' if config.preference.judged else 'pairs'} teach nothing any more: "
            "other prompts or fewer iterations might use the time better."
        )
    if hollow(facts):
        found.append("A judge that is not swayed by length would tell more.")
    demonstrated = facts.rows[0].nll is not None
    if control is None and config.control == "none" and demonstrated and not fell(facts):
        found.append("The same command with `--control sft` tells whether plain SFT does as well.")
    if gain and gain.sign == 0:
        most = f"{50 * (gain.high - gain.low):.1f} points"
        found.append(
            f"Differences below about {most} are lost in luck here: measure on more held-out "
            "prompts (`evaluate.prompts`)."
        )
    if not found and len(facts.plays) > 1 and measure:
        step = facts.gain(measure, facts.last, facts.plays[-2])
        if step and step.sign > 0:
            found.append("It still improves: more iterations (`selfplay.iterations`) may pay.")
    return found[:2] or [
        "Another seed (`--seed 1`) shows how much of this is the luck of training."
    ]


def other_measures(facts: Facts, other: int) -> str:
    """What second measures say of the last iterate against a row, where it is beyond luck."""
    names = [m for m in SECOND if m != facts.measure]
    gains = {m: facts.gain(m, facts.last, other, len(names)) for m in names}
    parts = [
        f"{word} {' and '.join(SECOND[m] for m in found)}"
        for word, sign in (("better", 1), ("worse", -1))
        if (found := [m for m, gain in gains.items() if gain and gain.sign == sign])
    ]
    return f" Beyond luck it is {', but '.join(parts)}." if parts else ""


def points(gain: Difference) -> str:
    """A difference of shares with its interval."""
    middle, low, high = (signed(100 * share, 1) for share in (gain.value, gain.low, gain.high))
    return f"{middle} points (95 % interval {low} to {high})"


def signed(number: float, digits: int) -> str:
    """With a sign, but for what is rounded to 0."""
    text = f"{number:+.{digits}f}".replace("-", "\u2212")
    return text if text.strip("+\u22120.") else text[1:]


def luck(gain: Difference) -> str:
    """Whether it is beyond noise."""
    return ", more than luck" if gain.sign else ", which may be luck"


def short(gain: Difference, no: str) -> str:
    """Yes, no, or not shown."""
    return {1: "Yes.", -1: no, 0: "Not shown."}[gain.sign]


def mood(gain: Difference) -> str:
    """Of an answer."""
    return {1: "good", -1: "bad", 0: "open"}[gain.sign]
