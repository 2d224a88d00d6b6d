from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory.data.mix import Mix, mix_rows
from llamafactory.data.stream_order import mixed_rows, shuffled_rows
from llamafactory.extras.errors import DataError

STRATEGIES = st.sampled_from(["concat", "interleave_under", "interleave_over", "interleave_once"])


@settings(deadline=None)
@given(data=st.data(), strategy=STRATEGIES, seed=st.integers(0, 50))
def test_a_stream_is_mixed_as_tables_are(data: st.DataObject, strategy, seed: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    weights = st.lists(st.floats(0.1, 3), min_size=len(sizes), max_size=len(sizes))
    probs = data.draw(st.none() | weights)
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    pairs = zip(starts, sizes, strict=True)
    sources = [lambda first=first, size=size: iter(range(first, first + size)) for first, size in pairs]
    shares = probs and tuple(probs)
    mix = Mix(names=("a", "b", "c")[: len(sizes)], sizes=tuple(sizes), strategy=strategy, probs=shares, seed=seed)
    expected = list(range(sum(sizes))) if len(sizes) == 1 else mix_rows(mix, 0, shuffle=False).tolist()
    assert list(mixed_rows(sources, strategy, probs, seed)) == expected


@given(count=st.integers(0, 60), size=st.integers(1, 70), epoch=st.integers(0, 2))
def test_shuffling_keeps_every_row_and_reads_no_further_than_its_buffer(count: int, size: int, epoch: int) -> None:
    read: list[int] = []

    def rows():
        for number in range(count):
            read.append(number)
            yield number

    seen = []
    for row in shuffled_rows(rows(), size, 3, epoch):
        seen.append(row)
        assert len(read) <= len(seen) + size
        assert row < len(seen) + size  # at most a buffer early
    assert sorted(seen) == list(range(count))
    assert seen == list(shuffled_rows(iter(range(count)), size, 3, epoch))


def test_epochs_differ_and_a_buffer_of_one_keeps_the_order() -> None:
    orders = [list(islice(shuffled_rows(iter(range(500)), 50, 1, epoch), 20)) for epoch in range(2)]
    assert orders[0] != orders[1]
    assert list(shuffled_rows(iter(range(9)), 1, 1, 0)) == list(range(9))


def test_an_empty_source_cannot_be_mixed() -> None:
    with pytest.raises(DataError, match="no rows"):
        list(mixed_rows([lambda: iter([1]), lambda: iter(())], "interleave_over", None, 0))
