"""Preferences, the verdict cache, and each judge against an independent computation."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import http_servers

from alphaspin.errors import InputError, JudgeError
from alphaspin.judges.base import Comparison, Judge, Prompt, preferences
from alphaspin.judges.cache import CachedJudge
from alphaspin.judges.function import Function
from alphaspin.judges.matrix import Pair, bradley_terry, pick_pair, win_probabilities, win_rates
from alphaspin.judges.server import ServerJudge, parse_verdict
from alphaspin.judges.verifiable import VerifiableJudge

ASK = Prompt([{"role": "user", "content": "which number is larger?"}], "seven")
ALSO = Prompt([{"role": "user", "content": "name a number"}], "one")
ROCK = {("rock", "scissors"): 0.8, ("scissors", "paper"): 0.9, ("paper", "rock"): 0.7}


class TableJudge:
    """Intransitive verdicts from `ROCK`; dies before question number `limit`."""

    def __init__(self, identity: str = "table", limit: int | None = None, bias: float = 0.0):
        self.identity = identity
        self.both_orders = bias != 0
        self.limit = limit
        self.bias = bias
        self.asked: list[tuple[str, str, str]] = []

    def compare(self, pairs: Sequence[Comparison]) -> Iterator[Mapping[int, float]]:
        for i, pair in enumerate(pairs):
            if len(self.asked) == self.limit:
                raise ConnectionError("the judge went away")
            self.asked.append((pair.prompt.messages[0]["content"], pair.first, pair.second))
            one, two = (pair.first, pair.second), (pair.second, pair.first)
            yield {i: (ROCK[one] if one in ROCK else 1 - ROCK[two]) + self.bias}


class Fixed:
    """Groups given in advance."""

    identity = "fixed"
    both_orders = False

    def __init__(self, *groups: dict[int, Any]):
        self.groups = groups

    def compare(self, pairs: Sequence[Comparison]) -> Iterator[Mapping[int, float]]:
        del pairs
        yield from self.groups


def pairs_of(*texts: str, prompt: Prompt = ASK) -> list[Comparison]:
    return [Comparison(prompt, a, b) for a, b in itertools.combinations(texts, 2)]


# Preferences


def test_an_intransitive_judge_keeps_its_cycle() -> None:
    judge = TableJudge()
    (matrix,) = win_probabilities(judge, [ASK], [["rock", "paper", "scissors"]])
    expected = [[0.5, 0.3, 0.8], [0.7, 0.5, 0.1], [0.2, 0.9, 0.5]]
    np.testing.assert_allclose(matrix, expected, atol=1e-15)
    assert win_rates(matrix) == pytest.approx([1.6 / 3, 1.3 / 3, 1.6 / 3])
    assert len(judge.asked) == 3  # each unordered pair once
    scores = bradley_terry(matrix)
    better = scores > 0.5
    for i, j, k in itertools.permutations(range(3)):  # what averaged scores make of it
        assert not (better[i, j] and better[j, k] and better[k, i])


def test_prompts_have_their_own_matrices_and_equal_responses_tie_unasked() -> None:
    judge = TableJudge()
    found = win_probabilities(
        judge, [ASK, ALSO, ASK], [["rock", "paper", "rock"], ["paper"], ["paper", "rock"]]
    )
    np.testing.assert_allclose(found[0], [[0.5, 0.3, 0.5], [0.7, 0.5, 0.7], [0.5, 0.3, 0.5]])
    assert found[1].tolist() == [[0.5]]
    np.testing.assert_allclose(found[2], [[0.5, 0.7], [0.3, 0.5]])
    assert judge.asked == [("which number is larger?", "paper", "rock")]  # once, whatever the order


def test_the_same_texts_under_other_prompts_are_other_questions() -> None:
    judge = TableJudge()
    other = Prompt(ASK.messages, "another demonstration")
    win_probabilities(judge, [ASK, ALSO, other], [["rock", "paper"]] * 3)
    assert len(judge.asked) == 3


def test_a_preference_for_a_position_cancels() -> None:
    judge = TableJudge(bias=0.05)
    (matrix,) = win_probabilities(judge, [ASK], [["rock", "paper", "scissors"]])
    np.testing.assert_allclose(matrix[0], [0.5, 0.3, 0.8], atol=1e-15)
    np.testing.assert_array_equal(matrix + matrix.T, np.ones((3, 3)))
    assert len(judge.asked) == 6


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{0: math.nan}], r"fixed: verdict nan is not a number in \[0, 1\], on 'a' against 'b'"),
        ([{0: 0.2, 1: 1.01}], "verdict 1.01 .* on 'a' against 'c'"),
        ([{2: -0.1}], "verdict -0.1 .* on 'b' against 'c'"),
        ([{0: None}], "verdict None"),
        ([{0: "0.3"}], "verdict '0.3'"),
        ([{0: 0.5, 1: 0.5}], "2 verdicts for 3 pairs"),
        ([{0: 0.5}, {0: 0.5}], "pair 0"),
        ([{3: 0.5}], "pair 3"),
        ([{-1: 0.5}], "pair -1"),
    ],
)
def test_bad_verdicts_are_named(groups: list[dict[int, Any]], message: str, tmp_path: Path) -> None:
    for judge in (Fixed(*groups), CachedJudge(Fixed(*groups), tmp_path / "verdicts")):
        with pytest.raises(ValueError, match=message):
            preferences(judge, pairs_of("a", "b", "c"))


# From a matrix to a pair


def test_best_and_worst_with_ties_and_duplicates() -> None:
    matrix = np.array([[0.5, 0.5, 0.9], [0.5, 0.5, 0.9], [0.1, 0.1, 0.5]])
    assert pick_pair(matrix) == Pair(0, 2, pytest.approx(1.9 / 3), pytest.approx(0.7 / 3))
    flipped = 1 - matrix
    assert pick_pair(flipped) == Pair(2, 0, pytest.approx(2.3 / 3), pytest.approx(1.1 / 3))
    assert pick_pair(np.full((5, 5), 0.5)) is None
    assert pick_pair(np.full((1, 1), 0.5)) is None


def test_a_cycle_in_which_all_tie_is_no_pair_despite_rounding() -> None:
    for p in np.random.default_rng(0).random(50).tolist():
        q = 1 - p
        rows = [[0.5, p, 1 - p], [1 - p, 0.5, p], [p, 1 - p, 0.5]]
        assert pick_pair(np.array(rows)) is None
        assert pick_pair(np.array(rows), "bradley_terry") is None
        assert pick_pair(np.array([[0.5, p, q], [q, 0.5, 1 - q], [1 - q, q, 0.5]])) is None


def test_last_bits_are_no_preference() -> None:
    assert pick_pair(np.array([[0.5, 0.5 + 1e-12], [0.5 - 1e-12, 0.5]])) is None
    tied = np.array([[0.5, 0.5 - 1e-12, 0.9], [0.5 + 1e-12, 0.5, 0.9], [0.1, 0.1, 0.5]])
    pair = pick_pair(tied)
    assert pair is not None and (pair.best, pair.worst) == (0, 2)


def test_labels() -> None:
    matrix = np.array([[0.5, 0.8, 0.6], [0.2, 0.5, 0.3], [0.4, 0.7, 0.5]])
    soft, single, hard, fitted = (
        pick_pair(matrix, kind)  # pyright: ignore[reportArgumentType]
        for kind in ("soft", "single", "hard", "bradley_terry")
    )
    assert soft == Pair(0, 1, pytest.approx(1.9 / 3), pytest.approx(1 / 3))
    assert single == Pair(0, 1, 0.8, 0.2)
    assert hard == Pair(0, 1, 1.0, 0.0)
    logit = [sum(math.log(p / (1 - p)) for p in row) / 3 for row in matrix.tolist()]
    expected = [
        sum(1 / (1 + math.exp(logit[k] - logit[i])) for k in range(3)) / 3 for i in range(3)
    ]
    assert fitted == Pair(0, 1, pytest.approx(expected[0]), pytest.approx(expected[1]))


def test_bradley_terry_leaves_what_is_bradley_terry_and_bounds_certainty() -> None:
    rewards = np.array([0.3, -1.2, 2.0, 0.0])
    matrix = 1 / (1 + np.exp(rewards[None] - rewards[:, None]))
    np.testing.assert_allclose(bradley_terry(matrix), matrix, rtol=1e-12)
    sure = bradley_terry(np.array([[0.5, 1.0], [0.0, 0.5]]))
    np.testing.assert_allclose(sure, [[0.5, 1 - 1e-6], [1e-6, 0.5]], atol=1e-9)


def test_bradley_terry_is_the_public_code_up_to_its_factor_two() -> None:
    """scripts/rank.py and compute_prob.py of uclaml/SPPO, on logits of both orders."""
    logits = np.random.default_rng(1).normal(size=(5, 5))
    np.fill_diagonal(logits, 0)
    theirs = (logits - logits.T).mean(-1)  # get_scores_from_cmps of llm_blender
    ours = bradley_terry(1 / (1 + np.exp(-(logits - logits.T) / 2)))
    np.testing.assert_allclose(ours, 1 / (1 + np.exp((theirs[None] - theirs[:, None]) / 2)))


# The cache

TEXTS = [["rock", "paper", "scissors"], ["scissors", "rock"], ["paper", "scissors"]]
PROMPTS = [ASK, ALSO, ASK]


@pytest.mark.parametrize("bias", [0.0, 0.05])
def test_a_judge_that_fails_half_way_is_asked_only_for_the_rest(
    tmp_path: Path, bias: float
) -> None:
    whole = TableJudge(bias=bias)
    expected = win_probabilities(whole, PROMPTS, TEXTS)
    assert len(whole.asked) == len(set(whole.asked)) == (8 if bias else 4)
    for limit in range(len(whole.asked)):
        path = tmp_path / f"verdicts-{limit}"
        broken = TableJudge(limit=limit, bias=bias)
        with pytest.raises(ConnectionError):
            win_probabilities(CachedJudge(broken, path), PROMPTS, TEXTS)
        judge = TableJudge(bias=bias)
        cached = CachedJudge(judge, path)
        found = win_probabilities(cached, PROMPTS, TEXTS)
        assert broken.asked + judge.asked == whole.asked  # all, and none twice
        assert cached.asked == len(judge.asked)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
        win_probabilities(cached, PROMPTS, TEXTS)
        win_probabilities(CachedJudge(judge, path), PROMPTS, TEXTS)
        assert broken.asked + judge.asked == whole.asked


def test_a_file_torn_at_any_byte_loses_what_was_torn_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "verdicts"
    whole = TableJudge()
    expected = win_probabilities(CachedJudge(whole, path), PROMPTS, TEXTS)
    content = path.read_bytes()
    lines = [len(b"\n".join(content.split(b"\n")[: n + 1])) for n in range(5)]
    assert lines[0] == 0 and lines[-1] == len(content)
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        judge = TableJudge()
        found = win_probabilities(CachedJudge(judge, path), PROMPTS, TEXTS)
        kept = sum(end <= cut for end in lines[1:])
        assert judge.asked == whole.asked[kept:]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
        again = TableJudge()  # the record after the torn one was not swallowed
        win_probabilities(CachedJudge(again, path), PROMPTS, TEXTS)
        assert again.asked == []


def test_damage_is_asked_again_and_never_a_number(tmp_path: Path) -> None:
    path = tmp_path / "verdicts"
    win_probabilities(CachedJudge(TableJudge(), path), PROMPTS, TEXTS)
    content = path.read_bytes()
    for damaged in (
        content.replace(b"0.8", b"0.3"),
        b"\0" * 40 + content[40:],
        content[:40] + b"\xff\n" + content[41:],
    ):
        path.write_bytes(damaged)
        judge = TableJudge()
        (first, *_) = win_probabilities(CachedJudge(judge, path), PROMPTS, TEXTS)
        assert first[0].tolist() == pytest.approx([0.5, 0.3, 0.8])
        assert 0 < len(judge.asked) < 4


def test_a_judge_never_reads_anothers_verdicts(tmp_path: Path) -> None:
    path = tmp_path / "verdicts"
    win_probabilities(CachedJudge(TableJudge("one"), path), PROMPTS, TEXTS)
    other = TableJudge("two")
    win_probabilities(CachedJudge(other, path), PROMPTS, TEXTS)
    assert len(other.asked) == 4
    for identity in ("one", "two"):  # both live in the file
        judge = TableJudge(identity)
        win_probabilities(CachedJudge(judge, path), PROMPTS, TEXTS)
        assert judge.asked == []


def test_bad_verdicts_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "verdicts"
    with pytest.raises(JudgeError):
        preferences(CachedJudge(Fixed({0: 0.25}, {1: 2.0}), path), pairs_of("a", "b", "c"))
    again = CachedJudge(Fixed({0: 0.5, 1: 0.75}), path)
    assert preferences(again, pairs_of("a", "b", "c")) == [0.25, 0.5, 0.75]


def test_texts_of_any_kind_have_keys(tmp_path: Path) -> None:
    odd = ["line\nbreak", "\ud800", "\0", "é", ""]
    judge = CachedJudge(Fixed(dict.fromkeys(range(10), 0.25)), tmp_path / "verdicts")
    first = preferences(judge, pairs_of(*odd))
    assert preferences(CachedJudge(Fixed(), tmp_path / "verdicts"), pairs_of(*odd)) == first


# Judges without a model


def test_verifiable() -> None:
    judge = VerifiableJudge(r"is (\w+)$")
    prompt = Prompt(ASK.messages, "it is seven")
    right, also, wrong, none = "it is seven", "so it is seven", "it is five", "no idea"
    matrix = win_probabilities(judge, [prompt], [[right, also, wrong, none]])[0]
    assert matrix.tolist() == [
        [0.5, 0.5, 1, 1],
        [0.5, 0.5, 1, 1],
        [0, 0, 0.5, 0.5],
        [0, 0, 0.5, 0.5],
    ]
    assert VerifiableJudge().identity != judge.identity
    for answer in (None, "seven"):
        with pytest.raises(InputError, match=r"is \(.*demonstrated answer"):
            win_probabilities(judge, [Prompt(ASK.messages, answer)], [["a", "b"]])


def function(name: str, *, both_orders: bool = True) -> Judge:
    return Function(function=name, both_orders=both_orders).load(None)


def test_callable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def shorter(pair):\n    return 0.9 if len(pair.first) < len(pair.second) else 0.1\n"
    (tmp_path / "my_judge_a.py").write_text(source)
    (tmp_path / "my_judge_b.py").write_text(source + "# edited\n")
    monkeypatch.chdir(tmp_path)
    judge = function("my_judge_a:shorter", both_orders=False)
    assert preferences(judge, pairs_of("a", "bbb", "cc")) == pytest.approx([0.9, 0.9, 0.1])
    one, other = (function(f"my_judge_{x}:shorter").identity for x in "ab")
    assert one.split("@")[1] != other.split("@")[1]
    biased = function("my_judge_a:shorter")  # says .1 both ways where the lengths are equal
    assert biased.both_orders
    assert preferences(biased, pairs_of("ab", "cd")) == [0.5]
    for name in ("my_judge_a:longer", "no_such_module:f", "my_judge_a", "my_judge_a:__name__"):
        with pytest.raises(InputError, match=name):
            function(name)


# A judge behind a server


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Start a server whose `reply(question, number)` gives a text, a status, or raw bytes."""
    monkeypatch.setenv("no_proxy", "*")

    def start(reply: Callable[[str, int], Any]) -> tuple[str, list[dict[str, Any]]]:
        def respond(path: str, body: Any, number: int) -> tuple[int, bytes, dict[str, str]]:
            answer = reply(body["messages"][-1]["content"], number)
            if isinstance(answer, int):
                return answer, b"no such model: gpt-9", {"Retry-After": "0"}
            if isinstance(answer, str):
                content = {"choices": [{"message": {"content": answer}}]}
                answer = json.dumps(content).encode()
            return 200, answer, {}

        return new(respond)

    with http_servers() as new:
        yield start


