"""What the page claims: that each claim follows from the measures, and that noise is not news."""

from typing import Any

import numpy as np
import pytest

from alphaspin.config import Config
from alphaspin.evaluation.paired import Paired, by_prompt, chosen, difference, kinds, paired
from alphaspin.evaluation.record import Evaluation, Measures
from alphaspin.evaluation.winrate import win_rate
from alphaspin.report.verdict import Facts, verdict

PROMPTS = 400


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).random(shape)


def facts(
    shares: dict[str, float],
    measure: str = "sampled",
    equal: tuple[float, ...] = (),
    prompts: int = PROMPTS,
    settings: dict[str, Any] | None = None,
    changes: dict[str, dict[str, float]] | None = None,
) -> Facts:
    """Policies that reach these shares on the same prompts: whoever reaches more has all of what
    others have, but for every twentieth prompt, where it is the other way round."""
    numbers = np.arange(prompts)
    values = np.array(
        [
            ((numbers * 7919 % prompts) < share * prompts) ^ ((numbers + k) % 20 == 0)
            for k, share in enumerate(shares.values())
        ],
        dtype=float,
    )
    if measure == "judged":
        values[0] = 0.5
    rows = [
        Measures.model_validate(
            {"name": name, "kl": 0.1 * k, "length": 10.0, measure: float(values[k].mean())}
            | ({} if measure == "judged" else {"nll": 2.0})
            | ({"sampled": 0.0} if measure == "preferred" else {})
            | (changes or {}).get(name, {})
        )
        for k, name in enumerate(shares)
    ]
    known = paired({measure: values, "length": 10 + 0.1 * noise(len(shares), prompts)})
    config = Config.model_validate({"selfplay": {"iterations": 2}} | (settings or {}))
    return Facts(rows, known, dict(enumerate(equal)), config)


SFT = {"base": 0.5, "0": 0.6, "1": 0.7, "sft 0": 0.7, "sft 1": 0.85}
JUDGED = {"method": "sppo"}


