"""Tensors on their way to a checkpoint and back: host copies of weights, and an optimizer as named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from llamafactory.model.shards import is_sharded

_PLAIN = (str, int, float, bool, list, tuple, type(None))


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """An optimizer as tensors and JSON.

    Attributes:
        tensors: `<parameter index>.<name>` -> tensor, those left out of which each process holds a part.
        values: the same for numbers, text and None.
        groups: options of each parameter group, with the indices of its parameters.
    """

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]
    groups: list[dict[str, Any]]


def host_copy(tensors: Mapping[str, torch.Tensor], frozen: Set[int] = frozenset()) -> dict[str, torch.Tensor]:
    """Copies tensors into memory of the host, so that training may go on while they are written.

    Args:
        tensors: of any device. Those that share their memory share that of the copy too.
        frozen: `data_ptr` of storages that do not change and need no copy.
    """
    copies: dict[tuple[object, ...], torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    waits = False
    for name, tensor in tensors.items():
        source = tensor.detach()
        if source.data_ptr() and source.data_ptr() in frozen:
            found[name] = source
            continue
        key = (source.data_ptr(), source.storage_offset(), source.shape, source.dtype)
        if not source.data_ptr() or key not in copies:
            pinned = source.device.type == "cuda"
            waits |= pinned
            copies[key] = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=pinned)
            copies[key].copy_(source, non_blocking=pinned)
        found[name] = copies[key]
    if waits:
        torch.cuda.synchronize()
    return found


def frozen_storages(model: nn.Module) -> set[int]:
    """`data_ptr` of the parameters that are not trained."""
    return {parameter.data_ptr() for parameter in model.parameters() if not parameter.requires_grad}


def optimizer_state(optimizer: Optimizer) -> OptimizerState:
    """A host copy of an optimizer.

    Raises:
        TypeError: the optimizer keeps something that is neither a tensor nor plain.
    """
    document = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in document["state"].items():
        for name, value in entries.items():
            if is_sharded(value):
                continue  # each process writes its part, see `shards`
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.contiguous()
            elif isinstance(value, _PLAIN):
                values[f"{index}.{name}"] = value
            else:
                raise TypeError(f"{type(optimizer).__name__} keeps {name} as {type(value).__name__}: no file holds it")
    groups = [
        {name: value for name, value in group.items() if isinstance(value, _PLAIN)}
        for group in document["param_groups"]
    ]
    return OptimizerState(tensors=host_copy(tensors), values=values, groups=groups)


def load_optimizer(optimizer: Optimizer, saved: OptimizerState) -> None:
    """Puts an optimizer's state back, in the dtypes that it had; its options stay those of the configuration.

    The learning rate of the step is the schedule's to set (`train.schedule.go_on`).
    """
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*saved.tensors.items(), *saved.values.items()]:
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    current = optimizer.state_dict()
    merged = [{**theirs, **ours} for ours, theirs in zip(current["param_groups"], saved.groups, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": merged})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state.items():
        loaded = optimizer.state[parameters[index]]
        for key, value in entries.items():  # torch casts to the parameter's dtype; Adafactor keeps float32 beside bf16
            if isinstance(value, torch.Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(device=loaded[key].device)
