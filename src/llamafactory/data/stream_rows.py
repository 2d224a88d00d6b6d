"""The rows of a stream, one epoch after another, and its place as JSON: a resumed run seeks, and does not read again.

A place is the epoch, where each data set goes on (file, line, byte), the random draws, and which rows the shuffling
buffer holds: their places, from which they are read again. Rows on a hub have no place; there the rows of the current
epoch are passed over, without being tokenised.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llamafactory.data.mix import MixStrategy
from llamafactory.data.sources import Place, SourceRow, list_files, read_places, read_source
from llamafactory.data.stream_order import MixedRows, ShuffledRows
from llamafactory.data.types import DatasetSpec
from llamafactory.extras.errors import DataError
from llamafactory.extras.log import note

Read = tuple[int, SourceRow]
"""The number of a data set, and a row of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions:
    """How rows are read.

    Attributes:
        strategy: how data sets are mixed, see `Mix`.
        probs: share of each data set, None takes turns.
        buffer_size: rows that shuffling looks at; 1 keeps their order.
        seed: of mixing and shuffling.
        max_samples: rows of each data set, None: all.
        num_held_out: first rows of each data set that are left out of training.
        max_bad_rows: share of bad rows at which the run stops; counted from one buffer of rows on.
        variables: values for `{{key}}` placeholders.
    """

    strategy: MixStrategy
    probs: tuple[float, ...] | None
    buffer_size: int
    seed: int
    max_samples: int | None
    num_held_out: tuple[int, ...]
    max_bad_rows: float
    variables: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A place in the stream; cheap to take, because it only names rows that are in memory.

    Attributes:
        epoch: passes over the data before it.
        passed: rows of the epoch before it.
        drawn: rows of each data set before it, over all epochs.
        mixed: see `MixedRows.state`.
        shuffled: see `ShuffledRows.state`.
        held: rows in the shuffling buffer.
    """

    epoch: int
    passed: int
    drawn: tuple[int, ...]
    mixed: dict[str, Any]
    shuffled: dict[str, Any]
    held: list[Read]


class StreamRows:
    """An endless iterator over rows that can begin anywhere."""

    def __init__(self, specs: Sequence[DatasetSpec], options: StreamOptions) -> None:
        """Nothing is read yet."""
        self._specs, self._options = tuple(specs), options
        self._begin(0)
        self._drawn = [0] * len(self._specs)

    def __iter__(self) -> Iterator[Read]:
        """The rows from here on."""
        return self

    def __next__(self) -> Read:
        """The next row.

        Raises:
            DataError: unreadable data, or no rows.
        """
        while True:
            row = next(self._rows, None)
            if row is not None:
                self._passed += 1
                self._drawn[row[0]] += 1
                return row
            if not self._passed:
                raise DataError("no rows to train on", where="dataset", fix="set a smaller val_size, or more rows")
            self._begin(self._epoch + 1)

    def mark(self) -> Mark:
        """Where the next row is."""
        return Mark(
            epoch=self._epoch,
            passed=self._passed,
            drawn=tuple(self._drawn),
            mixed=self._mixed.state() if self._mixed else {},
            shuffled=self._rows.state(),
            held=self._rows.held(),
        )

    def state_of(self, mark: Mark) -> dict[str, Any]:
        """A mark as JSON."""
        state: dict[str, Any] = {
            "epoch": mark.epoch,
            "passed": mark.passed,
            "drawn": dict(zip((spec.name for spec in self._specs), mark.drawn, strict=True)),
        }
        if all(map(_has_places, self._specs)) and mark.mixed:
            held = [(number, row.place) for number, row in mark.held if row.place is not None]
            state |= {"files": _order_of(self._specs, self._options), "mixed": mark.mixed, "shuffled": mark.shuffled,
                      "held": _packed(held)}  # fmt: skip
        return state

    def seek(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_of` was.

        Raises:
            DataError: unreadable data, or a row is no longer where it was.
        """
        drawn = [int(state["drawn"].get(spec.name, 0)) for spec in self._specs]
        if state.get("files") == _order_of(self._specs, self._options):
            self._begin(
                state["epoch"], mixed=state["mixed"], shuffled=state["shuffled"], held=_unpacked(state["held"])
            )
            self._passed = state["passed"]
        else:
            self._begin(state["epoch"])
            if state["passed"]:
                note(f"streaming: {state['passed']:,} rows of this epoch are passed over, one by one")
            for _ in islice(self, state["passed"]):
                pass
        self._drawn = drawn

    def _begin(
        self,
        epoch: int,
        *,
        mixed: Mapping[str, Any] | None = None,
        shuffled: Mapping[str, Any] | None = None,
        held: Sequence[tuple[int, Place]] = (),
    ) -> None:
        options = self._options
        self._epoch, self._passed = epoch, 0
        self._mixed: MixedRows[Read] | None = None

        def rows() -> Iterator[Read]:
            self._mixed = in_order(self._specs, options, mixed)
            return self._mixed

        found = [
            read_places(spec, [place for source, place in held if source == number]) if held else {}
            for number, spec in enumerate(self._specs)
        ]
        self._rows: ShuffledRows[Read] = ShuffledRows(
            _opened_late(rows) if mixed is None else rows(),
            options.buffer_size,
            options.seed,
            epoch,
            state=shuffled,
            held=[(source, found[source][place]) for source, place in held],
        )


