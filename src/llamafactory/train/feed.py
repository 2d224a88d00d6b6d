"""Examples -> the batches of a step or of an evaluation, for one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from llamafactory.data.batch import Batch
from llamafactory.data.collate import collate_flat, collate_padded
from llamafactory.data.table import Examples
from llamafactory.data.types import IGNORE_INDEX, Example
from llamafactory.train.windows import Item, Schedule


@dataclass(frozen=True, kw_only=True)
class Window:
    """One optimizer step as this rank sees it.

    Attributes:
        batches: of this rank, on the CPU.
        num_units: supervised tokens of all ranks' batches together.
        lengths: tokens of each example, over all ranks.
    """

    batches: Sequence[Batch]
    num_units: int
    lengths: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Turns a schedule over examples into batches.

    Attributes:
        examples: what the schedule's items point into; `offsets` and `flags` say what belongs together.
        schedule: which items make up which step.
        layout: flat or padded.
        pad_id: token id that fills padded rows.
    """

    examples: Examples
    schedule: Schedule
    layout: Literal["flat", "padded"]
    pad_id: int

    def window(self, step: int, rank: int) -> Window:
        """The batches of optimizer step `step` (0-based) for `rank`."""
        ranks = self.schedule.window(step)
        chosen = [self.examples[index] for share in ranks for group in share for item in group for index in item]
        return Window(
            batches=[self.batch(group) for group in ranks[rank]],
            num_units=sum(example.num_supervised for example in chosen),
            lengths=[len(example) for example in chosen],
        )

    def rows(self, step: int) -> list[str]:
        """Names of the examples of optimizer step `step` (0-based), over all ranks; counted from 0, in data order."""
        indices = [
            index for share in self.schedule.window(step) for group in share for item in group for index in item
        ]
        return [f"example {index} ({len(self.examples[index])} tokens)" for index in indices]

    def cursor(self, step: int) -> dict[str, Any]:
        """Where in the data optimizer step `step` (0-based) begins, for a checkpoint; JSON-able."""
        epoch, place = divmod(step, self.schedule.windows_per_epoch)
        return {"epoch": epoch, "window": place, "items_per_window": self.schedule.items_per_window}

    def one_pass(self, rank: int) -> Iterator[Batch]:
        """Every item once, in the order of the schedule's first epoch."""
        for step in range(self.schedule.windows_per_epoch):
            yield from self.window(step, rank).batches

    def batch(self, group: Sequence[Item]) -> Batch:
        """Collates items; an empty group gives a batch with nothing supervised, so that ranks stay in step."""
        examples = [self.examples[index] for item in group for index in item] or [_unsupervised(self.examples[0])]
        return collate_flat(examples) if self.layout == "flat" else collate_padded(examples, self.pad_id)


def _unsupervised(example: Example) -> Example:
    return replace(example, labels=np.full_like(example.labels, IGNORE_INDEX), weights=None)
