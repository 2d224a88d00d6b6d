"""Files, folders and hub data sets -> rows, each with the place it came from. Knows nothing of what rows mean.

A row that cannot be read (a broken line of a jsonl file) comes out as its fault, so that the reader goes on; a file
that cannot be read at all is a `DataError`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory.data.row_error import RowError, describe
from llamafactory.data.types import DatasetSpec
from llamafactory.extras.errors import DataError

_NOT_JSON_ROWS = 'a list of rows: [{"instruction": ..., "output": ...}, ...]'


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """A row, or what keeps it from being one. `origin` is `file.jsonl:12` (line) or `file.json#12` (12th row)."""

    origin: str
    values: Mapping[str, object]
    fault: RowError | None = None


class _RepeatedKeys(dict[str, object]):
    """A JSON object that names a key twice; which value was meant is unknown."""

    key = ""


def read_source(spec: DatasetSpec) -> Iterator[SourceRow]:
    """All rows of a data set.

    Raises:
        DataError: missing, empty or unreadable files, a file type or a top level that holds no rows.
    """
    if spec.source == "hub":
        yield from _read_hub(spec)
        return
    num_rows = 0
    for file in list_files(Path(spec.location)):
        for row in READERS[file.suffix.lower()](file):
            num_rows += 1
            yield row
    if num_rows == 0:
        raise DataError("no rows", where=spec.location, found="no row in the file", expected="at least one row")


def list_files(location: Path) -> list[Path]:
    """The file, or all files of a folder (of one type, hidden ones left out), sorted by name.

    Raises:
        DataError: nothing there, several types, a type that is not read.
    """
    if not location.exists():
        raise DataError("no such file or folder", where=str(location), fix="check file_name and dataset_dir")
    if location.is_dir():
        files = sorted(file for file in location.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise DataError("the folder has no files", where=str(location), expected=_types())
    else:
        files = [location]
    types = sorted({file.suffix.lower() for file in files})
    if len(types) > 1:
        raise DataError(
            "files of several types in one folder", where=str(location), found=", ".join(types), expected="one type"
        )
    if types[0] not in READERS:
        found = f"a file of type '{types[0]}'" if types[0] else "a file without an ending"
        raise DataError("this file type is not read", where=str(files[0]), found=found, expected=_types())
    return files


def _types() -> str:
    return "a file of type " + ", ".join(READERS)


def _read_text(file: Path) -> str:
    """The file's text; a byte order mark is taken off, CRLF is kept."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError("the file cannot be read", where=str(file), found=error.strerror or str(error)) from error
    if not data.strip():
        raise DataError("the file is empty", where=str(file), found=f"{len(data)} bytes", expected="at least one row")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        is_wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        found = "a UTF-16 byte order mark" if is_wide else f"byte 0x{data[error.start]:02x} in line {line}"
        raise DataError(
            "the file is not UTF-8", where=str(file), found=found, expected="UTF-8 text", fix="save the file as UTF-8"
        ) from error


def _read_json(file: Path) -> Iterator[SourceRow]:
    text = _read_text(file)
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _json_lines(file, text)  # one object a line, as in a .jsonl file
            return
        raise DataError(
            "the file is not valid JSON",
            where=f"{file}:{error.lineno}",
            found=f"{error.msg} (line {error.lineno}, column {error.colno})",
            expected="JSON",
            fix="the file may be cut off at its end" if not text.rstrip().endswith(("]", "}")) else None,
        ) from error
    except RecursionError as error:
        raise DataError("the JSON is nested too deep", where=str(file), expected=_NOT_JSON_ROWS) from error
    if not isinstance(value, list):
        raise DataError(
            "the file does not hold a list of rows",
            where=str(file),
            found=f"{describe(value)} at the top level",
            expected=_NOT_JSON_ROWS,
            fix="put the rows into a list, or write one row a line into a .jsonl file",
        )
    for number, row in enumerate(value, start=1):
        yield _checked(row, f"{file.name}#{number}")


def _read_jsonl(file: Path) -> Iterator[SourceRow]:
    text = _read_text(file)
    if text.lstrip().startswith("["):
        yield from _read_json(file)  # a list of rows under the wrong ending
    else:
        yield from _json_lines(file, text)