def in_order(
    specs: Sequence[DatasetSpec], options: StreamOptions, state: Mapping[str, Any] | None = None
) -> MixedRows[Read]:
    """The rows of one epoch, not shuffled, from `state` on."""
    pairs = zip(specs, options.num_held_out, strict=True)
    sources = [_DataSet(number, spec, skipped, options.max_samples) for number, (spec, skipped) in enumerate(pairs)]
    return MixedRows(sources, options.strategy, options.probs, options.seed, state)


def _opened_late(rows: Any) -> Iterator[Read]:
    yield from rows()


class _DataSet:
    """One data set as a `Source`; rows that are held out come before its first."""

    def __init__(self, number: int, spec: DatasetSpec, num_held_out: int, max_samples: int | None) -> None:
        self._number, self._spec, self._skipped, self._limit = number, spec, num_held_out, max_samples

    def open(self, mark: Any = None) -> Iterator[Read]:
        if mark is None:
            rows = islice(read_source(self._spec), self._skipped, self._limit)
        else:
            before = int(mark["rows"]) + self._skipped
            rows = read_source(self._spec, Place(*mark["place"]), before)
            rows = islice(rows, None if self._limit is None else max(0, self._limit - before))
        return ((self._number, row) for row in rows)

    def mark(self, number: int, row: Any) -> Any:
        place = row[1].place
        return None if place is None else {"rows": number, "place": list(place)}


def _has_places(spec: DatasetSpec) -> bool:
    return spec.source in ("file", "cloud")


def _order_of(specs: Sequence[DatasetSpec], options: StreamOptions) -> str:
    """A name for the files, their sizes, and the order of their rows: in another one a place means nothing."""
    facts: list[Any] = [options.strategy, options.probs, options.buffer_size, options.seed, options.max_samples]
    facts.append(options.num_held_out)
    for spec in specs:
        files = list_files(Path(spec.location)) if spec.source == "file" else []
        facts.append([spec.source, spec.split, *((file.name, file.stat().st_size) for file in files)])
    return sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _packed(held: Sequence[tuple[int, Place]]) -> str:
    """Data set and place of many rows as a short text."""
    numbers = np.array([(source, *place) for source, place in held], dtype="<i8").reshape(-1, 4)
    steps = np.diff(numbers, axis=0, prepend=0).T
    return base64.b64encode(zlib.compress(np.ascontiguousarray(steps).tobytes())).decode()


def _unpacked(text: str) -> list[tuple[int, Place]]:
    raw = zlib.decompress(base64.b64decode(text))
    numbers = np.cumsum(np.frombuffer(raw, dtype="<i8").reshape(4, -1).T, axis=0)
    return [(source, Place(*place)) for source, *place in numbers.tolist()]
