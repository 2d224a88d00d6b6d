"""What a source yields, and where a file's bytes come from. Knows nothing of what rows mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from llamafactory.data.row_error import RowError, describe
from llamafactory.extras.errors import DataError


class Place(NamedTuple):
    """Where a row begins, so that reading can begin there.

    Attributes:
        file: number of its file in the data set.
        number: of its first line or of the row, from 1.
        offset: of its first byte; 0 in files whose rows are found by their number.
    """

    file: int
    number: int
    offset: int


class SourceRow(NamedTuple):
    """A row, or what keeps it from being one. `origin` is `file.jsonl:12` (line) or `file.json#12` (12th row).

    `place` is None where reading cannot begin there: on a hub.
    """

    origin: str
    values: Mapping[str, object]
    fault: RowError | None = None
    place: Place | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A file on this machine or in a bucket.

    Attributes:
        name: without folders, for the origins of rows.
        where: the whole path, for messages.
        open: the file's bytes from the start; called once for each reading.
        local: the path on this machine, None in a bucket.
        number: of the file in its data set.
    """

    name: str
    where: str
    open: Callable[[], BinaryIO]
    local: Path | None = None
    number: int = 0

    @classmethod
    def at(cls, path: Path, number: int = 0) -> SourceFile:
        """A file on this machine; `number` is that in its data set."""

        def open_local() -> BinaryIO:
            try:
                return path.open("rb")
            except OSError as error:
                where = str(path)
                raise DataError("the file cannot be read", where=where, found=error.strerror or str(error)) from error

        return cls(name=path.name, where=str(path), open=open_local, local=path, number=number)

    def place(self, number: int, offset: int = 0) -> Place:
        """Where a row of this file begins."""
        return Place(self.number, number, offset)

    @property
    def suffix(self) -> str:
        """The ending in small letters, with its dot."""
        return PurePosixPath(self.name).suffix.lower()


class RepeatedKeys(dict[str, object]):
    """A JSON object that names a key twice; which value was meant is unknown."""

    key = ""


def json_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """What `json` makes of an object; one with a repeated key is marked."""
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    repeated = RepeatedKeys(values)
    seen: set[str] = set()
    repeated.key = next(key for key, _ in pairs if key in seen or seen.add(key))
    return repeated


def checked_row(row: object, origin: str, place: Place | None = None) -> SourceRow:
    """The row, or its fault where it is not an object with each key once."""
    if isinstance(row, RepeatedKeys):
        found = f"the key '{row.key[:40]}' more than once"
        fault = RowError("a repeated key", field=row.key[:40], found=found, expected="each key once")
        return SourceRow(origin=origin, values={}, fault=fault, place=place)
    if not isinstance(row, Mapping):
        fault = RowError(
            "the row is not an object", field="row", found=describe(row), expected='{"column": value, ...}'
        )
        return SourceRow(origin=origin, values={}, fault=fault, place=place)
    return SourceRow(origin=origin, values=row, place=place)
