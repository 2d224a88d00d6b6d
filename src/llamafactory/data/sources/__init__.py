"""Where rows come from: files, hubs, buckets. One function each, all yield rows, each with the place it came from.

A row that cannot be read (a broken line of a jsonl file) comes out as its fault, so that the reader goes on; a file
that cannot be read at all is a `DataError`. Nothing here knows what rows mean, and no file is read into memory whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from llamafactory.data.sources.cloud import list_cloud_files
from llamafactory.data.sources.files import READERS, list_files, read_files, rows_at
from llamafactory.data.sources.hub import read_hub
from llamafactory.data.sources.row import Place, SourceFile, SourceRow
from llamafactory.data.sources.split import take_split
from llamafactory.data.types import DatasetSpec

__all__ = ["READERS", "Place", "SourceFile", "SourceRow", "list_files", "read_places", "read_source"]


def read_source(spec: DatasetSpec, start: Place | None = None, num_before: int = 0) -> Iterator[SourceRow]:
    """All rows of a data set, or those from one of them on.

    Args:
        spec: the data set.
        start: place of the first row to read, where rows have places (not on a hub); None: the first row.
        num_before: rows of the data set before it.

    Raises:
        DataError: missing, empty or unreadable files, a file type or a top level that holds no rows.
    """
    if spec.source not in ("file", "cloud"):
        return read_hub(spec)
    files = _files_of(spec)
    return take_split(
        lambda place: read_files(files, spec.location, place),
        spec.split,
        spec.name,
        start_at=start,
        num_before=num_before,
    )


def read_places(spec: DatasetSpec, places: Iterable[Place]) -> dict[Place, SourceRow]:
    """The rows of a data set of files at these places.

    Raises:
        DataError: there is no row at one of them.
    """
    return rows_at(_files_of(spec), places)


def _files_of(spec: DatasetSpec) -> list[SourceFile]:
    if spec.source == "cloud":
        return list_cloud_files(spec.location)
    return [SourceFile.at(path, number) for number, path in enumerate(list_files(Path(spec.location)))]
