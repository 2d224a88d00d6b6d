from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data.collate import collate_flat, collate_padded
from llamafactory.data.types import IGNORE_INDEX, Example

X = IGNORE_INDEX


def example(ids: list[int], labels: list[int], weights: list[float] | None = None) -> Example:
    return Example(
        input_ids=np.array(ids, dtype=np.int32),
        labels=np.array(labels, dtype=np.int32),
        weights=None if weights is None else np.array(weights, dtype=np.float32),
    )


def test_a_padded_batch() -> None:
    batch = collate_padded([example([5, 6, 7], [X, X, 7]), example([8, 9], [8, 9])], pad_id=0, multiple_of=4)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.target_rows.tolist() == [1, 4]
    assert batch.target_ids.tolist() == [7, 9]
    assert batch.segment_lengths is None
    assert (batch.num_rows, batch.num_tokens, batch.num_targets) == (2, 5, 2)


def test_a_flat_batch_restarts_positions_and_has_no_target_across_segments() -> None:
    batch = collate_flat([example([5, 6, 7], [X, X, 7]), example([8, 9], [8, 9])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.segment_lengths == (3, 2)
    assert batch.attention_mask is None
    assert batch.target_rows.tolist() == [1, 3]
    assert batch.target_ids.tolist() == [7, 9]


def test_weights_are_carried_only_where_some_differ_from_one() -> None:
    plain, weighted = example([1, 2], [X, 2]), example([3, 4], [X, 4], [0.0, 0.5])
    assert collate_flat([plain, plain]).target_weights is None
    both = collate_flat([plain, weighted])
    assert both.target_weights is not None
    assert both.target_weights.tolist() == [1.0, 0.5]


def test_no_examples_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        collate_padded([], pad_id=0)


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    made = []
    for length in draw(st.lists(st.integers(1, 12), min_size=1, max_size=6)):
        ids = draw(st.lists(st.integers(0, 99), min_size=length, max_size=length))
        marks = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        made.append(example(ids, [token if mark else X for token, mark in zip(ids, marks, strict=True)]))
    return made


@given(examples())
def test_padded_and_flat_batches_ask_for_the_same_targets(made: list[Example]) -> None:
    padded, flat = collate_padded(made, pad_id=0), collate_flat(made)
    assert padded.target_ids.tolist() == flat.target_ids.tolist()
    assert padded.num_targets == flat.num_targets == sum(one.num_supervised for one in made)
    for batch in (padded, flat):
        seen = batch.input_ids.flatten()
        assert torch.equal(seen[batch.target_rows + 1], batch.target_ids)
        assert batch.input_ids.shape == batch.position_ids.shape
    assert padded.input_ids.shape[1] % 8 == 0
