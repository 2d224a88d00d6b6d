"""Tensors of which several processes wrote a part each: read whole or in part, by any number of processes.

The parts are safetensors files of torch.distributed.checkpoint's Hugging Face storage. Nothing here needs another
process, or a device.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

WEIGHT_SHARDS = "sharded_weights"
"""Folder of a checkpoint with the model's weights in shards, under the names of the model's `state_dict`."""


def shard_sizes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Whole size and dtype of each tensor of a folder of shards."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    entries: dict[str, Any] = dict(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)
    return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in entries.items()}


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors from a folder of shards, whole ones and those of which this process holds a part.

    Raises:
        Exception: a tensor is not there, or has another size.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose: see above
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def read_whole(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder of shards, whole, in RAM."""
    found = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in shard_sizes(folder).items()}
    read_shards(folder, found)
    return found


def is_sharded(tensor: Any) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "placements")


def local_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole_value(tensor: Tensor) -> Tensor:
    """A tensor of which each process has a share, whole in every process; all of them must ask for it."""
    return cast("Any", tensor).full_tensor() if is_sharded(tensor) else tensor
