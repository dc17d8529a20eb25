"""Packing: every token once, seeing exactly its own history."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaspin.model.attention import KEYS_ONLY, Keys, attend
from alphaspin.model.batching import Batch, collate
from alphaspin.model.tree import Tree

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@st.composite
def forests(draw: st.DrawFn) -> list[Tree]:
    """Trees whose tokens are different numbers, so that each can be told from the others.

    Responses may begin as an earlier one of their tree does, end with it, or be it.
    """
    number = 1

    def take(count: int) -> np.ndarray:
        nonlocal number
        number += count
        return np.arange(number - count, number, dtype=np.int32)

    def answers(lengths: list[int]) -> tuple[np.ndarray, ...]:
        found = [take(lengths[0])]
        for length in lengths[1:4]:
            like = found[draw(st.integers(0, len(found) - 1))]
            shared = draw(st.integers(0, len(like)))
            own = length if not shared else draw(st.integers(0, length))
            found.append(np.concatenate([like[:shared], take(own)]))
        return tuple(found)

    shapes = draw(st.lists(st.tuples(st.integers(1, 4), SIZES), min_size=1, max_size=4))
    return [Tree(take(p), answers(lengths)) for p, lengths in shapes]


def histories(batch: Batch, window: int | None) -> list[set[int]]:
    """Token ids that each token of the batch sees, by attention itself.

    With equal scores a token attends evenly to what it sees; the values are the rows of the
    identity, so that its output says which tokens these are.
    """
    rows, width = batch.input_ids.shape
    if batch.places is None:  # padded: whatever stands before it in its row
        lines = batch.input_ids.tolist()
        reach = width if window is None else window
        return [set(line[max(0, k + 1 - reach) : k + 1]) for line in lines for k in range(width)]
    tokens = rows * width
    flat = torch.zeros(rows, 1, width, 4)
    seen, _ = attend(
        torch.nn.Identity(),
        flat,
        flat,
        torch.eye(tokens).view(rows, 1, width, tokens),
        None,
        places=batch.places,
        sliding_window=window,
    )
    ids = batch.input_ids.flatten()
    return [set(ids[row > 0].tolist()) for row in seen.view(tokens, tokens)]


@settings(max_examples=60, deadline=None)
@given(forests(), st.sampled_from(["packed", "padded"]), st.integers(1, 6))
def test_every_token_sees_its_own_history(trees: list[Tree], layout: str, window: int) -> None:
    half = len(trees) // 2
    groups = [("a", trees[:half]), (None, trees[half:])] if half else [(None, trees)]
    batch = collate(groups, layout=layout)  # pyright: ignore
    wanted = [
        (tree.prompt, answer, name)
        for name, part in groups
        for tree in part
        for answer in tree.responses
    ]
    assert batch.lengths.tolist() == [len(answer) for _, answer, _ in wanted]
    assert batch.targets[batch.entries].tolist() == [int(t) for _, y, _ in wanted for t in y]
    ids, position_ids = batch.input_ids.flatten(), batch.position_ids.flatten()
    full, windowed = histories(batch, None), histories(batch, window)
    cursor = 0
    for prompt, answer, name in wanted:
        history = [int(t) for t in prompt]
        for target in map(int, answer):
            source = int(batch.source[batch.entries[cursor]])
            # The state that predicts a target has seen the prompt and the answer so far, no more.
            assert full[source] == set(history)
            assert windowed[source] == set(history[-window:])
            assert int(position_ids[source]) == len(history) - 1
            assert int(ids[source]) == history[-1]
            assert any(s.adapter == name and s.start <= source < s.stop for s in batch.segments)
            history.append(target)
            cursor += 1
    assert batch.segments[0].start == 0 and batch.segments[-1].stop == len(ids)
    if layout == "packed":
        # Nothing twice, and nothing that nobody needs.
        prefixes = {
            (i, *y[:n])
            for i, tree in enumerate(trees)
            for y in tree.responses
            for n in range(1, len(y))
        }
        assert len(ids) == sum(len(tree.prompt) for tree in trees) + len(prefixes)
        predictions = {
            (i, *y[:n])
            for i, tree in enumerate(trees)
            for y in tree.responses
            for n in range(1, len(y) + 1)
        }
        assert len(batch.targets) == len(predictions)


@settings(max_examples=60, deadline=None)
@given(forests(), st.integers(1, 6))
def test_the_last_layer_asks_for_what_predicts(trees: list[Tree], window: int) -> None:
    half = len(trees) // 2
    groups = [("a", trees[:half]), (None, trees[half:])] if half else [(None, trees)]
    batch = collate(groups, layout="packed")
    expected, last = histories(batch, window), batch.last
    if last is None:
        assert {*batch.source.tolist()} == {*range(batch.input_ids.numel())}
        return
    seen, asking = last.seen.tokens.tolist(), last.asking.tokens.tolist()
    assert {*batch.source.tolist()} == {*asking}
    assert sorted(seen + asking) == [*range(batch.input_ids.numel())]
    for part in (last.seen, last.asking):
        for whole, mine in zip(batch.segments, part.segments, strict=True):
            assert mine.adapter == whole.adapter
            among = part.tokens[mine.start : mine.stop].tolist()
            assert among == [t for t in part.tokens.tolist() if whole.start <= t < whole.stop]
    values = torch.eye(len(seen + asking))[None, None]
    flat = torch.zeros(1, 1, len(seen + asking), 4)
    with pytest.raises(Keys) as keys:
        silent = (flat[:, :, : len(seen)], values[:, :, : len(seen)])
        attend(torch.nn.Identity(), flat[:, :, : len(seen)], *silent, None, places=KEYS_ONLY)
    found, _ = attend(
        torch.nn.Identity(),
        flat[:, :, len(seen) :],
        flat[:, :, len(seen) :],
        values[:, :, len(seen) :],
        None,
        places=replace(last.places, before=keys.value.args),
        sliding_window=window,
    )
    ids = batch.input_ids.flatten()[torch.tensor(seen + asking)]
    for token, row in zip(asking, found[0, :, 0], strict=True):
        assert set(ids[row > 0].tolist()) == expected[token]


def test_nothing_to_train_is_an_error() -> None:
    empty = Tree(np.arange(3, dtype=np.int32), (np.zeros(0, np.int32),))
    with pytest.raises(ValueError, match="nothing would be trained"):
        collate([(None, [empty])], layout="packed")


def test_an_empty_response_among_others_counts_no_token() -> None:
    prompt, answer = np.arange(3, dtype=np.int32), np.array([7, 8], np.int32)
    batch = collate([(None, [Tree(prompt, (np.zeros(0, np.int32), answer))])], layout="packed")
    assert batch.lengths.tolist() == [0, 2]
    assert batch.targets.tolist() == [7, 8]
    assert histories(batch, None)[int(batch.source[-1])] == {0, 1, 2, 7}


def test_packing_computes_nothing_twice_and_no_padding() -> None:
    prompt = np.arange(50, dtype=np.int32)
    trees = [Tree(prompt, tuple(np.arange(n, dtype=np.int32) for n in (5, 1, 9, 5)))] * 2
    packed, padded = (collate([(None, trees)], layout=layout) for layout in ("packed", "padded"))
    assert packed.input_ids.shape == (1, 2 * (50 + 8))
    assert len(packed.targets) == 2 * 9
    assert padded.input_ids.shape == (8, 58)
    assert torch.equal(packed.targets[packed.entries], padded.targets)


def test_sequences_of_unlike_length_are_not_padded_to_the_longest() -> None:
    trees = [Tree(np.arange(2, dtype=np.int32), (np.zeros(n, np.int32),)) for n in (3, 30, 200, 29)]
    places = collate([(None, trees)], layout="packed").places
    assert places is not None and places.buckets == ((1, 201), (2, 31), (1, 4))
