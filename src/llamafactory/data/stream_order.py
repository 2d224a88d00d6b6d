"""The order of rows that are read one by one: several sources mixed, then shuffled in a buffer. Any rows, no tokens.

Everything is a function of seed and epoch. Memory is that of the buffer. Both iterators can say where they are, and
begin there again; where a row is in its source, `Source` must know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from llamafactory.data.mix import BLOCK, MixStrategy
from llamafactory.extras.errors import DataError

RowT = TypeVar("RowT")
RowT_co = TypeVar("RowT_co", covariant=True)


class Source(Protocol[RowT_co]):
    """Rows that can be read again from any of them on."""

    def open(self, mark: Any = None) -> Iterator[RowT_co]:
        """Starts reading at the row that `mark` names, or at the first one."""
        ...

    def mark(self, number: int, row: Any) -> Any:
        """What `open` needs to begin with `row`, before which `number` rows come; JSON-able."""
        ...


class MixedRows(Generic[RowT]):
    """The rows of all sources; with a strategy that interleaves, counts and order are those of `mix_rows`."""

    def __init__(
        self,
        sources: Sequence[Source[RowT]],
        strategy: MixStrategy,
        probs: Sequence[float] | None,
        seed: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Reads nothing yet, unless sources are interleaved: then one row of each.

        Args:
            sources: the sources.
            strategy: see `Mix`.
            probs: share of each source, None takes turns.
            seed: of the draws.
            state: where to begin, see `state`; None: at the first row.
        """
        self._strategy, self._probs = strategy, probs
        is_simple = strategy == "concat" or len(sources) == 1
        known = state or {}
        self._readers = [
            _Reader(source, known["readers"][number] if known else None, looks_ahead=not is_simple)
            for number, source in enumerate(sources)
        ]
        self._place = int(known.get("source", 0))
        self._is_over = bool(known.get("is_over", False))
        self._turns = _Turns(len(sources), probs, seed, known.get("turns"))
        self._rows = self._one_after_another() if is_simple else self._interleaved()

    def __iter__(self) -> Iterator[RowT]:
        """The rows from here on."""
        return self

    def __next__(self) -> RowT:
        """The next row."""
        return next(self._rows)

    def state(self) -> dict[str, Any]:
        """Where it is; JSON-able."""
        return {
            "source": self._place,
            "is_over": self._is_over,
            "turns": self._turns.state(),
            "readers": [reader.state() for reader in self._readers],
        }

    def _one_after_another(self) -> Iterator[RowT]:
        while self._place < len(self._readers):
            yield from self._readers[self._place].rest()
            self._place += 1

    def _interleaved(self) -> Iterator[RowT]:
        while not self._is_over:
            number = next(self._turns)
            reader = self._readers[number]
            has_row = not (self._strategy == "interleave_once" and reader.has_run_out)
            rows = [reader.take()] if has_row else []
            self._is_over = self._ends_after(number)
            yield from rows

    def _ends_after(self, number: int) -> bool:
        """Whether the epoch is over after a turn of source `number`."""
        probs = self._probs
        drawable = [one for place, one in enumerate(self._readers) if probs is None or probs[place] > 0]
        has_run_out = [one.has_run_out for one in drawable]
        is_turn_over = probs is not None or number == len(self._readers) - 1
        if self._strategy == "interleave_under":
            return is_turn_over and any(has_run_out)
        return (is_turn_over or self._strategy == "interleave_once") and all(has_run_out)


class _Reader(Generic[RowT]):
    """One source. With a look ahead it knows after each row whether it was the last one, and then begins again."""

    def __init__(self, source: Source[RowT], state: Mapping[str, Any] | None, *, looks_ahead: bool) -> None:
        self._source = source
        known = state or {}
        self.has_run_out = bool(known.get("has_run_out", False))
        self._mark: Any = known.get("mark")
        self._passed = int(known.get("passed", 0))  # rows before `_last`
        self._last: list[RowT] = []  # the row at which reading would begin again
        self._rows: Iterator[RowT] = iter(())
        if looks_ahead:
            self._rows = source.open(self._mark)
            self._last = [row for row in (next(self._rows, None),) if row is not None]
            if not self._last:
                raise DataError("a data set to mix has no rows", where="dataset", expected="at least one row in each")

    def state(self) -> dict[str, Any]:
        mark = self._source.mark(self._passed, self._last[0]) if self._last else self._mark
        return {"passed": self._passed, "mark": mark, "has_run_out": self.has_run_out}

    def rest(self) -> Iterator[RowT]:
        """All rows behind the last one; opens the source."""
        rows = self._source.open(self._mark)
        if self._mark is not None:
            self._last = [next(rows)]
        for row in rows:
            self._passed += len(self._last)
            self._last = [row]
            yield row

    def take(self) -> RowT:
        row = self._last[0]
        self._passed += 1
        following = next(self._rows, None)
        if following is None:
            self.has_run_out, self._passed = True, 0
            self._rows = self._source.open()
            following = next(self._rows)
        self._last = [following]
        return row


