"""The order of rows that are read one by one: several sources mixed, then shuffled in a buffer. Any rows, no tokens.

Everything is a function of seed and epoch. Memory is that of the buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from llamafactory.data.mix import BLOCK, MixStrategy
from llamafactory.extras.errors import DataError

RowT = TypeVar("RowT")
Opener = Callable[[], Iterator[RowT]]
"""Starts reading a source at its first row."""


def mixed_rows(
    sources: Sequence[Opener[RowT]], strategy: MixStrategy, probs: Sequence[float] | None, seed: int
) -> Iterator[RowT]:
    """The rows of all sources; with a strategy that interleaves, counts and order are those of `mix_rows`.

    Args:
        sources: the sources.
        strategy: see `Mix`.
        probs: share of each source, None takes turns.
        seed: of the draws.
    """
    if strategy == "concat" or len(sources) == 1:
        for source in sources:
            yield from source()
        return
    readers = [_Reader(source) for source in sources]
    for number in _turns(len(sources), probs, seed):
        reader = readers[number]
        if not (strategy == "interleave_once" and reader.has_run_out):
            yield reader.take()
        drawable = [one for place, one in enumerate(readers) if probs is None or probs[place] > 0]
        has_run_out = [one.has_run_out for one in drawable]
        is_turn_over = probs is not None or number == len(sources) - 1
        if strategy == "interleave_under":
            if is_turn_over and any(has_run_out):
                return
        elif (is_turn_over or strategy == "interleave_once") and all(has_run_out):
            return


class _Reader(Generic[RowT]):
    """One source, which knows after each row whether it was the last one, and then begins again."""

    def __init__(self, source: Opener[RowT]) -> None:
        self._source = source
        self._rows: Iterator[RowT] = source()
        self._next: list[RowT] = [row for row in (next(self._rows, None),) if row is not None]
        if not self._next:
            raise DataError("a data set to mix has no rows", where="dataset", expected="at least one row in each")
        self.has_run_out = False

    def take(self) -> RowT:
        row = self._next[0]
        following = next(self._rows, None)
        if following is None:
            self.has_run_out = True
            self._rows = self._source()
            following = next(self._rows)
        self._next = [following]
        return row


def _turns(count: int, probs: Sequence[float] | None, seed: int) -> Iterator[int]:
    if probs is None:
        while True:
            yield from range(count)
    shares = np.array(probs) / sum(probs)
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.choice(count, size=BLOCK, p=shares).tolist()


def shuffled_rows(rows: Iterator[RowT], buffer_size: int, seed: int, epoch: int) -> Iterator[RowT]:
    """The rows in random order; a row comes at most `buffer_size` places early, and any number of places late.

    Args:
        rows: in their order.
        buffer_size: rows that are held at a time; 1 keeps their order.
        seed: of the draws.
        epoch: another one gives another order.
    """
    generator = np.random.default_rng([seed & (2**64 - 1), epoch])
    draws = iter(())
    buffer: list[RowT] = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
            continue
        if (place := next(draws, None)) is None:
            draws = iter(generator.integers(buffer_size, size=BLOCK).tolist())
            place = next(draws)
        yield buffer[place]
        buffer[place] = row
    for place in generator.permutation(len(buffer)).tolist():
        yield buffer[place]
