"""How several data sets become one epoch: which rows, in which order. Pure functions of sizes, shares, seed and epoch.

The counts, and without shuffling the order too, are those of `datasets.interleave_datasets`. From which data set a
place of the epoch takes its row depends on the seed alone, so that all epochs are equally long; which row it is is
drawn anew in each epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llamafactory.data.order import row_order
from llamafactory.extras.errors import DataError

MixStrategy: TypeAlias = Literal["concat", "interleave_under", "interleave_over", "interleave_once"]
BLOCK = 1000
"""Places that are drawn at once. `datasets` draws as many, so that the same seed gives the same places."""
_MOST_DRAWS = 500_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """What is mixed.

    Attributes:
        names: of the data sets.
        sizes: rows of each.
        strategy: `interleave_under` ends with the first data set that runs out, `interleave_over` repeats rows until
            every data set has run out once, `interleave_once` takes every row once.
        probs: share of each data set, any positive scale; None takes turns.
        seed: of all draws.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    strategy: MixStrategy
    probs: tuple[float, ...] | None
    seed: int

    def shares(self) -> tuple[float, ...] | None:
        """`probs`, scaled to a sum of 1."""
        return None if self.probs is None else tuple(prob / sum(self.probs) for prob in self.probs)

    def realised(self) -> list[dict[str, Any]]:
        """For each data set its name, rows, draws of an epoch, the share that was asked for, and the real one."""
        counts = np.bincount(source_order(self), minlength=len(self.sizes)).tolist()
        asked = self.shares() or [None] * len(self.sizes)
        return [
            {"name": name, "rows": size, "drawn": count, "asked": share, "share": count / max(1, sum(counts))}
            for name, size, count, share in zip(self.names, self.sizes, counts, asked, strict=True)
        ]


def mix_rows(mix: Mix, epoch: int, *, shuffle: bool = True) -> NDArray[np.int64]:
    """Row numbers of one epoch, counted over all data sets laid end to end.

    Args:
        mix: what is mixed.
        epoch: decides which rows are drawn, and in which order. The number of rows is the same in every epoch.
        shuffle: False takes the rows of each data set in their order, and again from the first one.
    """
    sources = source_order(mix)
    rows = np.empty(len(sources), dtype=np.int64)
    first = 0
    for number, size in enumerate(mix.sizes):
        places = np.flatnonzero(sources == number)
        taken = np.arange(len(places), dtype=np.int64)
        if shuffle and size:
            laps = range(-(-len(places) // size))
            drawn = [row_order(size, mix.seed, epoch, dataset=number, lap=lap) for lap in laps]
            rows[places] = first + np.concatenate([*drawn, np.empty(0, np.int64)])[: len(places)]
        elif size:
            rows[places] = first + taken % size
        first += size
    return rows


def drawable_rows(mix: Mix) -> NDArray[np.bool_]:
    """Which rows an epoch may draw, `[rows]`: all but those of data sets that no place of an epoch takes from."""
    counts = np.bincount(source_order(mix), minlength=len(mix.sizes))
    return np.repeat(counts > 0, mix.sizes)


def source_order(mix: Mix) -> NDArray[np.int64]:
    """From which data set each place of an epoch takes its row.

    Raises:
        DataError: a data set that would never run out, or an epoch that would be too long.
    """
    sizes = np.array(mix.sizes, dtype=np.int64)
    if mix.strategy == "concat":
        return np.repeat(np.arange(len(sizes)), sizes)
    if mix.probs is None:
        return _in_turn(sizes, mix.strategy)
    _check_probs(mix)
    return _drawn(sizes, np.array(mix.shares()), mix)


def _in_turn(sizes: NDArray[np.int64], strategy: str) -> NDArray[np.int64]:
    turns = int(sizes.min() if strategy == "interleave_under" else sizes.max())
    sources = np.tile(np.arange(len(sizes)), turns)
    if strategy != "interleave_once":
        return sources
    return sources[np.repeat(np.arange(turns), len(sizes)) < sizes[sources]]


def _drawn(sizes: NDArray[np.int64], shares: NDArray[np.float64], mix: Mix) -> NDArray[np.int64]:
    generator = np.random.default_rng(mix.seed)
    drawable = shares > 0
    draws = np.empty(0, dtype=np.int64)
    while True:
        counts = np.bincount(draws, minlength=len(sizes))
        has_run_out = (counts >= sizes)[drawable]
        if has_run_out.any() if mix.strategy == "interleave_under" else has_run_out.all():
            break
        num_blocks = max(1, len(draws) // BLOCK)
        more = [generator.choice(len(sizes), size=BLOCK, p=shares) for _ in range(num_blocks)]
        draws = np.concatenate([draws, *more])
    runs_out = [number for number, size in enumerate(sizes) if size and (draws == number).sum() >= size]
    ends = [int(np.flatnonzero(draws == number)[sizes[number] - 1]) for number in runs_out]
    if mix.strategy == "interleave_under":
        return draws[: min(ends) + 1]
    draws = draws[: max(ends) + 1]
    return draws if mix.strategy == "interleave_over" else draws[_turn_of(draws, len(sizes)) < sizes[draws]]


def _turn_of(draws: NDArray[np.int64], num_sources: int) -> NDArray[np.int64]:
    """How often each draw's data set was drawn before."""
    turns = np.empty(len(draws), dtype=np.int64)
    for number in range(num_sources):
        places = np.flatnonzero(draws == number)
        turns[places] = np.arange(len(places))
    return turns


def _check_probs(mix: Mix) -> None:
    shares: Sequence[float] = mix.shares() or ()
    for name, size, share in zip(mix.names, mix.sizes, shares, strict=True):
        if not share and mix.strategy != "interleave_under":
            raise DataError(
                f"'{name}' would never run out",
                where="interleave_probs",
                found=f"a share of 0 with {mix.strategy}",
                expected="a share above 0 for each data set, or interleave_under",
            )
        if share and not size:
            raise DataError(f"'{name}' has no rows to draw from", where="interleave_probs", found=f"share {share:.3g}")
        if mix.strategy != "interleave_under" and size / max(share, 1e-300) > _MOST_DRAWS:
            raise DataError(
                f"an epoch would need about {size / share:,.0f} draws until '{name}' runs out",
                where="interleave_probs",
                found=f"a share of {share:.3g} for {size:,} rows",
                expected=f"at most {_MOST_DRAWS:,} draws",
                fix="raise its share, or use interleave_under",
            )
