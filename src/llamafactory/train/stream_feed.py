"""Batches of a stream of rows: the rows of a step follow from its number, so that any step can be asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from llamafactory.data.batch import Batch
from llamafactory.data.pipeline import as_read, is_cut_into_blocks
from llamafactory.extras import log
from llamafactory.train.feed import Feed, Window
from llamafactory.train.stage import load_stage

if TYPE_CHECKING:
    from llamafactory.data.pipeline import PreparedData
    from llamafactory.data.stream import ExampleStream
    from llamafactory.data.table import Examples, ExampleTable
    from llamafactory.hparams.run_config import RunConfig


def build_stream_feed(
    cfg: RunConfig, data: PreparedData, stream: ExampleStream, *, feed: Callable[[Examples], Feed], num_ranks: int
) -> StreamFeed:
    """Batches over a stream. With packing a step takes as many rows as about fill its bins, judged by the first rows.

    Args:
        cfg: the resolved configuration.
        data: with the first rows.
        stream: of all rows.
        feed: makes batches of the rows of one step.
        num_ranks: processes that train together.
    """
    train, view = cfg.train, load_stage(cfg.train.stage).view
    size = train.per_device_train_batch_size * train.gradient_accumulation_steps * num_ranks
    if cfg.data.packing or cfg.data.neat_packing or is_cut_into_blocks(cfg.data, view):
        per_bin = rows_per_bin(stream.sample, cfg.data.cutoff_len)
        log.info(f"streaming: about {per_bin} rows fill a bin of {cfg.data.cutoff_len:,} tokens")
        size *= per_bin
    return StreamFeed(
        stream=stream,
        schedule=StreamSchedule(max_steps=train.max_steps),
        rows_per_window=size,
        as_read=partial(as_read, data=cfg.data, view=view),
        build=feed,
        sample=data.train,
    )


@dataclass(frozen=True, kw_only=True)
class StreamSchedule:
    """As much of `Schedule` as a stream has: its end is unknown, so the whole run counts as one epoch."""

    max_steps: int

    @property
    def windows_per_epoch(self) -> int:
        """Optimizer steps of the run."""
        return self.max_steps

    def total_windows(self, *, max_steps: int, num_epochs: float) -> int:
        """Optimizer steps of the run; epochs are not counted."""
        return max_steps


@dataclass(frozen=True, kw_only=True)
class StreamFeed:
    """As `Feed`, over rows that are read when their step comes. Every rank reads the whole stream.

    Attributes:
        stream: of examples.
        schedule: how long the run is.
        rows_per_window: rows of one step over all ranks.
        as_read: the rows of a step as the stage reads them.
        build: a feed over the rows of one step.
        sample: examples of the first rows, one of which fills batches of a rank that has nothing to do.
    """

    stream: ExampleStream
    schedule: StreamSchedule
    rows_per_window: int
    as_read: Callable[[ExampleTable], Examples]
    build: Callable[[Examples], Feed]
    sample: Examples

    @property
    def examples(self) -> Any:
        """Examples of the first rows."""
        return self.sample

    def window(self, step: int, rank: int) -> Window:
        """The batches of optimizer step `step` (0-based) for `rank`; without units if no row of it can be used."""
        rows = self.as_read(self.stream.window(step * self.rows_per_window, self.rows_per_window).table)
        if len(rows):
            return self._whole(self.build(rows)).window(0, rank)
        blank: Batch = self.build(self.sample).batch([])
        return Window(batches=[blank], num_units=0, num_targets=0, lengths=[], num_rows=0)

    def rows(self, step: int) -> list[str]:
        """Origins of the rows of optimizer step `step` (0-based), over all ranks."""
        return list(self.stream.window(step * self.rows_per_window, self.rows_per_window).origins)

    def cursor(self, step: int) -> dict[str, Any]:
        """Where in the stream optimizer step `step` (0-based) begins, for a checkpoint; JSON-able."""
        return {**self.stream.state_at(step * self.rows_per_window), "row": step * self.rows_per_window,
                "rows_per_window": self.rows_per_window}  # fmt: skip

    def restore(self, cursor: Mapping[str, Any]) -> None:
        """Has the rows of the next step read from where `cursor` was."""
        self.stream.restore(cursor)

    def one_pass(self, rank: int) -> Iterator[Sequence[Batch]]:
        """A stream has no end; evaluation reads tables."""
        raise NotImplementedError("a stream is not evaluated")

    def batch(self, group: Sequence[Any]) -> Batch:
        """A batch without units; windows make their own."""
        return self.build(self.sample).batch([])

    @staticmethod
    def _whole(feed: Feed) -> Feed:
        """The feed with all of its items in the first window, in their order."""
        per_round = feed.schedule.items_per_device * feed.schedule.num_ranks
        rounds = math.ceil(len(feed.schedule.items) / per_round)
        return replace(feed, schedule=replace(feed.schedule, accumulation=rounds, shuffle=False))


def rows_per_bin(sample: Examples, cutoff_len: int) -> int:
    """How many rows about fill a bin of `cutoff_len` tokens, judged by the first rows."""
    return max(1, cutoff_len * (len(sample.offsets) - 1) // max(1, int(sample.lengths.sum())))
