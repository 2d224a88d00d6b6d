"""The workload of a run from its real rows: the micro-batches that the schedule will make, before any is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from llamafactory.model.workload import MicroBatch, Workload
from llamafactory.train.windows import Item, Schedule

if TYPE_CHECKING:
    from llamafactory.data.table import Examples
    from llamafactory.hparams.train import TrainConfig

_MOST_WINDOWS = 2000
"""Optimizer steps that are looked at; a longer run is judged by these and by its longest rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSizes:
    """The lengths of the rows, and what belongs together.

    Attributes:
        tokens: of each example.
        offsets: group `g` holds the examples `offsets[g]` up to `offsets[g + 1]`.
        supervised: share of the tokens that carry loss.
    """

    tokens: list[int]
    offsets: list[int]
    supervised: float

    @classmethod
    def of(cls, examples: Examples) -> RowSizes:
        """The sizes of examples; the supervised share is that of up to 500 of them, evenly spread."""
        tokens = examples.lengths.tolist()
        sample = [examples[place] for place in range(0, len(tokens), max(1, len(tokens) // 500))]
        number = sum(len(example) for example in sample)
        supervised = sum(example.num_supervised for example in sample) / max(1, number)
        return cls(tokens=tokens, offsets=examples.offsets.tolist(), supervised=supervised)

    def cut(self, cutoff_len: int) -> RowSizes:
        """The sizes with another `cutoff_len`, not above the one that the rows were made with."""
        return replace(self, tokens=[min(size, cutoff_len) for size in self.tokens])


def workload_of_rows(rows: RowSizes, schedule: Schedule, train: TrainConfig) -> Workload:
    """What the rows mean for the plan.

    Args:
        rows: the training rows.
        schedule: over them, with any token limit.
        train: number of steps and epochs.
    """
    sizes = rows.tokens
    windows = schedule.windows_per_epoch
    num_steps = schedule.total_windows(max_steps=train.max_steps, num_epochs=train.num_train_epochs)

    def largest(limit: int | None) -> MicroBatch:
        group, count = largest_group(replace(schedule, micro_batch_tokens=limit), sizes, num_steps)
        lengths = tuple(sizes[index] for item in group for index in item)
        return MicroBatch(lengths=lengths, targets=round(sum(lengths) * rows.supervised), num_micro_batches=count)

    return Workload(
        largest=cache(largest),
        tokens=sum(sizes) / windows,
        squares=sum(size**2 for size in sizes) / windows,
        targets=sum(sizes) * rows.supervised / windows,
        num_steps=num_steps,
        num_tokens=sum(sizes),
        source=f"{len(sizes):,} rows, {sum(sizes):,} tokens, the longest {max(sizes):,}",
    )


def largest_group(schedule: Schedule, sizes: Sequence[int], num_steps: int) -> tuple[Sequence[Item], int]:
    """The micro-batch that needs most memory, and most micro-batches of a step on one device.

    Args:
        schedule: of the run.
        sizes: tokens of each example.
        num_steps: optimizer steps of the run.

    Returns:
        The items of the micro-batch with most positions (padding included) in the first epoch, and the count. Of a
        longer epoch than 2,000 steps the first 2,000 are looked at, and the longest rows together.
    """
    best: Sequence[Item] = ()
    most_tokens = most_groups = 0
    steps = min(num_steps, schedule.windows_per_epoch)
    for step in range(min(steps, _MOST_WINDOWS)):
        for share in schedule.window(step):
            most_groups = max(most_groups, len(share))
            for group in share:
                tokens = schedule.positions([sum(sizes[index] for index in item) for item in group])
                if tokens > most_tokens:
                    best, most_tokens = group, tokens
    if steps > _MOST_WINDOWS:
        longest = sorted(range(len(schedule.items)), key=lambda place: -schedule.lengths[place])
        groups = schedule.micro_batches(longest[: schedule.items_per_device])
        best = max([best, *groups], key=lambda g: schedule.positions([sum(sizes[i] for i in item) for item in g]))
    return best, most_groups
