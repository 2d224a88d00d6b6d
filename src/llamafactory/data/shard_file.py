"""A shard of examples as one file: safetensors, so that anybody can read it, mapped into memory instead of loaded.

A file is there as a whole or not at all: it is written beside, flushed to disk, and renamed. A checksum over all of it
is kept inside, so that damage is noticed.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamafactory.data.table import Shard
from llamafactory.extras import failpoints
from llamafactory.extras.files import fsync

_FIELDS = (
    "example_ends",
    "group_ends",
    "tokens",
    "weights",
    "cuts",
    "values",
    "origin_rows",
    "origin_files",
    "flags",
)
"""Wide ones first: all are aligned."""
_DTYPES = {"I8": np.int8, "I32": np.int32, "I64": np.int64, "F32": np.float32}
_NAMES = {np.dtype(dtype).name: name for name, dtype in _DTYPES.items()}
_CHUNK_BYTES = 1 << 20


class DamagedShardError(Exception):
    """The file is not what was written."""


def write_shard(path: Path, shard: Shard, record: Mapping[str, Any]) -> None:
    """Seal a shard and what is to be remembered with it.

    Args:
        path: the file; what is there is replaced.
        shard: the examples.
        record: JSON-able.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    arrays = {name: array for name in _FIELDS if (array := getattr(shard, name)) is not None}
    names = json.dumps(shard.origin_names)
    header: dict[str, Any] = {"__metadata__": {"record": json.dumps(record), "origin_names": names}}
    place = 0
    for name, array in arrays.items():
        entry = {
            "dtype": _NAMES[array.dtype.name],
            "shape": [len(array)],
            "data_offsets": [place, place + array.nbytes],
        }
        header[name] = entry
        place += array.nbytes
    checksum = _header_checksum(header)
    for array in arrays.values():
        checksum = zlib.crc32(array.data, checksum)
    header["__metadata__"]["crc32"] = f"{checksum:08x}"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays are aligned
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staging.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                stream.write(array.data)
        failpoints.visit("tokens.write")
        fsync(staging)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    fsync(path.parent)


def read_shard(path: Path, *, is_checked: bool = True) -> tuple[Shard, dict[str, Any]]:
    """The shard with its arrays mapped from the file, and its record.

    Args:
        path: a file that `write_shard` made.
        is_checked: read all of the file and compare its checksum; else only the size.

    Raises:
        DamagedShardError: the file is missing, cut off, or differs from what was written.
    """
    try:
        failpoints.visit("tokens.read")
        with path.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(start - 8))
        meta: dict[str, str] = header["__metadata__"]
        written = int(meta.pop("crc32"), 16)
        entries = {name: header[name] for name in header if name != "__metadata__"}
        size = start + max(entry["data_offsets"][1] for entry in entries.values())
        if path.stat().st_size != size:
            raise DamagedShardError(f"{path.name} has {path.stat().st_size:,} bytes instead of {size:,}")
        if is_checked and _rest_checksum(path, start, _header_checksum(header)) != written:
            raise DamagedShardError(f"{path.name} does not have the checksum that it was written with")
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        arrays: dict[str, Any] = {
            "weights": None,
            "values": None,
            "origin_names": tuple(json.loads(meta["origin_names"])),
        }
        for name, entry in entries.items():
            first, last = (start + offset for offset in entry["data_offsets"])
            arrays[name] = _view(mapped[first:last], entry["dtype"])
        return Shard(**arrays), json.loads(meta["record"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise DamagedShardError(f"{path.name} cannot be read: {error}") from error


def _view(raw: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    return np.asarray(raw).view(_DTYPES[dtype])


def _header_checksum(header: Mapping[str, Any]) -> int:
    """Of the header before its own checksum is in it."""
    return zlib.crc32(json.dumps(header).encode())


def _rest_checksum(path: Path, start: int, checksum: int) -> int:
    """Goes on with all bytes from `start`; reads the file instead of the mapping, so that no pages stay in memory."""
    with path.open("rb") as stream:
        stream.seek(start)
        while part := stream.read(_CHUNK_BYTES):
            checksum = zlib.crc32(part, checksum)
    return checksum
