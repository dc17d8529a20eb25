"""Packing: every token once, in a row with room, seeing exactly its own history."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaspin.batching import Tree, collate, pack

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(SIZES, st.integers(1, 20))
def test_pack(sizes: list[int], capacity: int) -> None:
    rows = pack(sizes, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    assert all(len(row) == 1 or sum(sizes[i] for i in row) <= capacity for row in rows)


@st.composite
def forests(draw: st.DrawFn) -> list[Tree]:
    """Trees whose tokens are all different numbers, so that each can be told from the others."""
    number = 0

    def take(count: int) -> np.ndarray:
        nonlocal number
        number += count
        return np.arange(number - count, number, dtype=np.int32)

    shapes = draw(st.lists(st.tuples(st.integers(1, 4), SIZES), min_size=1, max_size=4))
    return [Tree(take(p), tuple(take(r) for r in answers[:3])) for p, answers in shapes]


@settings(max_examples=60, deadline=None)
@given(forests(), st.sampled_from(["packed", "padded"]), st.integers(1, 40), st.integers(1, 6))
def test_every_token_sees_its_own_history(
    trees: list[Tree], layout: str, row_tokens: int, window: int
) -> None:
    half = len(trees) // 2
    groups = [("a", trees[:half]), (None, trees[half:])] if half else [(None, trees)]
    batch = collate(groups, layout=layout, row_tokens=row_tokens)  # pyright: ignore
    wanted = [
        (tree.prompt, answer, name)
        for name, part in groups
        for tree in part
        for answer in tree.responses
    ]
    assert batch.lengths.tolist() == [len(answer) for _, answer, _ in wanted]
    assert batch.targets.tolist() == [int(t) for _, answer, _ in wanted for t in answer]
    ids, flat_depth = batch.input_ids.flatten(), batch.depth.flatten()
    width = batch.input_ids.shape[1]
    full, windowed = batch.attention()[:, 0], batch.attention(window)[:, 0]
    cursor = 0
    for prompt, answer, name in wanted:
        history = [int(t) for t in prompt]
        for target in map(int, answer):
            source = int(batch.source[cursor])
            row, column = divmod(source, width)
            # The state that predicts a target has seen the prompt and the answer so far, no more.
            assert batch.input_ids[row][full[row, column]].tolist() == history
            assert batch.input_ids[row][windowed[row, column]].tolist() == history[-window:]
            assert int(flat_depth[source]) == len(history) - 1
            assert int(ids[source]) == history[-1]
            assert any(s.adapter == name and s.start <= row < s.stop for s in batch.segments)
            history.append(target)
            cursor += 1
    assert full.any(-1).all(), "an empty row of the softmax would be NaN"


def test_nothing_to_train_is_an_error() -> None:
    empty = Tree(np.arange(3, dtype=np.int32), (np.zeros(0, np.int32),))
    with pytest.raises(ValueError, match="nothing would be trained"):
        collate([(None, [empty])], layout="packed", row_tokens=8)


def test_packing_computes_a_prompt_once() -> None:
    prompt = np.arange(50, dtype=np.int32)
    tree = Tree(prompt, tuple(np.arange(5, dtype=np.int32) for _ in range(4)))
    packed, padded = (
        collate([(None, [tree])], layout=layout, row_tokens=70)  # pyright: ignore
        for layout in ("packed", "padded")
    )
    assert (packed.tree >= 0).sum() == 70
    assert (padded.tree >= 0).sum() == 4 * 55
    assert torch.equal(packed.targets, padded.targets)
