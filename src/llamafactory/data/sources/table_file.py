"""Parquet and Arrow files, batch by batch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from llamafactory.data.sources.row import Place, SourceFile, SourceRow
from llamafactory.extras.errors import DataError

_BATCH_ROWS = 1024


def read_parquet(file: SourceFile, start: Place | None = None) -> Iterator[SourceRow]:
    """The rows of a Parquet file, in batches of at most 1,024; parts of the file before `start` are not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open_filled(file) as stream:
            table = pq.ParquetFile(stream)
            sizes = [table.metadata.row_group(place).num_rows for place in range(table.num_row_groups)]
            ends = list(accumulate(sizes))
            skipped = 0 if start is None else start.number - 1
            first = bisect_right(ends, skipped)
            groups = list(range(first, len(sizes)))
            batches = table.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups) if groups else ()
            yield from _rows_of(file, batches, passed=ends[first - 1] if first else 0, skipped=skipped)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, "Parquet", error) from error


def read_arrow(file: SourceFile, start: Place | None = None) -> Iterator[SourceRow]:
    """The rows of an Arrow file, memory-mapped where it is on this machine."""
    import pyarrow as pa

    try:
        _open_filled(file).close()
        source: Any = pa.memory_map(str(file.local)) if file.local else pa.PythonFile(file.open(), mode="r")
        with source:
            batches = _arrow_batches(pa, source)
            yield from _rows_of(file, batches, passed=0, skipped=0 if start is None else start.number - 1)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, "Arrow", error) from error


def _rows_of(file: SourceFile, batches: Iterable[Any], *, passed: int, skipped: int) -> Iterator[SourceRow]:
    """The rows of batches, of which the first follows `passed` rows of the file, without its first `skipped`."""
    for batch in batches:
        first = min(batch.num_rows, max(0, skipped - passed))
        for start in range(first, batch.num_rows, _BATCH_ROWS):
            for number, values in enumerate(batch.slice(start, _BATCH_ROWS).to_pylist(), start=passed + start + 1):
                yield SourceRow(origin=f"{file.name}#{number}", values=values, place=file.place(number))
        passed += batch.num_rows


def _arrow_batches(pa: Any, source: Any) -> Iterator[Any]:
    """Record batches of either Arrow layout: the file format, or a stream."""
    try:
        reader = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        yield from pa.ipc.open_stream(source)
        return
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _open_filled(file: SourceFile) -> Any:
    """The open file.

    Raises:
        DataError: it is empty.
    """
    stream = file.open()
    if not stream.read(1):
        stream.close()
        raise DataError("the file is empty", where=file.where, found="0 bytes", expected="at least one row")
    stream.seek(0)
    return stream


def _unreadable(file: SourceFile, kind: str, error: Exception) -> DataError:
    detail = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    return DataError(f"the file is not valid {kind}", where=file.where, found=detail, expected=f"a {kind} file")