@pytest.mark.parametrize(
    ("given", "said", "unsaid"),
    [
        # what is measured; the short answers in order; words that must, and must not, be there
        (
            facts(SFT, equal=(0.4, 0.7), settings={"control": "sft"}),
            [
                "Yes.",
                "No, SFT is ahead.",
                "Yes.",
                "No sign of it.",
                "plain SFT makes more of",
                "70 %",
            ],
            ["--control sft", "may be luck"],
        ),
        (
            facts({**SFT, "sft 1": 0.6}, settings={"control": "sft"}),
            ["Yes.", "Yes.", "Yes.", "No sign of it.", "more iterations"],
            ["plain SFT makes"],
        ),
        (
            facts({**SFT, "sft 1": 0.7}, settings={"control": "sft"}),
            ["Yes.", "Not shown.", "Yes.", "No sign of it."],
            ["SFT is ahead"],
        ),
        (  # no control, one iteration
            facts({"base": 0.5, "0": 0.7}),
            ["Yes.", "Not tried.", "Unknown.", "One iteration shows no trend", "--control sft"],
            ["highest"],
        ),
        (  # worse than the base, and ever further from it
            facts({"base": 0.8, "0": 0.6, "1": 0.4}),
            [
                "No, worse.",
                "Not tried.",
                "No, it got worse.",
                "There are signs of it.",
                "more than luck, even as the pick of 2",
                "a larger loss.beta or fewer iterations",
            ],
            ["Use t =", "more iterations"],
        ),
        (  # the best one passed
            facts({"base": 0.4, "0": 0.8, "1": 0.6}),
            [
                "Yes.",
                "Not tried.",
                "No, it got worse.",
                "There are signs of it.",
                "Quality fell while the distance from the base grew",
                "Use t = 0 (alphaspin export",
            ],
            [],
        ),
        (  # back at the base, but the first was better
            facts({"base": 0.5, "0": 0.7, "1": 0.5}),
            ["Not shown.", "Not tried.", "No, it got worse.", "It is better than the base, though"],
            [],
        ),
        (  # nothing happened
            facts({"base": 0.5, "0": 0.5, "1": 0.5}),
            ["Not shown.", "Not tried.", "Not shown.", "No sign of it.", "more held-out prompts"],
            ["more than luck", "+0.0", "−0.0"],
        ),
        (  # few prompts: the same shares as above, and no claim
            facts({"base": 0.5, "0": 0.6, "1": 0.6}, prompts=20),
            ["Not shown.", "Not tried.", "Not shown.", "No sign of it.", "of 20 held-out prompts"],
            ["more than luck"],
        ),
        (  # prompts alone: the judge's word is all there is
            facts({"base": 0.5, "0": 0.6, "1": 0.7}, "judged", (0.2, 0.3), settings=JUDGED),
            ["Yes.", "Not tried.", "Yes.", "No sign of it.", "against an even 50 %"],
            ["demonstration", "likelihood", "--control sft"],
        ),
        (  # ... which likes length
            facts(
                {"base": 0.5, "0": 0.6, "1": 0.7},
                "judged",
                settings=JUDGED,
                changes={
                    "1": {"judged_low": 0.65, "controlled": 0.5, "controlled_low": 0.45}
                    | {"controlled_high": 0.55, "length": 15.0}
                },
            ),
            [
                "Yes.",
                "Not tried.",
                "Yes.",
                "There are signs of it.",
                "50.0 % (95 % interval 45.0",
                "Answers became 50 % longer",
                "not swayed by length",
            ],
            [],
        ),
        (  # free text
            facts({"base": 0.5, "0": 0.6, "1": 0.7}, "preferred"),
            ["Yes.", "Not tried.", "Yes.", "No sign of it.", "hardly ever match"],
            [],
        ),
        (  # pairs that teach nothing
            facts({"base": 0.5, "0": 0.6, "1": 0.7}, equal=(0.6, 0.8)),
            ["60 % at first, 80 % at the end", "Most pairs teach nothing"],
            [],
        ),
        (
            Facts([], None, {}, Config()),
            ["Unknown.", "No held-out prompts", "evaluate.prompts"],
            ["luck"],
        ),
        (
            Facts([Measures(name="base", sampled=0.5)], None, {}, Config()),
            ["Unknown.", "evaluate.prompts"],
            ["luck"],
        ),
    ],
)
def test_says_what_was_measured(given: Facts, said: list[str], unsaid: list[str]) -> None:
    answers = verdict(given)
    shorts = [answer.short for answer in answers]
    text = " ".join(part for a in answers for part in (a.question, a.short, a.why) if part)
    text = text.replace("\xa0", " ").replace("`", "")
    expected = [words for words in said if words in shorts]
    assert shorts[: len(expected)] == expected
    for words in said:
        assert words in text, text
    for words in unsaid:
        assert words not in text, text
    assert "nan" not in text and "None" not in text and "  " not in text


def test_second_measures_are_told_where_they_are_beyond_luck() -> None:
    given = facts({"base": 0.5, "0": 0.7})
    nll = np.stack([np.full(PROMPTS, 2.0), 3 + 0.1 * noise(PROMPTS)])
    known = paired({"nll": nll})
    assert known and given.known
    given.known.covariance["nll"] = known.covariance["nll"]
    given.rows = [
        row.model_copy(update={"nll": float(values.mean())})
        for row, values in zip(given.rows, nll, strict=True)
    ]
    answers = verdict(given)
    assert "it is worse in the likelihood" in answers[0].why
    assert "gives the demonstrations less likelihood" in answers[3].why
    given.rows[1] = given.rows[1].model_copy(update={"entropy": 0.4})
    given.rows[0] = given.rows[0].model_copy(update={"entropy": 1.0})
    assert "entropy is less than half" not in verdict(given)[3].why  # answers became better


def test_runs_of_earlier_versions_have_their_own_errors() -> None:
    rows = [
        Measures(name="base", sampled=0.5, sampled_se=0.02),
        Measures(name="0", sampled=0.6, sampled_se=0.02),
    ]
    found = difference(rows, None, "sampled", 1, 0)
    assert found and found.low == pytest.approx(0.1 - 1.96 * 0.02 * 2**0.5, abs=1e-5)
    assert verdict(Facts(rows, None, {}, Config()))[0].short == "Yes."
    bare = [row.model_copy(update={"sampled_se": None}) for row in rows]
    assert verdict(Facts(bare, None, {}, Config()))[0].short == "Unknown."
    odd = [rows[0], rows[1].model_copy(update={"sampled": float("nan")})]
    assert verdict(Facts(odd, None, {}, Config()))[0].short == "Unknown."


