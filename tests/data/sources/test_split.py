from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data.sources.row import SourceRow
from llamafactory.data.sources.split import take_split
from llamafactory.extras.errors import DataError

NUMBERS = st.just("") | st.integers(-12, 12).map(str)
SHARES = st.just("") | (st.integers(-100, -8) | st.integers(0, 100)).map("{}%".format)


def taken(split: str, count: int) -> list[str]:
    def read(start: object) -> Iterator[SourceRow]:
        return (SourceRow(origin=str(number), values={}) for number in range(count))

    return [row.origin for row in take_split(read, split, "rows")]


@given(ends=st.tuples(NUMBERS, NUMBERS) | st.tuples(SHARES, SHARES), count=st.integers(13, 40))
def test_a_part_is_the_one_that_datasets_takes(ends: tuple[str, str], count: int) -> None:
    from datasets.arrow_reader import ReadInstruction

    start, stop = ends
    split = f"train[{start}:{stop}]" if start or stop else "train"
    [oracle] = ReadInstruction.from_spec(split).to_absolute({"train": count})  # pyright: ignore[reportArgumentType]
    expected = [str(number) for number in range(count)][oracle.from_ : oracle.to]
    assert taken(split, count) == expected


@pytest.mark.parametrize("split", ["test", "train+test", "train[1]", "train[a:b]"])
def test_files_have_no_other_split(split: str) -> None:
    with pytest.raises(DataError, match="files have no such split"):
        taken(split, 3)
