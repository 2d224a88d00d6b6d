"""Tensors of which each process holds a part, on their way to a checkpoint and back, for any number of processes.

torch.distributed.checkpoint writes them with its Hugging Face storage: each process one safetensors file, whose header
says where its parts belong. There is no pickle (its other storage keeps a pickled `.metadata`). All processes write
together: if one fails, all of them know, and none of the files becomes part of a checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llamafactory.extras import failpoints
from llamafactory.extras.errors import SaveError
from llamafactory.model.shards import is_sharded, read_shards, shard_sizes
from llamafactory.train.checkpoint.folders import STAGING

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer

OPTIMIZER_SHARDS = "sharded_optimizer"
"""Folder of a checkpoint with the optimizer's tensors that are spread over processes, `<parameter index>.<name>`."""


def write_together(
    output_dir: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], accelerator: Accelerator
) -> Path:
    """Writes shards into a staging folder beside the checkpoints; every process must call it.

    Args:
        output_dir: of the run, a folder that all processes share.
        step: of the checkpoint.
        groups: folder name -> tensors.
        accelerator: of the run.

    Returns:
        The staging folder.

    Raises:
        SaveError: a process could not write; every process gets the same error.
    """
    staging = output_dir / f"{STAGING}shards-{step}"
    fault = _prepare(output_dir, staging) if accelerator.is_main_process else None
    _agree(fault)
    _agree(
        None if staging.is_dir() else f"{staging} cannot be seen: output_dir must be a folder that all machines share"
    )
    _agree(_fault_of(lambda: failpoints.visit("save.shards")))
    for name, tensors in groups.items():
        _agree(_fault_of(partial(_write, staging / name, tensors)))
    return staging


def _prepare(output_dir: Path, staging: Path) -> str | None:
    """A fresh staging folder; what an earlier save left is removed."""
    try:
        for left in output_dir.glob(f"{STAGING}shards-*"):
            shutil.rmtree(left, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        return str(error)
    return None


def _fault_of(work: Callable[[], object]) -> str | None:
    """What went wrong in this process; faults that are not the disk's begin with their type."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        work()
    except OSError as error:
        return str(error)
    except CheckpointException as error:  # what went wrong in any process
        return "; ".join(f"process {rank}: {fault}" for rank, (fault, _) in sorted(error.failures.items()))
    return None


def _agree(fault: str | None) -> None:
    """Every process tells the others how it went.

    Raises:
        SaveError: one of them, or several, could not do it.
    """
    import torch.distributed as dist

    faults: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    found = dict.fromkeys(fault for fault in faults if fault)
    if found:
        raise SaveError("; ".join(found))


def _write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    if tensors:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def move_in(staging: Path, folder: Path) -> None:
    """Moves the folders that `write_together` made into a checkpoint that is being made."""
    for path in sorted(staging.iterdir()):
        path.rename(folder / path.name)
    staging.rmdir()


def sharded_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors of which this process holds a part."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value for index, entries in state.items() for name, value in entries.items()
        if is_sharded(value)
    }  # fmt: skip


def read_optimizer_shards(folder: Path, optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds in shards, each spread as its parameter is now, or whole."""
    shards = folder / OPTIMIZER_SHARDS
    if not shards.is_dir():
        return {}
    parameters = _parameters(optimizer)
    found: dict[str, Tensor] = {}
    for name, (size, dtype) in shard_sizes(shards).items():
        parameter = parameters[int(name.split(".", 1)[0])]
        is_spread = is_sharded(parameter) and tuple(parameter.shape) == size
        found[name] = _empty_as(parameter, dtype) if is_spread else torch.empty(size, dtype=dtype)
    read_shards(shards, found)
    return found


def _empty_as(parameter: Any, dtype: torch.dtype) -> Tensor:
    from torch.distributed.tensor import DTensor

    local = torch.empty_like(parameter.to_local(), dtype=dtype)
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def spread(tensors: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """Whole optimizer tensors, spread where their parameter is; no process speaks with another."""
    parameters = _parameters(optimizer)
    return {name: _as(parameters[int(name.split(".", 1)[0])], tensor) for name, tensor in tensors.items()}


def _as(parameter: Any, tensor: Tensor) -> Tensor:
    if not is_sharded(parameter) or is_sharded(tensor) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    moved = tensor.to(parameter.device)
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _parameters(optimizer: Optimizer) -> Sequence[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
