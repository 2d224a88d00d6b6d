"""Spreads a model over the processes with torch's FSDP2, and gathers it again to be written.

Each decoder block is a unit: its weights are gathered right before it computes, and let go after. Embeddings, final
norm, head and value head are gathered for the whole step, so that the loss may read the head's weight. Gradients are
reduced after every micro-batch: whole gradients never lie in memory, and sums are made in the weights' own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llamafactory.extras import log
from llamafactory.extras.errors import ConfigError
from llamafactory.hparams.deepspeed import read_deepspeed
from llamafactory.hparams.sharding import sharding_of
from llamafactory.model.shards import local_part, whole_value
from llamafactory.model.skeleton import decoder_blocks
from llamafactory.train.companions import language_model

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.hparams.sharding import Sharding


def say_sharding(cfg: RunConfig, num_processes: int) -> None:
    """Says how `fsdp` or `deepspeed` is carried out by this many processes, and what of it has no effect.

    Raises:
        ConfigError: `train_batch_size` of a DeepSpeed configuration is not what these processes take in a step.
    """
    zero, _ = read_deepspeed(cfg)
    sharding = sharding_of(cfg)
    if zero is not None and zero.train_batch_size is not None:
        rows = cfg.train.per_device_train_batch_size * cfg.train.gradient_accumulation_steps * num_processes
        if rows != zero.train_batch_size:
            raise ConfigError(zero.refuse_batch(rows, num_processes))
    if sharding is not None and num_processes == 1:
        by = sharding.asked_by
        log.note(
            f"{by} has no effect: there is one process, and so nothing to spread (NPROC_PER_NODE sets the number)"
        )
        return
    if zero is not None:
        how = f"torch's FSDP2 ({sharding.words}) spreads the model" if sharding else "every process holds all of it"
        log.info(f"deepspeed: {zero.name} asks for ZeRO stage {zero.stage}: {how}")
    source = zero or sharding
    keys: dict[str, list[str]] = {}
    for key, why in (source.without_effect if source else {}).items():
        keys.setdefault(why, []).append(key)
    for why, names in keys.items():
        verb = "has" if len(names) == 1 else "have"
        log.note(f"{'deepspeed' if zero else 'fsdp_config'}: {', '.join(names)} {verb} no effect: {why}")


def shard_model(cfg: RunConfig, module: nn.Module, policy: nn.Module, accelerator: Accelerator) -> ShardedModel | None:
    """Spreads a model as configured; None where that is not asked for, or there is one process.

    Args:
        cfg: the resolved configuration.
        module: everything that a step computes; its parameters are replaced by shards.
        policy: the model inside that is saved.
        accelerator: of the run.
    """
    sharding = sharding_of(cfg)
    if sharding is None or accelerator.num_processes == 1:
        return None
    return ShardedModel(module, policy, accelerator, sharding)


def placed(accelerator: Accelerator, sharded: ShardedModel | None, module: nn.Module, *others: Any) -> Any:
    """The module, and an optimizer if there is one, on the devices; what is spread is there already."""
    if sharded is None:
        found = accelerator.prepare(module, *others)
        return found if others else (found,)
    return (sharded.module, *(accelerator.prepare(other) for other in others))


class ShardedModel:
    """A prepared module whose parameters are spread over all processes.

    Attributes:
        module: the prepared module.
        keeps_weights_sharded: whether checkpoints hold the base model's weights in shards.
    """

    def __init__(self, module: nn.Module, policy: nn.Module, accelerator: Accelerator, sharding: Sharding) -> None:
        """Spreads the parameters in place; every process must hold the same ones, and must call it.

        Args:
            module: everything that a step computes.
            policy: the model inside that is saved.
            accelerator: of the run; its device is where the shards go.
            sharding: how.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        device = accelerator.device
        mesh = init_device_mesh(device.type, (accelerator.num_processes,))
        for block in decoder_blocks(language_model(policy)):
            fully_shard(block, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward)
        fully_shard(module, mesh=mesh)
        register_fsdp_forward_method(module, "prepare")  # runs the model too
        self.module = cast("nn.Module", accelerator.prepare_model(module, evaluation_mode=True))
        is_adapter = hasattr(language_model(policy), "peft_config")
        self.keeps_weights_sharded = sharding.weights == "sharded" and not is_adapter
        self._policy = policy
        self._is_main = accelerator.is_main_process
        shards = sum(local_part(parameter).numel() for parameter in module.parameters())
        log.info(
            f"{sharding.asked_by}: {accelerator.num_processes} processes, this one holds {shards:,} of "
            f"{sum(parameter.numel() for parameter in module.parameters()):,} parameters"
        )

    def state(self) -> dict[str, Tensor]:
        """What a model file holds, by name, in shards; an adapter's base, which does not change, is left out."""
        self._reshard()
        is_adapter = hasattr(language_model(self._policy), "peft_config")
        trained = {name for name, parameter in self._policy.named_parameters() if parameter.requires_grad}
        state = self._policy.state_dict()
        return {name: tensor for name, tensor in state.items() if not is_adapter or name in trained}

    def first_names(self) -> dict[str, str]:
        """The first of the names that a parameter has (tied embeddings have two), by each of its names."""
        first: dict[int, str] = {}
        parameters = self._policy.named_parameters(remove_duplicate=False)
        return {name: first.setdefault(id(parameter), name) for name, parameter in parameters}

    def gather(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole copies of these tensors in the first process's RAM, one after the other; empty in the others.

        Every process must call it. Tied tensors share the memory of one copy.
        """
        first = self.first_names()
        whole: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if first.get(name, name) in whole:
                continue
            full = whole_value(tensor)
            whole[first.get(name, name)] = full.detach().cpu().clone() if self._is_main else torch.empty(0)
        return {name: whole[first.get(name, name)] for name in state} if self._is_main else {}

    def _reshard(self) -> None:
        """After an evaluation the outer weights are still gathered."""
        cast("Any", self.module).reshard()