class _Draws:
    """Numbers drawn in blocks, so that a place among them can be kept: the generator before the block, and a count."""

    def __init__(
        self,
        generator: np.random.Generator,
        draw: Callable[[np.random.Generator], list[int]],
        state: Mapping[str, Any] | None,
    ) -> None:
        self.generator, self._draw = generator, draw
        self._block: list[int] = []
        self._used = 0
        if state is not None:
            generator.bit_generator.state = state["generator"]
        self._before: Any = generator.bit_generator.state
        if state is not None and state["used"]:
            self._refill()
            self._used = int(state["used"])

    def __next__(self) -> int:
        if self._used == len(self._block):
            self._refill()
        self._used += 1
        return self._block[self._used - 1]

    def state(self) -> dict[str, Any]:
        return {"generator": self._before, "used": self._used}

    def _refill(self) -> None:
        self._before = self.generator.bit_generator.state
        self._block, self._used = self._draw(self.generator), 0


class _Turns:
    """Which source comes next."""

    def __init__(self, count: int, probs: Sequence[float] | None, seed: int, state: Any) -> None:
        self._count = count
        self._number = -1 if state is None or probs is not None else int(state)
        self._draws: _Draws | None = None
        if probs is not None:
            shares = np.array(probs) / sum(probs)

            def draw(generator: np.random.Generator) -> list[int]:
                return generator.choice(count, size=BLOCK, p=shares).tolist()

            self._draws = _Draws(np.random.default_rng(seed), draw, state)

    def __next__(self) -> int:
        if self._draws is not None:
            return next(self._draws)
        self._number = (self._number + 1) % self._count
        return self._number

    def state(self) -> Any:
        return self._number if self._draws is None else self._draws.state()


class ShuffledRows(Generic[RowT]):
    """The rows in random order; a row comes at most `buffer_size` places early, and any number of places late."""

    def __init__(
        self,
        rows: Iterator[RowT],
        buffer_size: int,
        seed: int,
        epoch: int,
        *,
        state: Mapping[str, Any] | None = None,
        held: Sequence[RowT] = (),
    ) -> None:
        """Reads nothing yet.

        Args:
            rows: in their order, from where they are on.
            buffer_size: rows that are held at a time; 1 keeps their order.
            seed: of the draws.
            epoch: another one gives another order.
            state: where to begin, see `state`; None: before the first row.
            held: what `held` was there.
        """
        generator = np.random.default_rng([seed & (2**64 - 1), epoch])
        self._draws = _Draws(
            generator,
            lambda generator: generator.integers(buffer_size, size=BLOCK).tolist(),
            None if state is None else state["draws"],
        )
        self._source, self._size = rows, buffer_size
        self._num_drained = 0 if state is None else int(state["drained"])
        self._buffer = list(held)
        self._rows = self._shuffled()

    def __iter__(self) -> Iterator[RowT]:
        """The rows from here on."""
        return self

    def __next__(self) -> RowT:
        """The next row."""
        return next(self._rows)

    def held(self) -> list[RowT]:
        """The rows that were read and may still come, in the order of their places in the buffer."""
        return list(self._buffer)

    def state(self) -> dict[str, Any]:
        """Where it is, besides `held`; JSON-able."""
        return {"draws": self._draws.state(), "drained": self._num_drained}

    def _shuffled(self) -> Iterator[RowT]:
        for row in self._source:
            if len(self._buffer) < self._size:
                self._buffer.append(row)
                continue
            place = next(self._draws)
            drawn, self._buffer[place] = self._buffer[place], row
            yield drawn
        order = self._draws.generator.permutation(len(self._buffer)).tolist()
        while self._num_drained < len(order):
            self._num_drained += 1
            yield self._buffer[order[self._num_drained - 1]]
