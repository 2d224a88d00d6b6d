"""Where a signal may end a run: between micro-batches, and the same place in every process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llamafactory.train.rollout import Rollouts
from llamafactory.train.signals import StopRequest, StopSignal
from llamafactory.train.step import summed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from llamafactory.train.job import Job


@contextmanager
def interruptible(job: Job, stop: StopRequest) -> Iterator[None]:
    """Lets a signal end training and evaluation between two micro-batches instead of two optimizer steps.

    With several processes all must leave a step together, so that they agree between steps, and in an evaluation after
    every 16 batches.
    """
    num_batches = 0

    def look(module: nn.Module, inputs: Any) -> None:
        nonlocal num_batches
        if job.accelerator.num_processes == 1:
            stop.check()
        elif not module.training:
            num_batches += 1
            if num_batches % 16 == 0 and (number := agreed_signal(job.accelerator, stop)):
                raise StopSignal(number)

    handles = [job.module.register_forward_pre_hook(look)]
    if isinstance(job.feed, Rollouts) and job.accelerator.num_processes == 1:
        handles.append(job.feed.sampler.register_forward_pre_hook(look))  # once for each token of its answers
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def agreed_signal(accelerator: Accelerator, stop: StopRequest) -> int:
    """The number of the signal that any rank got, or 0; the same on all ranks, which must ask together."""
    if accelerator.num_processes == 1:
        return stop.signal
    flags = torch.zeros(accelerator.num_processes, dtype=torch.int64, device=accelerator.device)
    flags[accelerator.process_index] = stop.signal
    return int(summed(accelerator, flags).max())
