"""Reads GGUF files: metadata as Python values, tensors as float32 arrays.

Understands the tensor types that the embedded model uses (F32, F16, Q8_0, Q4_1) and refuses others by name. Reads
only; imports neither torch nor transformers. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from llamafactory.extras.errors import LlamaFactoryError

BLOCK = 32
"""Values in one quantised block."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TYPE_NAMES = {0: "F32", 1: "F16", 3: "Q4_1", 8: "Q8_0"}
_BYTES_PER_BLOCK = {"F32": 4 * BLOCK, "F16": 2 * BLOCK, "Q4_1": 4 + BLOCK // 2, "Q8_0": 2 + BLOCK}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies. `shape` is in torch's order (slowest axis first), `offset` is in bytes."""

    shape: tuple[int, ...]
    type_name: str
    offset: int


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """The table of contents of a GGUF file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]


def read_gguf(path: Path) -> GgufFile:
    """Read the metadata and the tensor table.

    Raises:
        LlamaFactoryError: the file is not a GGUF of version 2 or 3, or is cut short.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        cursor = _Cursor(view)
        try:
            if view[:4] != b"GGUF" or (version := cursor.skip(4).number("I")) not in (2, 3):
                raise LlamaFactoryError(f"{path}: not a GGUF file of version 2 or 3")
            num_tensors, num_pairs = cursor.number("Q"), cursor.number("Q")
            metadata = {cursor.text(): cursor.value(cursor.number("I")) for _ in range(num_pairs)}
            rows = [_tensor_row(cursor) for _ in range(num_tensors)]
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise LlamaFactoryError(f"{path}: damaged GGUF file at byte {cursor.position} ({error})") from error
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-cursor.position // alignment) * alignment
    tensors = {
        name: TensorEntry(shape=shape, type_name=type_name, offset=start + offset)
        for name, shape, type_name, offset in rows
    }
    return GgufFile(path=path, metadata={"GGUF.version": version, **metadata}, tensors=tensors)


def read_tensor(file: GgufFile, name: str) -> NDArray[np.float32]:
    """Return a tensor's values, dequantised exactly (scale x code + offset in float32), in its torch shape.

    Raises:
        LlamaFactoryError: the tensor's type is one that this reader does not know, or the file is cut short.
    """
    entry = file.tensors[name]
    if entry.type_name not in _BYTES_PER_BLOCK:
        known = ", ".join(_BYTES_PER_BLOCK)
        raise LlamaFactoryError(f"{file.path}: tensor {name} has type {entry.type_name}; this reader knows {known}")
    num_values = int(np.prod(entry.shape))
    num_bytes = num_values * _BYTES_PER_BLOCK[entry.type_name] // BLOCK
    raw = np.fromfile(file.path, dtype=np.uint8, count=num_bytes, offset=entry.offset)
    if raw.size != num_bytes:
        raise LlamaFactoryError(f"{file.path}: cut short inside tensor {name}")
    return _dequantise(raw, entry.type_name).reshape(entry.shape)


def _dequantise(raw: NDArray[np.uint8], type_name: str) -> NDArray[np.float32]:
    if type_name == "F32":
        return raw.view(np.float32)
    if type_name == "F16":
        return raw.view(np.float16).astype(np.float32)
    blocks = raw.reshape(-1, _BYTES_PER_BLOCK[type_name])
    scale = _halves(blocks[:, 0:2])
    if type_name == "Q8_0":
        return scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    codes = blocks[:, 4:]  # Q4_1: low nibbles are the block's first 16 values, high nibbles its last 16
    nibbles = np.concatenate([codes & 0x0F, codes >> 4], axis=1).astype(np.float32)
    return scale * nibbles + _halves(blocks[:, 2:4])


def _halves(two_bytes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[blocks, 2] bytes -> [blocks, 1] float32."""
    return np.ascontiguousarray(two_bytes).view(np.float16).astype(np.float32)


def _tensor_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int]:
    name = cursor.text()
    shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
    type_id, offset = cursor.number("I"), cursor.number("Q")
    return name, shape, _TYPE_NAMES.get(type_id, f"number {type_id}"), offset


class _Cursor:
    """A little-endian reader that walks through the header."""

    def __init__(self, view: mmap.mmap) -> None:
        self.view = view
        self.position = 0

    def skip(self, num_bytes: int) -> _Cursor:
        self.position += num_bytes
        return self

    def number(self, code: str) -> int:
        return cast("int", self.numbers(code, 1)[0])

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        values = struct.unpack_from(layout, self.view, self.position)
        self.position += struct.calcsize(layout)
        return values

    def text(self) -> str:
        length = self.number("Q")
        if length > len(self.view) - self.position:
            raise struct.error(f"a text of {length} bytes")
        start, self.position = self.position, self.position + length
        return self.view[start : self.position].decode("utf-8")

    def value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self.text()
        if type_id == _ARRAY:
            item_type, count = self.number("I"), self.number("Q")
            if item_type in _SCALARS:
                return list(self.numbers(_SCALARS[item_type], count))
            return [self.value(item_type) for _ in range(count)]
        return self.numbers(_SCALARS[type_id], 1)[0]
