"""What a source yields, and where a file's bytes come from. Knows nothing of what rows mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from llamafactory.data.row_error import RowError, describe
from llamafactory.extras.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """A row, or what keeps it from being one. `origin` is `file.jsonl:12` (line) or `file.json#12` (12th row)."""

    origin: str
    values: Mapping[str, object]
    fault: RowError | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A file on this machine or in a bucket.

    Attributes:
        name: without folders, for the origins of rows.
        where: the whole path, for messages.
        open: the file's bytes from the start; called once for each reading.
        local: the path on this machine, None in a bucket.
    """

    name: str
    where: str
    open: Callable[[], BinaryIO]
    local: Path | None = None

    @classmethod
    def at(cls, path: Path) -> SourceFile:
        """A file on this machine."""

        def open_local() -> BinaryIO:
            try:
                return path.open("rb")
            except OSError as error:
                where = str(path)
                raise DataError("the file cannot be read", where=where, found=error.strerror or str(error)) from error

        return cls(name=path.name, where=str(path), open=open_local, local=path)

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


def checked_row(row: object, origin: str) -> SourceRow:
    """The row, or its fault where it is not an object with each key once."""
    if isinstance(row, RepeatedKeys):
        found = f"the key '{row.key[:40]}' more than once"
        fault = RowError("a repeated key", field=row.key[:40], found=found, expected="each key once")
        return SourceRow(origin=origin, values={}, fault=fault)
    if not isinstance(row, Mapping):
        fault = RowError(
            "the row is not an object", field="row", found=describe(row), expected='{"column": value, ...}'
        )
        return SourceRow(origin=origin, values={}, fault=fault)
    return SourceRow(origin=origin, values=row)
