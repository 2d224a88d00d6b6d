from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory.data.mix import Mix, mix_rows
from llamafactory.data.stream_order import MixedRows, ShuffledRows
from llamafactory.extras.errors import DataError


class Numbers:
    """A source of whole numbers."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def open(self, mark: Any = None) -> Iterator[int]:
        return iter(self.numbers[mark or 0 :])

    def mark(self, number: int, row: Any) -> Any:
        return number


STRATEGIES = st.sampled_from(["concat", "interleave_under", "interleave_over", "interleave_once"])


@settings(deadline=None)
@given(data=st.data(), strategy=STRATEGIES, seed=st.integers(0, 50))
def test_a_stream_is_mixed_as_tables_are(data: st.DataObject, strategy: Any, seed: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    weights = st.lists(st.floats(0.1, 3), min_size=len(sizes), max_size=len(sizes))
    probs = data.draw(st.none() | weights)
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    pairs = zip(starts, sizes, strict=True)
    sources = [Numbers(*range(first, first + size)) for first, size in pairs]
    shares = None if probs is None else tuple(probs)
    mix = Mix(names=("a", "b", "c")[: len(sizes)], sizes=tuple(sizes), strategy=strategy, probs=shares, seed=seed)
    expected = list(range(sum(sizes))) if len(sizes) == 1 else mix_rows(mix, 0, shuffle=False).tolist()
    assert list(MixedRows(sources, strategy, probs, seed)) == expected


@given(count=st.integers(0, 60), size=st.integers(1, 70), epoch=st.integers(0, 2))
def test_shuffling_keeps_every_row_and_reads_no_further_than_its_buffer(count: int, size: int, epoch: int) -> None:
    read: list[int] = []

    def rows():
        for number in range(count):
            read.append(number)
            yield number

    seen = []
    for row in ShuffledRows(rows(), size, 3, epoch):
        seen.append(row)
        assert len(read) <= len(seen) + size
        assert row < len(seen) + size  # at most a buffer early
    assert sorted(seen) == list(range(count))
    assert seen == list(ShuffledRows(iter(range(count)), size, 3, epoch))


def test_epochs_differ_and_a_buffer_of_one_keeps_the_order() -> None:
    orders = [list(islice(ShuffledRows(iter(range(500)), 50, 1, epoch), 20)) for epoch in range(2)]
    assert orders[0] != orders[1]
    assert list(ShuffledRows(iter(range(9)), 1, 1, 0)) == list(range(9))


def test_an_empty_source_cannot_be_mixed() -> None:
    with pytest.raises(DataError, match="no rows"):
        list(MixedRows([Numbers(1), Numbers()], "interleave_over", None, 0))


@given(data=st.data(), strategy=STRATEGIES, seed=st.integers(0, 50), buffer=st.integers(1, 30))
def test_an_order_that_is_left_anywhere_goes_on_as_if_it_were_not(
    data: st.DataObject, strategy: Any, seed: int, buffer: int
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    probs = data.draw(st.none() | st.lists(st.floats(0.1, 3), min_size=len(sizes), max_size=len(sizes)).map(tuple))
    sources = [Numbers(*range(100 * place, 100 * place + size)) for place, size in enumerate(sizes)]

    def order(mixed: Any = None, shuffled: Any = None, held: Any = ()) -> tuple[Any, Any]:
        rows = MixedRows(sources, strategy, probs, seed, mixed)
        return rows, ShuffledRows(rows, buffer, seed, 1, state=shuffled, held=held)

    expected = list(order()[1])
    stop = data.draw(st.integers(0, len(expected)))
    rows, shuffled = order()
    before = list(islice(shuffled, stop))
    kept = json.loads(json.dumps([rows.state(), shuffled.state(), shuffled.held()]))
    assert before + list(order(*kept)[1]) == expected