def answers_of(question: str) -> tuple[str, str]:
    """What a question calls A and B."""
    first = question.split("<answer_A>\n")[1].split("\n</answer_A>")[0]
    return first, question.split("<answer_B>\n")[1].split("\n</answer_B>")[0]


def cyclic(question: str, number: int) -> str:
    """Rock, paper, scissors; prefers A where it has no opinion."""
    del number
    return "Reasons.\n\n" + (
        "[[A]]" if answers_of(question) not in {b[::-1] for b in ROCK} else "[[B]]"
    )


def test_server_judges_in_both_orders(serve: Callable[..., Any]) -> None:
    url, requests = serve(cyclic)
    judge = ServerJudge(url, "tiny", api_key="secret", backoff=0.01)
    (matrix,) = win_probabilities(judge, [ASK], [["rock", "paper", "scissors", "lizard"]])
    assert matrix.tolist() == [
        [0.5, 0, 1, 0.5],
        [1, 0.5, 0, 0.5],
        [0, 1, 0.5, 0.5],
        [0.5, 0.5, 0.5, 0.5],  # always A: a preference for a position is a tie
    ]
    asked = [answers_of(r["messages"][-1]["content"]) for r in requests]
    assert len(asked) == len(set(asked)) == 12
    assert {r["path"] for r in requests} == {"/v1/chat/completions"}
    assert {m["role"] for r in requests for m in r["messages"]} == {"user"}  # Gemma has no system
    assert all("which number is larger?" in r["messages"][-1]["content"] for r in requests)
    assert requests[0]["headers"]["Authorization"] == "Bearer secret"
    assert (requests[0]["model"], requests[0]["temperature"]) == ("tiny", 0)


