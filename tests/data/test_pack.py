from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data.batch import Batch
from llamafactory.data.collate import collate_flat
from llamafactory.data.pack import pack_best_fit


def test_the_fullest_bin_with_room_is_chosen() -> None:
    assert pack_best_fit([6, 5, 4, 3, 2], capacity=10) == [[0, 2], [1, 3, 4]]


def test_equal_lengths_keep_their_order_and_nothing_gives_no_bins() -> None:
    assert pack_best_fit([5, 5, 5], capacity=5) == [[0], [1], [2]]
    assert pack_best_fit([], capacity=5) == []


def test_an_example_longer_than_a_bin_stands_alone() -> None:
    assert pack_best_fit([12, 3], capacity=10) == [[0], [1]]


@given(st.lists(st.integers(1, 64), max_size=200))
def test_each_index_once_and_no_bin_over_its_capacity(lengths: list[int]) -> None:
    bins = pack_best_fit(lengths, capacity=64)
    assert sorted(index for group in bins for index in group) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in group) <= 64 for group in bins)
    assert bins == pack_best_fit(lengths, capacity=64)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_at_most_one_bin_is_half_empty(lengths: list[int]) -> None:
    fills = [sum(lengths[index] for index in group) for group in pack_best_fit(lengths, capacity=64)]
    assert sum(fill * 2 <= 64 for fill in fills) <= 1


@given(st.lists(st.integers(0, 20), max_size=60), st.integers(1, 16))
def test_the_bins_are_those_of_a_plain_search(lengths: list[int], capacity: int) -> None:
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fitting = [number for number in range(len(bins)) if 0 < free[number] >= lengths[index]]
        if fitting:
            number = min(fitting, key=lambda number: (free[number], number))
        else:
            number = len(bins)
            bins.append([])
            free.append(max(capacity, lengths[index]))
        bins[number].append(index)
        free[number] -= lengths[index]
    assert pack_best_fit(lengths, capacity) == bins


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30), seed=st.integers(0, 99))
def test_packing_keeps_what_is_supervised(lengths: list[int], seed: int, make_examples: Any) -> None:
    examples = make_examples(lengths, seed=seed)
    for places in pack_best_fit(lengths, capacity=16):
        packed = collate_flat([examples[place] for place in places])
        assert packed.segment_lengths == tuple(lengths[place] for place in places)
        targets: list[tuple[int, int]] = []
        start = 0
        for place in places:
            alone = collate_flat([examples[place]])
            targets += [(start + int(row), int(token)) for row, token in zip(*target(alone), strict=True)]
            start += lengths[place]
        assert targets == [(int(row), int(token)) for row, token in zip(*target(packed), strict=True)]


def target(batch: Batch) -> tuple[Any, Any]:
    return batch.target_rows, batch.target_ids
