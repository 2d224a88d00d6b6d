"""Where a signal may end a run: between micro-batches, and at the same one in every process.

One process looks at its own flag before each micro-batch, and before each token that it samples. Several must leave a
step together, or one waits for ever for sums of the others: they ask each other, about once a second, at micro-batches
whose number follows from times that all of them know (`agreement`). A rollout they sample each at its own pace: one
that has a signal stops sampling at once, and all ask at its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llamafactory.extras import failpoints
from llamafactory.train.agreement import Turns
from llamafactory.train.rollout import Rollouts
from llamafactory.train.signals import StopRequest, StopSignal

if TYPE_CHECKING:
    from torch import nn

    from llamafactory.train.job import Job


@contextmanager
def interruptible(job: Job, stop: StopRequest) -> Iterator[None]:
    """Lets a signal end training and evaluation between two micro-batches instead of two optimizer steps."""
    turns = {is_training: Turns(job.accelerator) for is_training in (True, False)}

    def look(module: nn.Module, inputs: Any) -> None:
        failpoints.visit("micro")
        if number := turns[module.training].ask(stop.signal):
            raise StopSignal(number)

    def look_alone() -> None:
        failpoints.visit("sample")
        stop.check()

    handle = job.module.register_forward_pre_hook(look)
    for feed in (job.feed, *job.evaluation.values()):
        if isinstance(feed, Rollouts):
            feed.before_each_token(look_alone)
    try:
        yield
    finally:
        handle.remove()
