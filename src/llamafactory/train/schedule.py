"""Learning-rate schedules: transformers' factories, with the warm-up keys resolved to steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

    from llamafactory.hparams.train import TrainConfig


def warmup_steps(cfg: TrainConfig, total_steps: int) -> int:
    """Warm-up in optimizer steps: `warmup_steps` if at least 1, else it or `warmup_ratio` as a share of the run."""
    if cfg.warmup_steps >= 1:
        return int(cfg.warmup_steps)
    return math.ceil(total_steps * (cfg.warmup_steps or cfg.warmup_ratio))


def build_schedule(optimizer: Optimizer, cfg: TrainConfig, *, total_steps: int) -> LambdaLR:
    """Builds the schedule named `lr_scheduler_type` over `total_steps` optimizer steps."""
    from transformers import get_scheduler

    warmup = warmup_steps(cfg, total_steps)
    options = dict(cfg.lr_scheduler_kwargs or {})
    if cfg.lr_scheduler_type == "warmup_stable_decay":
        after = total_steps - warmup
        stable = options.pop("num_stable_steps", after // 3)
        options.setdefault("num_decay_steps", after - stable)  # what is not decay is stable
    schedule = get_scheduler(
        cfg.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=options,
    )
    return cast("LambdaLR", schedule)  # as all of `LrScheduler` are: the rate is a function of the step alone


def go_on(scheduler: LambdaLR, saved: Mapping[str, Any]) -> None:
    """Puts a schedule at the step of a checkpoint; shape and highest rate are those of the configuration.

    Args:
        scheduler: as `build_schedule` made it for this configuration.
        saved: its state in the checkpoint.
    """
    scheduler.load_state_dict({**scheduler.state_dict(), **saved, "base_lrs": scheduler.base_lrs})
    step = scheduler.last_epoch
    rates = [rate * shape(step) for rate, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates  # pyright: ignore[reportPrivateUsage]
