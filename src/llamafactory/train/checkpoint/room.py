"""Room for checkpoints, on the disk and in memory, estimated before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llamafactory.extras import log
from llamafactory.extras.hardware import read_ram
from llamafactory.train.checkpoint.saver import require_room

if TYPE_CHECKING:
    from torch import nn

    from llamafactory.hparams.train import TrainConfig

_MEMORY_SHARE = 0.5
"""Share of the free memory that a copy of weights and optimizer may take."""


def checkpoint_bytes(policy: nn.Module, *, has_optimizer: bool) -> int:
    """About the size of a checkpoint: what is trained, and two moments of it."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return weights * (3 if has_optimizer else 1)


def may_save_async(cfg: TrainConfig, policy: nn.Module, device: str) -> bool:
    """Whether memory has room for a copy of what a checkpoint holds; `async_save` decides where it is set."""
    if cfg.async_save is not None:
        return cfg.async_save
    needed, (_, free) = checkpoint_bytes(policy, has_optimizer=not cfg.save_only_model), read_ram()
    fits = not free or needed < free * _MEMORY_SHARE
    if not fits:
        log.note(
            f"checkpoints are written while training waits: a copy of {needed / 1e9:.1f} GB would crowd the memory "
            f"({free / 1e9:.1f} GB free); async_save: true writes them beside all the same"
        )
    return fits


def require_disk(output_dir: Path, cfg: TrainConfig, policy: nn.Module) -> None:
    """Refuses a run whose first checkpoint would not fit.

    Raises:
        SaveError: with what is needed and what is free.
    """
    require_room(output_dir, checkpoint_bytes(policy, has_optimizer=not cfg.save_only_model))
