from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data.blocks import cut_blocks
from llamafactory.data.table import ExampleTable, ShardBuilder, table_of
from llamafactory.data.types import Example


def documents(lengths: list[int]) -> ExampleTable:
    builder = ShardBuilder()
    first = 0
    for length in lengths:
        ids = np.arange(first, first + length, dtype=np.int32)
        builder.add([Example(input_ids=ids, labels=ids)])
        first += length
    return table_of([builder.build()])


@given(lengths=st.lists(st.integers(0, 40), max_size=12), block_len=st.integers(2, 16))
def test_joined_blocks_hold_every_token_once_in_order(lengths: list[int], block_len: int) -> None:
    blocks = cut_blocks(documents(lengths), block_len)
    tokens = [token for block in blocks for token in block.input_ids.tolist()]
    rest = sum(lengths) - len(tokens)
    assert tokens == list(range(len(tokens)))
    assert rest == (sum(lengths) % block_len == 1)
    assert all(len(block) == block_len for block in blocks[:-1])
    assert all(block.labels.tolist() == block.input_ids.tolist() for block in blocks)
    assert blocks.lengths.tolist() == [len(block) for block in blocks]
    assert blocks.offsets.tolist() == list(range(len(blocks) + 1))


@given(lengths=st.lists(st.integers(2, 40), max_size=12), block_len=st.integers(2, 16))
def test_isolated_blocks_never_hold_two_documents(lengths: list[int], block_len: int) -> None:
    blocks = cut_blocks(documents(lengths), block_len, is_isolated=True)
    ends = np.cumsum(lengths)
    tokens: list[int] = []
    for block in blocks:
        owners = set(np.searchsorted(ends, block.input_ids, side="right").tolist())
        assert len(owners) == 1
        assert len(block) <= block_len
        tokens += block.input_ids.tolist()
    lost = set(range(sum(lengths))) - set(tokens)
    assert not lost or block_len <= 3  # only parts of a single token are left out
    assert tokens == sorted(set(tokens))


def test_no_documents_give_no_blocks() -> None:
    assert len(cut_blocks(documents([]), 8)) == 0
    assert len(cut_blocks(documents([1]), 8)) == 0
    with pytest.raises(IndexError):
        cut_blocks(documents([4]), 8)[1]


def test_a_block_names_the_documents_that_it_begins_and_ends_in() -> None:
    builder = ShardBuilder()
    for number, length in enumerate((3, 5, 2), start=1):
        ids = np.arange(length, dtype=np.int32)
        builder.add([Example(input_ids=ids, labels=ids)])
        builder.note_origin(f"texts.txt:{number}")
    blocks = cut_blocks(table_of([builder.build()]), 4)
    assert [blocks.origin(place) for place in range(3)] == [
        "texts.txt:1 to texts.txt:2", "texts.txt:2", "texts.txt:3",
    ]  # fmt: skip
