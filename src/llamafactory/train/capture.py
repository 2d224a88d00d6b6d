"""The state of a run, taken in all processes at the same moment, for the first of them to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from llamafactory.model.shards import WEIGHT_SHARDS
from llamafactory.train.checkpoint import random_state
from llamafactory.train.checkpoint.shards import OPTIMIZER_SHARDS, sharded_state, write_together
from llamafactory.train.checkpoint.snapshot import Snapshot
from llamafactory.train.checkpoint.tensors import optimizer_state

if TYPE_CHECKING:
    from llamafactory.train.checkpoint.random_state import Generators
    from llamafactory.train.checkpoint.state import RunState
    from llamafactory.train.job import Job, Updates


def capture(job: Job, state: RunState, generators: Generators, *, wait: Callable[[], None]) -> Snapshot:
    """Takes a checkpoint's content; every process must call it. What is spread over processes is written at once.

    Args:
        job: the run.
        state: what the checkpoint holds besides tensors.
        generators: random states of this process that belong to the step.
        wait: waits until this process writes no other checkpoint.

    Returns:
        Whole in the first process only.

    Raises:
        SaveError: a process could not write its shards; every process gets the same error.
    """
    accelerator, files = job.accelerator, job.model_files
    is_main, optimizer = accelerator.is_main_process, cast("Updates", job.updates).optimizer
    states = random_state.of_all_ranks(accelerator, generators)
    shards = None
    if job.is_sharded:
        wait()
        groups = {WEIGHT_SHARDS: files.shards()}
        if not job.cfg.save_only_model:
            groups[OPTIMIZER_SHARDS] = sharded_state(optimizer)
        shards = write_together(job.output_dir, state.step, groups, accelerator)
    return Snapshot(
        state=state,
        write_model=files.prepare(is_async=job.is_async, is_writer=is_main, for_checkpoint=True),
        optimizer=optimizer_state(optimizer) if is_main and not job.cfg.save_only_model else None,
        generators=states,
        shards=shards,
    )
