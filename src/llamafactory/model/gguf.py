"""Reads GGUF files through the `gguf` package: metadata as Python values, tensors as float32 arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamafactory.extras.errors import LlamaFactoryError


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """An open GGUF file.

    Attributes:
        path: of the file.
        metadata: its key/value pairs.
        tensors: the package's tensor records by name; weights are read when asked for.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]


def read_gguf(path: Path) -> GgufFile:
    """Reads the metadata and the tensor table.

    Raises:
        LlamaFactoryError: not a GGUF file, or one that is cut short.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise LlamaFactoryError(f"{path}: not a GGUF file, or a damaged one ({error})") from error
    return GgufFile(path=path, metadata=metadata, tensors={tensor.name: tensor for tensor in reader.tensors})


def read_tensor(file: GgufFile, name: str) -> NDArray[np.float32]:
    """A tensor's values, dequantised, in torch's order of axes (slowest first)."""
    from gguf.quants import dequantize

    tensor = file.tensors[name]
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(shape)
