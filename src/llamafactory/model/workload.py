"""What the rows of a run mean for its plan: the largest micro-batch, and the work of a step. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Part: TypeAlias = "int | tuple[int, ...]"
"""Tokens of a sequence, or of a prefix tree: its prefix, then each branch (see `model.tree_attention`)."""


def tokens_of(part: Part) -> int:
    """Tokens of a part."""
    return part if isinstance(part, int) else sum(part)


def squares_of(part: Part) -> int:
    """Pairs of tokens that attention looks at, twice over: a branch sees its prefix and itself."""
    if isinstance(part, int):
        return part**2
    prefix, *branches = part
    return prefix**2 + sum((prefix + size) ** 2 - prefix**2 for size in branches)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """The largest micro-batch of a run.

    Attributes:
        lengths: tokens of each row in it, or of the prefix trees of a flat batch of answers.
        targets: supervised tokens in it, at most.
        num_micro_batches: most micro-batches of one optimizer step on one device.
    """

    lengths: tuple[Part, ...]
    targets: int
    num_micro_batches: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The rows of a run, as far as they matter for memory and time.

    Attributes:
        largest: token limit of a micro-batch (None: `per_device_train_batch_size` rows) -> the largest one.
        tokens: real tokens of an optimizer step over all devices, on average.
        squares: sum of the squared row lengths of a step, on average.
        targets: supervised tokens of a step, on average.
        num_steps: optimizer steps of the run, or None where the number of rows is not known.
        num_tokens: tokens of the data set, or None.
        source: where the numbers come from, in words.
    """

    largest: Callable[[int | None], MicroBatch]
    tokens: float
    squares: float
    targets: float
    num_steps: int | None
    num_tokens: int | None
    source: str


def assumed_workload(
    *, row_tokens: int, rows_per_device: int, accumulation: int, num_devices: int, num_steps: int | None
) -> Workload:
    """The workload where nothing is known about the rows: all have `row_tokens` tokens, all supervised.

    Args:
        row_tokens: tokens of each row, for example `cutoff_len`.
        rows_per_device: `per_device_train_batch_size`.
        accumulation: `gradient_accumulation_steps`.
        num_devices: devices that train together.
        num_steps: `max_steps`, or None.
    """

    def largest(limit: int | None) -> MicroBatch:
        rows = rows_per_device if limit is None else min(rows_per_device * accumulation, max(1, limit // row_tokens))
        count = math.ceil(rows_per_device * accumulation / rows)
        return MicroBatch(lengths=(row_tokens,) * rows, targets=rows * row_tokens, num_micro_batches=count)

    rows = rows_per_device * accumulation * num_devices
    return Workload(
        largest=largest,
        tokens=rows * row_tokens,
        squares=rows * row_tokens**2,
        targets=rows * row_tokens,
        num_steps=num_steps,
        num_tokens=None,
        source=f"every row is assumed to have {row_tokens:,} tokens (cutoff_len), all of them supervised",
    )
