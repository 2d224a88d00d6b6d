"""Parquet and Arrow files, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llamafactory.data.sources.row import SourceFile, SourceRow
from llamafactory.extras.errors import DataError

_BATCH_ROWS = 1024


def read_parquet(file: SourceFile) -> Iterator[SourceRow]:
    """The rows of a Parquet file, in batches of at most 1,024."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with _open_filled(file) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=_BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield SourceRow(origin=f"{file.name}#{number}", values=values)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, "Parquet", error) from error


def read_arrow(file: SourceFile) -> Iterator[SourceRow]:
    """The rows of an Arrow file, memory-mapped where it is on this machine."""
    import pyarrow as pa

    number = 0
    try:
        _open_filled(file).close()
        source: Any = pa.memory_map(str(file.local)) if file.local else pa.PythonFile(file.open(), mode="r")
        with source:
            for batch in _arrow_batches(pa, source):
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    for values in batch.slice(start, _BATCH_ROWS).to_pylist():
                        number += 1
                        yield SourceRow(origin=f"{file.name}#{number}", values=values)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, "Arrow", error) from error


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
