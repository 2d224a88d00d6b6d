"""The rows that examples were made of, for reward functions that look at other columns; read when first asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from llamafactory.data.records import RecordReader
from llamafactory.data.table import Examples, ExampleTable, Shard
from llamafactory.data.tokenised import Tokenised
from llamafactory.extras.errors import DataError


class SourceRows:
    """All rows of some data sets, as their files have them."""

    def __init__(self, sets: Sequence[tuple[RecordReader, Tokenised]]) -> None:
        """Reads nothing yet.

        Args:
            sets: each data set with what was made of it.
        """
        self._sets = list(sets)
        self._places: dict[int, tuple[int, int]] = {}
        self._rows: dict[int, list[Mapping[str, object]]] = {}
        for number, (_, one) in enumerate(self._sets):
            first = 0
            for shard in one.table.shards:
                self._places[id(shard)] = number, first
                first += len(shard.group_ends)

    def row(self, examples: Examples, index: int) -> Mapping[str, object]:
        """The row that an example was made of.

        Args:
            examples: a table of these data sets, in whatever order and selection.
            index: place of the example.

        Raises:
            DataError: rows that were not read by this run, or that have changed since.
        """
        if not isinstance(examples, ExampleTable):
            raise TypeError("only tables know their rows")
        number = int(examples.numbers[index])
        place = int(np.searchsorted(examples.starts, number, side="right")) - 1
        shard: Shard = examples.shards[place]
        if id(shard) not in self._places:
            raise DataError("the rows are not at hand", where="tokenized_path", fix="set dataset beside it")
        data_set, first = self._places[id(shard)]
        group = int(np.searchsorted(shard.group_ends, number - int(examples.starts[place]), side="right"))
        return self._all(data_set)[first + group]

    def _all(self, data_set: int) -> list[Mapping[str, object]]:
        if data_set not in self._rows:
            reader, one = self._sets[data_set]
            lost = {row.origin for row in one.lost}
            rows = [row.values for row in reader.rows() if row.origin not in lost]
            if len(rows) != one.table.num_groups:
                raise DataError(
                    "the rows have changed since they were tokenised",
                    where=one.report.name,
                    found=f"{len(rows):,} rows",
                    expected=f"{one.table.num_groups:,} rows",
                    fix="start again",
                )
            self._rows[data_set] = rows
        return self._rows[data_set]
