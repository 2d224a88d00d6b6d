"""A checkpoint in memory: everything copied, so that a thread may write it while the next steps run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from llamafactory.extras import failpoints
from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.train.checkpoint import random_state
from llamafactory.train.checkpoint.folders import OPTIMIZER
from llamafactory.train.checkpoint.shards import OPTIMIZER_SHARDS, move_in, read_optimizer_shards, spread
from llamafactory.train.checkpoint.state import STATE, RunState, read_document, reading, write_state
from llamafactory.train.checkpoint.tensors import OptimizerState, load_optimizer

if TYPE_CHECKING:
    from torch.optim import Optimizer

_RNG = "rng_state.safetensors"
EXPERIENCE = "experience.safetensors"
"""The rollout in whose middle a checkpoint lies; written by the stages that have rollouts."""
TRAINING_FILES = frozenset({OPTIMIZER, _RNG, STATE, OPTIMIZER_SHARDS, EXPERIENCE})
"""Files and folders of a checkpoint that are no part of the model."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What one checkpoint will hold.

    Attributes:
        state: see `RunState`.
        write_model: writes weights and tokenizer files into a folder, from copies.
        optimizer: its state, or None for weights only (`save_only_model`).
        generators: random states of every process, see `random_state.of_all_ranks`.
        shards: a staging folder with what the processes wrote together, or None; its folders are moved in.
    """

    state: RunState
    write_model: Callable[[Path], None]
    optimizer: OptimizerState | None
    generators: dict[str, torch.Tensor]
    shards: Path | None = None

    def write(self, folder: Path) -> None:
        """Writes every file but the manifest."""
        self.write_model(folder)
        if self.shards is not None:
            move_in(self.shards, folder)
        failpoints.visit("save.file")
        if self.optimizer is None:
            write_state(folder, self.state, param_groups=[])
            return
        save_file(self.optimizer.tensors, folder / OPTIMIZER)
        failpoints.visit("save.file")
        save_file(self.generators, folder / _RNG)
        failpoints.visit("save.file")
        write_state(folder, self.state, param_groups=self.optimizer.groups, optimizer_values=self.optimizer.values)


def restore_training(folder: Path, optimizer: Optimizer, rank: int = 0) -> bool:
    """Puts the optimizer's moments and the random generators back.

    Args:
        folder: of a verified checkpoint.
        optimizer: with the same parameters in the same order.
        rank: of this process.

    Returns:
        Whether the checkpoint holds random states of this rank.

    Raises:
        LlamaFactoryError: the checkpoint holds weights only, or lacks a file that exact training needs.
    """
    failpoints.visit("load")
    if not (folder / OPTIMIZER).is_file():
        raise LlamaFactoryError(
            f"{folder} holds weights only (save_only_model), so training cannot continue from it exactly. Give it as "
            "adapter_name_or_path (or model_name_or_path) of a new run instead."
        )
    with reading(folder):
        return _restore(folder, optimizer, rank)


def _restore(folder: Path, optimizer: Optimizer, rank: int) -> bool:
    document = read_document(folder)
    saved = OptimizerState(
        tensors={
            **spread(load_file(folder / OPTIMIZER), optimizer),
            **read_optimizer_shards(folder, optimizer),
        },
        values=document.get("optimizer_values", {}),
        groups=document["param_groups"],
    )
    load_optimizer(optimizer, saved)
    tensors = load_file(folder / _RNG)
    if "torch" in tensors:
        raise LlamaFactoryError(
            f"{folder} was written by an earlier version, with the random state of the first process alone. Give it "
            "as adapter_name_or_path (or model_name_or_path) of a new run, or continue it with that version."
        )
    return random_state.restore(tensors, rank)
