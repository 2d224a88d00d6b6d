"""Where rows come from: files, hubs, buckets. One function each, all yield rows, each with the place it came from.

A row that cannot be read (a broken line of a jsonl file) comes out as its fault, so that the reader goes on; a file
that cannot be read at all is a `DataError`. Nothing here knows what rows mean, and no file is read into memory whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llamafactory.data.sources.cloud import list_cloud_files
from llamafactory.data.sources.files import READERS, list_files, read_files
from llamafactory.data.sources.hub import read_hub
from llamafactory.data.sources.row import SourceFile, SourceRow
from llamafactory.data.sources.split import take_split
from llamafactory.data.types import DatasetSpec

__all__ = ["READERS", "SourceFile", "SourceRow", "list_files", "read_source"]


def read_source(spec: DatasetSpec) -> Iterator[SourceRow]:
    """All rows of a data set.

    Raises:
        DataError: missing, empty or unreadable files, a file type or a top level that holds no rows.
    """
    if spec.source == "file":
        files = [SourceFile.at(path) for path in list_files(Path(spec.location))]
    elif spec.source == "cloud":
        files = list_cloud_files(spec.location)
    else:
        return read_hub(spec)
    return take_split(lambda: read_files(files, spec.location), spec.split, spec.name)
