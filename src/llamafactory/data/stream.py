"""Rows that become examples when a step needs them (`streaming: true`): in bounded memory, the first step at once.

Step N holds the rows `N * size` up to `(N + 1) * size` of an endless stream, whatever became of them: a row that
cannot be used makes its step smaller. So a step's rows follow from its number. A resumed run goes on at the place that
its checkpoint knows, without a look at the rows before it.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import file_digest, sha256
from itertools import islice
from pathlib import Path
from typing import Any

from llamafactory.data.data_report import BAD_ROWS_NAME, DatasetReport, LostRow
from llamafactory.data.encoded_rows import RowEncoder
from llamafactory.data.formats import Record, find_format
from llamafactory.data.records import fill_variables, read_record, require_text_alone
from llamafactory.data.row_error import RowError
from llamafactory.data.sources import SourceRow, list_files, read_source
from llamafactory.data.stream_rows import Mark, StreamOptions, StreamRows, in_order
from llamafactory.data.table import ExampleTable, ShardBuilder, table_of
from llamafactory.data.types import DatasetSpec
from llamafactory.extras.errors import DataError
from llamafactory.extras.log import warn

SAMPLE_ROWS = 64
_NUM_KEPT = 3
"""Windows that are kept, because the loop may go back by two steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamWindow:
    """The examples of some rows of the stream, and the origins of these rows."""

    table: ExampleTable
    origins: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    """A window, and the state of the stream before it."""

    first: int
    size: int
    window: StreamWindow
    mark: Mark
    losses: dict[str, Any]


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
        self._rows = StreamRows(self._specs, options)
        self._place = 0  # of the next row
        self._kept: deque[_Kept] = deque(maxlen=_NUM_KEPT)
        self._resume: Mapping[str, Any] | None = None
        self._furthest = 0  # rows before this place were counted
        self._reasons: Counter[str] = Counter()
        self._num_bad = 0
        self.num_encoded = 0

    def window(self, first: int, size: int) -> StreamWindow:
        """The examples of the rows from place `first` on, `size` of them.

        Raises:
            DataError: unreadable data, too many bad rows, or no rows.
        """
        for kept in self._kept:
            if (kept.first, kept.size) == (first, size):
                return kept.window
        self._go_to(first)
        before = self._rows.mark(), self._losses()
        chosen = [(self._specs[number], row) for number, row in islice(self._rows, size)]
        self._place = first + size
        window = StreamWindow(
            table=self._encode(chosen, counts_from=first), origins=tuple(row.origin for _, row in chosen)
        )
        self._kept.append(_Kept(first=first, size=size, window=window, mark=before[0], losses=before[1]))
        return window

    def state_at(self, first: int) -> dict[str, Any]:
        """What `restore` needs to begin at place `first`, that of the next window or of a kept one; JSON-able."""
        if first == self._place:
            return {"row": first, **self._rows.state_of(self._rows.mark()), "losses": self._losses()}
        for kept in self._kept:
            if kept.first == first:
                return {"row": first, **self._rows.state_of(kept.mark), "losses": kept.losses}
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Has the next window begin where `state_at` was, if that is not behind its first row."""
        if "epoch" not in state:  # an earlier version's; its rows are read from the first one
            return
        self._resume, self._place = state, -1
        losses = state["losses"]
        self._furthest, self._num_bad = losses["furthest"], losses["bad"]
        self._reasons = Counter(losses["reasons"])

    def _losses(self) -> dict[str, Any]:
        return {"furthest": self._furthest, "bad": self._num_bad, "reasons": dict(self._reasons)}

    def _go_to(self, first: int) -> None:
        """Makes the row at place `first` the next one."""
        if first < self._place or self._place < 0:
            self._rows, self._place = StreamRows(self._specs, self._options), 0
            if self._resume is not None and self._resume["row"] <= first:
                self._rows.seek(self._resume)
                self._place = self._resume["row"]
        next(islice(self._rows, first - self._place, first - self._place), None)  # passed over, not tokenised
        self._place = first

    def held_out(self) -> ExampleTable:
        """The rows that are left out of training, for evaluation."""
        pairs = zip(self._specs, self._options.num_held_out, strict=True)
        chosen = [(spec, row) for spec, number in pairs for row in islice(self._read(spec), number)]
        return self._encode(chosen)

    @cached_property
    def sample(self) -> ExampleTable:
        """Examples of the first rows, in their order, to judge lengths by before training."""
        rows = islice(in_order(self._specs, self._options), SAMPLE_ROWS)
        return self._encode([(self._specs[number], row) for number, row in rows])

    def _read(self, spec: DatasetSpec) -> Iterator[SourceRow]:
        return islice(read_source(spec), self._options.max_samples)

    def _encode(
        self, chosen: Sequence[tuple[DatasetSpec, SourceRow]], *, counts_from: int | None = None
    ) -> ExampleTable:
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
            kept, reason = self._encoder.keep(encoded)
            if kept:
                builder.take(encoded.shard, kept, encoded.flag, encoded.value)
                builder.note_origin(encoded.origin)
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
    """What is known of a data set before its rows are read; the fingerprint is that of its place and its files."""
    facts: list[Any] = [spec.name, spec.source, spec.location, spec.subset, spec.split, spec.folder, spec.formatting]
    facts += [sorted(spec.columns.items()), sorted(spec.tags.items())]
    if spec.source == "file":
        facts += files_digest(list_files(Path(spec.location)))
    fingerprint = sha256(json.dumps(facts, default=str).encode()).hexdigest()
    return DatasetReport(
        name=spec.name, num_rows=0, num_kept=0, num_examples=0, dropped={}, num_truncated=0, num_cut_tokens=0,
        num_tokens=0, num_supervised_tokens=0, fingerprint=fingerprint, is_streamed=True,
    )  # fmt: skip


def files_digest(files: Sequence[Path], *, most_bytes: int = 256 << 20, end_bytes: int = 64 << 10) -> list[Any]:
    """What tells files apart from changed ones without reading much of them; JSON-able.

    Args:
        files: of a data set.
        most_bytes: where all files together have no more, their whole content is hashed. Of larger ones the first and
            the last bytes are, and the time of the last change counts, so that no change in the middle is missed.
        end_bytes: how many first and last bytes.

    Raises:
        DataError: a file cannot be read.
    """
    found: list[Any] = []
    is_whole = sum(file.stat().st_size for file in files) <= most_bytes
    for file in files:
        facts = file.stat()
        try:
            with file.open("rb") as stream:
                if is_whole:
                    found.append((file.name, facts.st_size, file_digest(stream, "sha256").hexdigest()))
                    continue
                ends = stream.read(end_bytes)
                stream.seek(max(0, facts.st_size - end_bytes))
                ends += stream.read(end_bytes)
        except OSError as error:
            raise DataError("the file cannot be read", where=str(file), found=error.strerror or str(error)) from error
        found.append((file.name, facts.st_size, facts.st_mtime_ns, sha256(ends).hexdigest()))
    return found
