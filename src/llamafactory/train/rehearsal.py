"""The longest micro-batch, forward and backward, before the first step: an out-of-memory shows at once.

Its gradients are dropped and the random generators are put back, so rows, order and numbers stay what they are. It
costs one micro-batch, so it only runs where the forecast says that memory is tight, or where there is no forecast.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from llamafactory.extras import log
from llamafactory.train.checkpoint.random_state import Generators, restore
from llamafactory.train.feed import Feed
from llamafactory.train.workload import largest_group

if TYPE_CHECKING:
    from llamafactory.model.plan import ModelPlan
    from llamafactory.train.job import Job
    from llamafactory.train.step import LossOutput

ROOMY_SHARE = 0.7
"""Below this share of the room a run is not rehearsed: a forecast is not that far off."""


def needs_rehearsal(plan: ModelPlan) -> bool:
    """Whether memory may be short."""
    return plan.costs is None or plan.costs.memory.total > ROOMY_SHARE * plan.costs.room


def rehearse(job: Job, plan: ModelPlan) -> None:
    """Runs the micro-batch that needs most memory, on every rank, and leaves no trace of it.

    Args:
        job: of a run that trains.
        plan: of the run; on a GPU its optimizer's bytes are held meanwhile, since the first step will make them.

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: it does not fit.
    """
    feed = job.feed
    if not isinstance(feed, Feed):
        log.info("no rehearsal of the longest micro-batch: rows of a stream and sampled answers are not known yet")
        return
    generators = Generators()
    started = time.monotonic()
    sizes = feed.examples.lengths.tolist()
    group, _ = largest_group(feed.schedule, lambda item: sum(sizes[index] for index in item), job.total_steps)
    batch = feed.batch(group).to(job.accelerator.device)
    state = plan.costs.memory.optimizer if plan.costs and job.accelerator.device.type != "cpu" else 0
    held = torch.empty(state, dtype=torch.uint8, device=job.accelerator.device)
    job.module.train()
    with job.accelerator.no_sync(job.module):
        output: LossOutput = job.module(batch)
        job.accelerator.backward(output.loss_sum / max(1, output.num_units))
    for parameter in job.module.parameters():
        parameter.grad = None
    del held, output
    restore({f"0.{name}": tensor for name, tensor in generators.tensors().items()}, 0)
    took = f"forward and backward, {time.monotonic() - started:.1f} s; its gradients are dropped"
    log.info(f"rehearsal: the longest micro-batch, {batch.num_tokens:,} tokens, fits ({took})")