def test_intervals_are_the_known_ones() -> None:
    """Bonett and Price's against the base, as `win_rate` has it; Student's t of 2.262 for 9."""
    verdicts = [1.0] * 30 + [0.5] * 50 + [0.0] * 20
    known = paired({"judged": np.array([[0.5] * 100, verdicts])})
    rows = [Measures(name="base", judged=0.5), Measures(name="0", judged=0.55)]
    found, same = difference(rows, known, "judged", 1, 0), win_rate(verdicts)
    assert found and found[1:] == pytest.approx([same.low - 0.5, same.high - 0.5])
    values = noise(2, 10)
    rows = [Measures(name="base", nll=values[0].mean()), Measures(name="0", nll=values[1].mean())]
    found = difference(rows, paired({"nll": values}), "nll", 1, 0)
    error = (values[1] - values[0]).std(ddof=1) / 10**0.5
    assert found and found.high - found.value == pytest.approx(2.262157 * error, rel=1e-3)
    # As many looks, as much wider (Bonferroni); z of 0.9875 is 2.2414.
    wide = difference(
        rows, Paired(prompts=10**6, covariance={"nll": [[1, 0], [0, 1]]}), "nll", 1, 0, 2
    )
    assert wide and wide.high - wide.value == pytest.approx(2.241403 * 2**0.5, rel=1e-5)
    # Differences that are all alike are not certain.
    alike = paired({"sampled": np.array([[0.0] * 5, [1.0] * 5])})
    rows = [Measures(name="base", sampled=0.0), Measures(name="0", sampled=1.0)]
    found = difference(rows, alike, "sampled", 1, 0)
    assert found and found.low < 0.3 and found.high == 1


def test_no_difference_is_seldom_called_one() -> None:
    """Of two policies that are equally good, on 100 prompts: 5 % at most, within the error."""
    rng = np.random.default_rng(0)
    claims = 0
    for _ in range(400):
        hard = rng.random(100)
        values = (rng.random((2, 100)) * 0.5 + hard * 0.5 > 0.5).astype(float)
        rows = [
            Measures(name=n, sampled=v.mean()) for n, v in zip(("base", "0"), values, strict=True)
        ]
        found = difference(rows, paired({"sampled": values}), "sampled", 1, 0)
        assert found
        claims += found.sign != 0
    assert claims / 400 < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


def evaluation(name: str, answers: list[str], **changes: Any) -> Evaluation:
    values = {
        "name": name,
        "answers": answers,
        "greedy_answers": answers,
        "answer_tokens": [[1] * len(answer) for answer in answers],
        "truncated": [False] * len(answers),
        "demonstration_logps": [-1.0] * len(answers),
        "base_answer_logps": [-1.0] * len(answers),
        "sampled": 0.5,
    }
    return Evaluation.model_validate(values | changes)


def test_samples_are_those_on_which_policies_differ() -> None:
    rows = [
        evaluation("base", ["a", "b", "c", "x", "y", "x"]),
        evaluation("0", ["a", "b", "x", "x", "y", "d"]),
        evaluation("1", ["a", "x", "c", "d", "z", "e"]),
        evaluation("sft 0", ["?"] * 6),
    ]
    gold = ["a", "b", "c", "d", "e", "f"]
    values = by_prompt(rows, gold, None)
    assert values["sampled"].tolist()[:3] == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
    ]
    assert values["preferred"][2].tolist() == [0.5, 0, 0.5, 1, 0.5, 0.5] and "judged" not in values
    became = kinds(rows, values)
    assert became == ["same", "worse", "same", "better", "other", "other"]
    assert chosen(became, 24) == [3, 1, 4, 5, 0, 2] and chosen(became, 2) == [3, 1]
    alone = [row.model_copy(update={"sampled": None, "verdicts": [0.5] * 6}) for row in rows]
    assert {*by_prompt(alone, [None] * 6, None)} == {"length", "judged"}
    assert paired(by_prompt([rows[0]], gold[:1] * 6, None)) is not None
    assert paired({"length": np.zeros((2, 1))}) is None and paired(by_prompt([], [], None)) is None


def test_a_distance_is_never_told_as_negative() -> None:
    found = verdict(facts({"base": 0.5, "0": 0.6}, changes={"0": {"kl": -0.014}}))
    said = " ".join(answer.why for answer in found)
    assert "no distance from the base" in said and "-0.0" not in said
