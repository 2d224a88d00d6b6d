"""Documents of plain text -> blocks of equal length for pre-training. Chooses no order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from llamafactory.data.table import ExampleTable
from llamafactory.data.types import Example


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockTable(Sequence[Example]):
    """Blocks cut out of documents that lie end to end; put together when asked for.

    Attributes:
        documents: the text of whole rows.
        ends: int64 `[documents]`, the token behind each document.
        starts: int64 `[blocks]`, first token of each block.
        lengths: int64 `[blocks]`, tokens of each block.
    """

    documents: ExampleTable
    ends: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Every block is a group of its own."""
        return np.arange(len(self) + 1, dtype=np.int64)

    @property
    def flags(self) -> None:
        """Text has no flags."""
        return

    @property
    def values(self) -> None:
        """Text has no numbers."""
        return

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        """One block, or a list of them."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        pieces = list(self._pieces(int(self.starts[index]), int(self.lengths[index])))
        if len(pieces) == 1:
            return pieces[0]
        return Example(
            input_ids=np.concatenate([piece.input_ids for piece in pieces]),
            labels=np.concatenate([piece.labels for piece in pieces]),
        )

    def origin(self, index: int) -> str:
        """The document that a block begins in, and the one that it ends in, as `ExampleTable.origin`."""
        start, length = int(self.starts[index]), int(self.lengths[index])
        ends = np.searchsorted(self.ends, [start, start + length - 1], side="right").tolist()
        first, last = (self.documents.origin(document) for document in ends)
        return first if first == last else f"{first} to {last}"

    def _pieces(self, start: int, length: int) -> Iterator[Example]:
        stop = start + length
        document = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            first = start - (int(self.ends[document - 1]) if document else 0)
            last = first + min(stop, int(self.ends[document])) - start
            if last > first:
                yield self.documents.piece(document, first, last)
            start += last - first
            document += 1


def cut_blocks(documents: ExampleTable, block_len: int, *, is_isolated: bool = False) -> BlockTable:
    """Cut all documents into blocks of `block_len` tokens; every token is in one block.

    Args:
        documents: one example a document.
        block_len: tokens of a block. The last block is shorter; it is left out if it is a single token, from which
            nothing could be learned.
        is_isolated: no block holds more than one document. A document that is longer than a block is cut into equal
            parts.
    """
    ends = np.cumsum(documents.lengths, dtype=np.int64)
    if is_isolated:
        counts = -(-documents.lengths // block_len)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        part = np.arange(counts.sum(), dtype=np.int64) - first
        sizes, counts_of = np.repeat(documents.lengths, counts), np.repeat(counts, counts)
        begin, end = part * sizes // counts_of, (part + 1) * sizes // counts_of
        starts = np.repeat(ends - documents.lengths, counts) + begin
        lengths = end - begin
    else:
        total = int(ends[-1]) if len(ends) else 0
        starts = np.arange(0, total, block_len, dtype=np.int64)
        lengths = np.minimum(starts + block_len, total) - starts
    is_useful = lengths > 1
    return BlockTable(documents=documents, ends=ends, starts=starts[is_useful], lengths=lengths[is_useful])
