"""Rows -> the batches of a step or of an evaluation, for one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from llamafactory.data.batch import Batch
from llamafactory.train.rows import EXAMPLES, Rows
from llamafactory.train.windows import Item, Schedule

if TYPE_CHECKING:
    from llamafactory.data.table import Examples


@dataclass(frozen=True, kw_only=True)
class Window:
    """One optimizer step as this rank sees it.

    Attributes:
        batches: of this rank, on the CPU.
        num_units: units of all ranks' batches together: what the step's loss is divided by.
        num_targets: supervised tokens of all ranks.
        lengths: tokens of each sequence, over all ranks.
        num_rows: rows, over all ranks.
    """

    batches: Sequence[Batch]
    num_units: int
    num_targets: int
    lengths: Sequence[int]
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Turns a schedule over rows into batches.

    Attributes:
        examples: the rows that the schedule's items point into.
        schedule: which items make up which step.
        layout: flat or padded.
        pad_id: token id that fills padded rows.
        kind: what the rows are.
        read: the rows of an item; None: its examples.
    """

    examples: Examples
    schedule: Schedule
    layout: Literal["flat", "padded"]
    pad_id: int
    kind: Rows = EXAMPLES
    read: Callable[[Item], Sequence[Any]] | None = None

    def window(self, step: int, rank: int) -> Window:
        """The batches of optimizer step `step` (0-based) for `rank`."""
        ranks = self.schedule.window(step)
        chosen = [row for share in ranks for group in share for row in self._rows(group)]
        sequences = [example for row in chosen for example in self.kind.sequences(row)]
        return Window(
            batches=[self.batch(group) for group in ranks[rank]],
            num_units=sum(self.kind.num_units(row) for row in chosen),
            num_targets=sum(example.num_supervised for example in sequences),
            lengths=[len(example) for example in sequences],
            num_rows=len(chosen),
        )

    def rows(self, step: int) -> list[str]:
        """Names of the rows of optimizer step `step` (0-based), over all ranks, with their tokens."""
        indices = [
            index for share in self.schedule.window(step) for group in share for item in group for index in item
        ]
        named = groupby(indices, key=lambda index: self.examples.origin(index) or f"example {index}")
        return [f"{name} ({sum(len(self.examples[index]) for index in same)} tokens)" for name, same in named]

    def cursor(self, step: int) -> dict[str, Any]:
        """Where in the data optimizer step `step` (0-based) begins, for a checkpoint; JSON-able."""
        epoch, place = divmod(step, self.schedule.windows_per_epoch)
        return {"epoch": epoch, "window": place, "items_per_window": self.schedule.items_per_window}

    def one_pass(self, rank: int) -> Iterator[Sequence[Batch]]:
        """Every item once, in the order of the schedule's first epoch; the batches of one step together."""
        for step in range(self.schedule.windows_per_epoch):
            yield self.window(step, rank).batches

    def batch(self, group: Sequence[Item]) -> Batch:
        """Collates items; an empty group gives a batch without units, so that ranks stay in step."""
        rows = self._rows(group) or [self.kind.blank(self._rows(self.schedule.items[:1])[0])]
        return self.kind.collate(rows, self.layout, self.pad_id)

    def _rows(self, items: Sequence[Item]) -> list[Any]:
        if self.read is not None:
            return [row for item in items for row in self.read(item)]
        return [self.examples[index] for item in items for index in item]
