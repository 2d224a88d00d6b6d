"""Whether a model still has the weights that it had: a digest that reads some megabytes, whatever the model's size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from llamafactory.model.loader import adapter_folders, model_path

if TYPE_CHECKING:
    from llamafactory.hparams.model import ModelConfig

_BLOCK = 64 * 1024
_MOST_BLOCKS = 64


def base_fingerprint(cfg: ModelConfig) -> str:
    """That of the model and the adapters that a run begins with.

    Raises:
        LlamaFactoryError: an adapter cannot be found.
    """
    return fingerprint([Path(model_path(cfg)), *adapter_folders(cfg)])


def fingerprint(folders: Sequence[Path]) -> str:
    """Digest of the safetensors files of these folders: their names, sizes, and up to 64 blocks of 64 KiB of each.

    The first block holds the names and shapes of tensors, the others are spread evenly up to the end. Training moves
    almost every number of a weight, so that another state of a model differs in every block; a change of a few
    numbers in a file above 4 MiB may go unseen. What is no folder here, as a model on a hub, counts by its name.

    Args:
        folders: of the model, then of each adapter that it starts with.
    """
    digest = sha256()
    for folder in folders:
        if not folder.is_dir():
            digest.update(os.fsencode(f"name {folder}\n"))
            continue
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(os.fsencode(f"{path.name} {size}\n"))
            with path.open("rb") as file:
                for start in block_starts(size):
                    file.seek(start)
                    digest.update(file.read(_BLOCK))
        digest.update(b"end\n")
    return digest.hexdigest()


def block_starts(size: int) -> list[int]:
    """Where the blocks of a file of `size` bytes begin that are read: all of a small one, both ends of any."""
    if size <= _MOST_BLOCKS * _BLOCK:
        return list(range(0, size, _BLOCK))
    last = size - _BLOCK
    return [last * place // (_MOST_BLOCKS - 1) for place in range(_MOST_BLOCKS)]