def test_server_is_asked_again_after_what_may_pass(serve: Callable[..., Any]) -> None:
    trouble: list[Any] = [503, 429, "I cannot say", b"<html>", "[[C]]"]
    url, requests = serve(lambda question, number: trouble[number - 1])
    judge = ServerJudge(url, "tiny", workers=1, backoff=0.001)
    assert dict(next(iter(judge.compare(pairs_of("a", "b"))))) == {0: 0.5}
    assert len(requests) == 5


@pytest.mark.parametrize(
    ("answer", "attempts", "message"),
    [
        ("A is better.", 3, r"no verdict in 3 attempts; last: needs one \[\[A\]\].*A is better"),
        ("[[A]] or [[B]]", 3, "needs one"),
        ("[[A]], because it is longer", 3, "needs one"),
        (b'{"error": "overloaded"}', 3, "not a chat completion.*overloaded"),
        (500, 3, "no verdict in 3 attempts; last: HTTP 500"),
        (404, 1, "chat/completions: HTTP 404: no such model: gpt-9"),
    ],
)
def test_server_errors_say_what_came_back(
    serve: Callable[..., Any], answer: Any, attempts: int, message: str
) -> None:
    url, requests = serve(lambda question, number: answer)
    judge = ServerJudge(url, "tiny", workers=1, attempts=3, backoff=0.001)
    with pytest.raises(JudgeError, match=message):
        list(judge.compare(pairs_of("a", "b")))
    assert len(requests) == attempts


