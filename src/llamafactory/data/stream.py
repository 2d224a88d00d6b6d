"""Rows that become examples when a step needs them (`streaming: true`): in bounded memory, the first step at once.

Step N holds the rows `N * size` up to `(N + 1) * size` of an endless stream, whatever became of them: a row that
cannot be used makes its step smaller. So a step's rows follow from its number; a resumed run passes over the rows
before it without tokenising them.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from hashlib import sha256
from itertools import count, islice
from pathlib import Path
from typing import Any

from llamafactory.data.data_report import BAD_ROWS_NAME, DatasetReport, LostRow
from llamafactory.data.encoded_rows import RowEncoder
from llamafactory.data.formats import Record, find_format
from llamafactory.data.mix import MixStrategy
from llamafactory.data.records import fill_variables, read_record, require_text_alone
from llamafactory.data.row_error import RowError
from llamafactory.data.sources import SourceRow, list_files, read_source
from llamafactory.data.stream_order import mixed_rows, shuffled_rows
from llamafactory.data.table import ExampleTable, ShardBuilder, table_of
from llamafactory.data.types import DatasetSpec
from llamafactory.extras.errors import DataError
from llamafactory.extras.log import warn

Read = tuple[DatasetSpec, SourceRow]
SAMPLE_ROWS = 64
_NUM_KEPT = 3
"""Windows that are kept, because the loop may go back by two steps."""


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
class StreamWindow:
    """The examples of some rows of the stream, and the origins of these rows."""

    table: ExampleTable
    origins: tuple[str, ...]


class ExampleStream:
    """Windows of an endless stream of rows, one epoch after another.

    Attributes:
        num_encoded: rows that were tokenised.
    """

    def __init__(
        self, specs: Sequence[DatasetSpec], rows: RowEncoder, options: StreamOptions, output_dir: Path | None = None
    ) -> None:
        """Nothing is read yet; `output_dir` is where lost rows are written."""
        self._specs, self._encoder, self._options = tuple(specs), rows, options
        self._output_dir = output_dir
        self._rows: Iterator[Read] = iter(())
        self._place = -1  # of the next row; -1 before the stream was opened
        self._kept: deque[tuple[int, int, StreamWindow]] = deque(maxlen=_NUM_KEPT)
        self._furthest = 0  # rows before this place were counted
        self._reasons: Counter[str] = Counter()
        self._num_bad = 0
        self.num_encoded = 0

    def window(self, first: int, size: int) -> StreamWindow:
        """The examples of the rows from place `first` on, `size` of them.

        Raises:
            DataError: unreadable data, too many bad rows, or no rows.
        """
        for place, length, window in self._kept:
            if (place, length) == (first, size):
                return window
        if self._place < 0 or first < self._place:
            self._rows, self._place = self._endless(), 0
        next(islice(self._rows, first - self._place, first - self._place), None)  # passed over, not tokenised
        chosen = list(islice(self._rows, size))
        self._place = first + size
        window = StreamWindow(
            table=self._encode(chosen, counts_from=first), origins=tuple(row.origin for _, row in chosen)
        )
        self._kept.append((first, size, window))
        return window

    def held_out(self) -> ExampleTable:
        """The rows that are left out of training, for evaluation."""
        pairs = zip(self._specs, self._options.num_held_out, strict=True)
        chosen = [(spec, row) for spec, number in pairs for row in islice(self._read(spec), number)]
        return self._encode(chosen)

    @cached_property
    def sample(self) -> ExampleTable:
        """Examples of the first rows, in their order, to judge lengths by before training."""
        return self._encode(list(islice(self._mixed(), SAMPLE_ROWS)))

    def _read(self, spec: DatasetSpec) -> Iterator[SourceRow]:
        return islice(read_source(spec), self._options.max_samples)

    def _open(self, spec: DatasetSpec, skipped: int) -> Iterator[Read]:
        return ((spec, row) for row in islice(self._read(spec), skipped, None))

    def _mixed(self) -> Iterator[Read]:
        options = self._options
        pairs = zip(self._specs, options.num_held_out, strict=True)
        sources: list[Callable[[], Iterator[Read]]] = [partial(self._open, spec, number) for spec, number in pairs]
        return mixed_rows(sources, options.strategy, options.probs, options.seed)

    def _endless(self) -> Iterator[Read]:
        options = self._options
        for epoch in count():
            is_empty = True
            for row in shuffled_rows(self._mixed(), options.buffer_size, options.seed, epoch):
                is_empty = False
                yield row
            if is_empty:
                raise DataError("no rows to train on", where="dataset", fix="set a smaller val_size, or more rows")

    def _encode(self, chosen: Sequence[Read], *, counts_from: int | None = None) -> ExampleTable:
        """The rows as examples; those at places from `counts_from` on are counted, each place once."""
        builder = ShardBuilder()
        names = {row.origin: spec.name for spec, row in chosen}
        lost: list[LostRow] = []
        records: list[tuple[str, Record]] = []
        for spec, row in chosen:
            try:
                record = read_record(row, find_format(spec.formatting), spec)
            except RowError as error:
                lost.append(LostRow.from_error(spec.name, row.origin, error))
                continue
            require_text_alone(record, row.origin)
            records.append((row.origin, fill_variables(record, self._options.variables, spec.name)))

        def lose(origin: str, error: RowError) -> None:
            lost.append(LostRow.from_error(names[origin], origin, error))

        for encoded in self._encoder.encode(records, lose):
            kept, reason = self._encoder.keep(encoded.examples, encoded.origin)
            if kept:
                builder.add(kept, encoded.flag)
            else:
                lost.append(LostRow(dataset=names[encoded.origin], origin=encoded.origin, reason=reason, is_bad=False))
        self.num_encoded += len(chosen)
        if counts_from is not None and counts_from + len(chosen) > self._furthest:
            self._furthest = counts_from + len(chosen)
            self._count(lost)
        return table_of([builder.build()])

    def _count(self, lost: Sequence[LostRow]) -> None:
        """Counts lost rows by reason, says so at 1, 10, 100, ... and stops where too many are bad."""
        before = self._reasons.total()
        self._reasons.update(row.reason for row in lost)
        self._num_bad += sum(row.is_bad for row in lost)
        if lost and self._output_dir is not None:
            self._output_dir.mkdir(parents=True, exist_ok=True)
            with (self._output_dir / BAD_ROWS_NAME).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in lost)
        reasons = ", ".join(f"{reason} ({number:,})" for reason, number in self._reasons.most_common())
        if len(str(before or "")) < len(str(self._reasons.total() or "")):
            shown = lost[0].render() if lost[0].is_bad else f"{lost[0].origin}: {lost[0].reason}"
            warn(f"rows left out of the first {self._furthest:,}: {reasons}; the latest: {shown}")
        allowed = self._options.max_bad_rows * max(self._furthest, self._options.buffer_size)
        if self._num_bad > allowed:
            raise DataError(
                f"{self._num_bad:,} of the first {self._furthest:,} rows cannot be used",
                where=lost[-1].origin,
                found=reasons,
                expected=f"at most {self._options.max_bad_rows:.1%} of the rows (max_bad_rows)",
                fix="correct the rows, or raise max_bad_rows to drop them",
            )


def streamed_report(spec: DatasetSpec) -> DatasetReport:
    """What is known of a data set before its rows are read; the fingerprint is that of its place and file sizes."""
    facts: list[Any] = [spec.name, spec.source, spec.location, spec.subset, spec.split, spec.folder, spec.formatting]
    facts += [sorted(spec.columns.items()), sorted(spec.tags.items())]
    if spec.source == "file":
        facts += [(file.name, file.stat().st_size) for file in list_files(Path(spec.location))]
    fingerprint = sha256(json.dumps(facts, default=str).encode()).hexdigest()
    return DatasetReport(
        name=spec.name, num_rows=0, num_kept=0, num_examples=0, dropped={}, num_truncated=0, num_cut_tokens=0,
        num_tokens=0, num_supervised_tokens=0, fingerprint=fingerprint, is_streamed=True,
    )  # fmt: skip
