"""A file or a folder of files -> rows, whatever the file type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from llamafactory.data.sources.json_file import read_json, read_jsonl
from llamafactory.data.sources.row import Place, SourceFile, SourceRow
from llamafactory.data.sources.table_file import read_arrow, read_parquet
from llamafactory.data.sources.text_file import read_csv, read_txt
from llamafactory.extras.errors import DataError

READERS: Mapping[str, Callable[[SourceFile, Place | None], Iterator[SourceRow]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_txt,
}
"""One reader a file type, which begins at a row's place; a new type is one function and one line here."""
_NEAR = 32
"""Rows that are rather passed over than jumped over."""
_FOUND_BY_NUMBER = frozenset({".parquet", ".arrow"})


def read_files(files: Sequence[SourceFile], location: str, start: Place | None = None) -> Iterator[SourceRow]:
    """The rows of all files, in their order, from `start` on; None: from the first one.

    Raises:
        DataError: a file that cannot be read, or no row in any.
    """
    num_rows = 0
    for file in files:
        if start is not None and file.number < start.file:
            continue
        for row in READERS[file.suffix](file, start if start is not None and file.number == start.file else None):
            num_rows += 1
            yield row
    if num_rows == 0 and start is None:
        raise DataError("no rows", where=location, found="no row in the file", expected="at least one row")


def rows_at(files: Sequence[SourceFile], places: Iterable[Place]) -> dict[Place, SourceRow]:
    """The rows at these places, in any order; each file is read from the first to the last of them at most.

    Raises:
        DataError: there is no row at one of them, because a file has changed.
    """
    found: dict[Place, SourceRow] = {}
    rows: Iterator[SourceRow] = iter(())
    before: Place | None = None
    for place in sorted(set(places)):
        file = files[place.file] if place.file < len(files) else None
        if file is None:
            raise _no_row("files", place)
        is_near = before is not None and (place.number - before.number <= _NEAR or file.suffix in _FOUND_BY_NUMBER)
        if before is None or place.file != before.file or not is_near:
            rows = READERS[file.suffix](file, place)
        row = next((row for row in rows if row.place is not None and row.place >= place), None)
        if row is None or row.place != place:
            raise _no_row(file.where, place)
        found[place], before = row, place
    return found


def _no_row(where: str, place: Place) -> DataError:
    return DataError(
        "a row is no longer where it was", where=where, found=f"no row {place.number} at byte {place.offset}",
        expected="the files that the run was started with",
    )  # fmt: skip


def list_files(location: Path) -> list[Path]:
    """The file, or all files of a folder (of one type, hidden ones left out), sorted by name.

    Raises:
        DataError: nothing there, several types, a type that is not read.
    """
    if not location.exists():
        raise DataError("no such file or folder", where=str(location), fix="check file_name and dataset_dir")
    if location.is_dir():
        files = sorted(file for file in location.iterdir() if file.is_file() and not file.name.startswith("."))
    else:
        files = [location]
    require_one_type([file.name for file in files], str(location), first=str(files[0]) if files else "")
    return files


def require_one_type(names: Sequence[str], location: str, *, first: str) -> None:
    """Check the endings of the files of a data set; `first` is the whole path of the first file.

    Raises:
        DataError: no files, several types, a type that is not read.
    """
    expected = "a file of type " + ", ".join(READERS)
    if not names:
        raise DataError("the folder has no files", where=location, expected=expected)
    types = sorted({Path(name).suffix.lower() for name in names})
    if len(types) > 1:
        found = ", ".join(one or "no ending" for one in types)
        raise DataError("files of several types in one folder", where=location, found=found, expected="one type")
    if types[0] not in READERS:
        found = f"a file of type '{types[0]}'" if types[0] else "a file without an ending"
        raise DataError("this file type is not read", where=first, found=found, expected=expected)