def test_nobody_at_the_address(serve: Callable[..., Any]) -> None:
    del serve  # only for the proxy setting
    judge = ServerJudge("http://127.0.0.1:9/v1", "tiny", attempts=2, backoff=0.001)
    with pytest.raises(JudgeError, match=r"127.0.0.1:9.*in 2 attempts.*refused"):
        list(judge.compare(pairs_of("a", "b")))
    with pytest.raises(InputError, match="http"):
        ServerJudge("localhost:8000", "tiny")


@pytest.mark.parametrize("workers", [1, 4])
def test_no_answered_request_is_repeated_after_a_failure(
    serve: Callable[..., Any], tmp_path: Path, workers: int
) -> None:
    """The server refuses from the seventh request on; the next process asks for the rest."""
    answered: list[tuple[str, str]] = []
    ill = [True]

    def reply(question: str, number: int) -> Any:
        if ill[0] and number >= 7:
            return 400
        answered.append(answers_of(question))
        return cyclic(question, number)

    url, requests = serve(reply)
    texts = [["rock", "paper", "scissors", "lizard"]]
    path = tmp_path / "verdicts"
    with pytest.raises(JudgeError, match="HTTP 400"):
        judge = ServerJudge(url, "tiny", workers=workers, backoff=0.001)
        win_probabilities(CachedJudge(judge, path), [ASK], texts)
    assert len(answered) == 6 and len(requests) <= 6 + workers  # and then nobody is troubled
    ill[0] = False
    cached = CachedJudge(ServerJudge(url, "tiny", workers=workers), path)
    (matrix,) = win_probabilities(cached, [ASK], texts)
    assert len(answered) == len(set(answered)) == 12 and cached.asked == 6
    assert matrix[0].tolist() == [0.5, 0, 1, 0.5]


def test_who_stops_listening_stops_the_questions(serve: Callable[..., Any]) -> None:
    url, requests = serve(cyclic)
    verdicts = ServerJudge(url, "tiny", workers=1).compare(pairs_of(*map(str, range(20))))
    next(iter(verdicts))
    verdicts.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(requests) < 100  # of 190


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("[[A]]", 1), ("so [[B]].\n", 0), ("**[[C]]**", 0.5), ("a [[1, 2]] matrix\n[[A]]", 1)],
)
def test_verdict_marks(reply: str, expected: float) -> None:
    assert parse_verdict(reply) == expected


@pytest.mark.parametrize("reply", ["", "A", "[[a]]", "[[A]][[A]]", "[A]", "[[A]] no", "[[D]]"])
def test_other_replies_are_no_verdicts(reply: str) -> None:
    with pytest.raises(JudgeError):
        parse_verdict(reply)
