from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

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