def _json_lines(file: Path, text: str) -> Iterator[SourceRow]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        origin = f"{file.name}:{number}"
        try:
            yield _checked(json.loads(line, object_pairs_hook=_object), origin)
        except json.JSONDecodeError as error:
            fault = RowError(
                "the line is not JSON",
                field=f"column {error.colno}",
                found=error.msg,
                expected="one JSON object a line",
                fix="" if line.rstrip().endswith("}") else "the line may be cut off",
            )
            yield SourceRow(origin=origin, values={}, fault=fault)
        except RecursionError:
            fault = RowError("the line is nested too deep", field="row", found="deep nesting", expected="a flat row")
            yield SourceRow(origin=origin, values={}, fault=fault)


def _checked(row: object, origin: str) -> SourceRow:
    if isinstance(row, _RepeatedKeys):
        found = f"the key '{row.key}' more than once"
        fault = RowError("a repeated key", field=row.key, found=found, expected="each key once")
        return SourceRow(origin=origin, values={}, fault=fault)
    if not isinstance(row, Mapping):
        fault = RowError(
            "the row is not an object", field="row", found=describe(row), expected='{"column": value, ...}'
        )
        return SourceRow(origin=origin, values={}, fault=fault)
    return SourceRow(origin=origin, values=row)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    repeated = _RepeatedKeys(values)
    seen: set[str] = set()
    repeated.key = next(key for key, _ in pairs if key in seen or seen.add(key))
    return repeated


def _read_csv(file: Path) -> Iterator[SourceRow]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), strict=True)
    try:
        for row in reader:
            origin = f"{file.name}:{reader.line_num}"
            fault = None
            if None in row or any(value is None for value in row.values()):
                extra = row.get(None)
                count = sum(value is not None for name, value in row.items() if name is not None) + len(extra or ())
                names = len(reader.fieldnames or ())
                fault = RowError(
                    "wrong number of columns",
                    field="row",
                    found=f"{count} values",
                    expected=f"{names}, as in the first line",
                )
            yield SourceRow(origin=origin, values=row, fault=fault)
    except csv.Error as error:
        where = f"{file}:{reader.line_num}"
        raise DataError(
            "the file is not valid CSV", where=where, found=str(error), expected="CSV with a header"
        ) from error


def _read_txt(file: Path) -> Iterator[SourceRow]:
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if line.strip():
            yield SourceRow(origin=f"{file.name}:{number}", values={"text": line.rstrip("\r")})


def _read_parquet(file: Path) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _refuse_empty(file)
    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield SourceRow(origin=f"{file.name}#{number}", values=values)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, "Parquet", error) from error


def _read_arrow(file: Path) -> Iterator[SourceRow]:
    import pyarrow as pa

    _refuse_empty(file)
    number = 0
    try:
        with pa.memory_map(str(file)) as source:
            for batch in _arrow_batches(pa, source):
                for values in batch.to_pylist():
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


def _refuse_empty(file: Path) -> None:
    if file.stat().st_size == 0:
        raise DataError("the file is empty", where=str(file), found="0 bytes", expected="at least one row")


def _unreadable(file: Path, kind: str, error: Exception) -> DataError:
    detail = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    return DataError(f"the file is not valid {kind}", where=str(file), found=detail, expected=f"a {kind} file")


def _read_hub(spec: DatasetSpec) -> Iterator[SourceRow]:
    import datasets

    try:
        rows = datasets.load_dataset(spec.location, name=spec.subset, data_dir=spec.folder, split=spec.split)
    except Exception as error:  # whatever the hub, the network or the loader raised
        raise DataError(
            "the data set cannot be loaded from the hub",
            where=f"{spec.name} ({spec.location})",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}",
            fix="check the name and the network; a local copy works through file_name",
        ) from error
    for number, values in enumerate(rows, start=1):
        yield SourceRow(origin=f"{spec.name}#{number}", values=values)  # pyright: ignore[reportArgumentType]


READERS: Mapping[str, Callable[[Path], Iterator[SourceRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_txt,
}
"""One reader a file type; a new type is one function and one line here."""
