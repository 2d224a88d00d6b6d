"""Which examples make up each optimizer step, on every rank: pure functions of the order, no tensors.

An *item* is what the user's batch size counts: one example, or one packed bin of examples. A *window* is one optimizer
step: `batch size x accumulation x ranks` items, fewer in the last window of an epoch. Inside a window items may be
grouped into any micro-batches, because the loss is divided by the window's global number of supervised tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llamafactory.data.collate import padded_width
from llamafactory.data.mix import Mix, drawable_rows, mix_rows
from llamafactory.data.order import epoch_order
from llamafactory.data.pack import pack_best_fit

Item = tuple[int, ...]
"""Indices of the examples that an item holds."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedMix:
    """Several data sets of which each epoch draws other rows, and packs those that it drew.

    The plan looks at the bins of the first epoch alone: those of later ones must be no longer, see `within`.

    Attributes:
        mix: how many examples an epoch takes of each data set.
        lengths: tokens of each example, of all data sets end to end.
        capacity: tokens of a bin.
    """

    mix: Mix
    lengths: Sequence[int]
    capacity: int

    def bins(self, epoch: int, *, shuffle: bool = True) -> list[Item]:
        """What an epoch trains on; epochs draw equally many examples, but not equally many tokens and bins."""
        drawn = mix_rows(self.mix, epoch, shuffle=shuffle).tolist()
        packed = packed_items([self.lengths[index] for index in drawn], self.capacity)
        return [tuple(drawn[place] for place in item) for item in packed]

    def within(self, items: Sequence[Item]) -> PackedMix:
        """The same with bins that are no longer than the longest of `items`, or than the longest example."""
        tokens = [sum(self.lengths[index] for index in item) for item in (*items, self.longest())]
        return replace(self, capacity=max(tokens))

    def longest(self) -> Item:
        """The longest example that any epoch may draw, as an item."""
        return (_longest(self.mix, self.lengths),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How items become windows.

    Attributes:
        items: what there is to train on.
        lengths: tokens of each item.
        items_per_device: `per_device_train_batch_size`.
        accumulation: `gradient_accumulation_steps`.
        num_ranks: processes that train together.
        micro_batch_tokens: tokens of one forward pass, or None to keep `items_per_device` items together.
        seed: of the order of items.
        shuffle: False keeps the order of the data in every epoch.
        is_padded: micro-batches are padded to their longest row: a step's rows are grouped by length, and
            `micro_batch_tokens` counts padding.
        mix: how often and in which order the items of several data sets come; its sizes count items. None: each item
            once in an epoch.
        redraw: gives the items of the epochs behind the first one; None: those of the first.
    """

    items: Sequence[Item]
    lengths: Sequence[int]
    items_per_device: int
    accumulation: int
    num_ranks: int
    micro_batch_tokens: int | None
    seed: int
    shuffle: bool = True
    is_padded: bool = False
    mix: Mix | None = None
    redraw: PackedMix | None = None

    @property
    def items_per_window(self) -> int:
        """Items of a full optimizer step over all ranks."""
        return self.items_per_device * self.accumulation * self.num_ranks

    @property
    def windows_per_epoch(self) -> int:
        """Optimizer steps of one pass over the items; the last may be smaller."""
        return math.ceil(self.items_per_epoch / self.items_per_window)

    @property
    def items_per_epoch(self) -> int:
        """Items of one epoch, repeated ones counted again."""
        return len(self.items) if self.mix is None else len(_order(self.mix, 0, self.seed, False))

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The items of an epoch, in order."""
        if self.mix is not None:
            return _order(self.mix, epoch, self.seed, self.shuffle)
        return _shuffled(len(self.items), self.seed, epoch) if self.shuffle else np.arange(len(self.items))

    def longest_later(self, num_steps: int) -> Item | None:
        """The longest that epochs behind the first may draw; their items are as long as it, or as one of the first.

        Args:
            num_steps: optimizer steps of the run.

        Returns:
            None where there is no such epoch, or all have the items of the first.
        """
        if not self.shuffle or num_steps <= self.windows_per_epoch:
            return None
        if self.redraw is not None:
            return self.redraw.longest()
        return None if self.mix is None else self.items[_longest(self.mix, self.lengths)]

    def total_windows(self, *, max_steps: int, num_epochs: float) -> int:
        """Optimizer steps of the whole run: `max_steps` if positive, else as many as the epochs hold."""
        return max_steps if max_steps > 0 else max(1, math.ceil(num_epochs * self.windows_per_epoch))

    def window(self, step: int) -> list[list[list[Item]]]:
        """The items of optimizer step `step` (0-based), for any step without looking at those before.

        Returns:
            For each rank its micro-batches, each a list of items. All ranks have equally many micro-batches; a rank
            that has fewer items gets empty ones. Where an epoch draws anew, its items are spread evenly over as many
            windows as the first epoch has.
        """
        epoch, place = divmod(step, self.windows_per_epoch)
        if self.redraw is not None and epoch:
            items, lengths = _bins(self.redraw, epoch, self.windows_per_epoch)
            later, count = replace(self, items=items, lengths=lengths, redraw=None), self.windows_per_epoch
            order = later.order(epoch)
            return later.micro_batches_of(order[place * len(order) // count : (place + 1) * len(order) // count])
        return self.micro_batches_of(
            self.order(epoch)[place * self.items_per_window : (place + 1) * self.items_per_window]
        )

    def micro_batches_of(self, chosen: NDArray[np.int64]) -> list[list[list[Item]]]:
        """The micro-batches of each rank for the items of a window, given by their places."""
        ranks = [self.micro_batches(share.tolist()) for share in np.array_split(chosen, self.num_ranks)]
        most = max(len(micro_batches) for micro_batches in ranks)
        return [micro_batches + [[]] * (most - len(micro_batches)) for micro_batches in ranks]

    def micro_batches(self, share: list[int]) -> list[list[Item]]:
        """Groups the items of one rank and step, given by their places, into forward passes."""
        if self.is_padded:
            groups = self._by_length(share)
        elif self.micro_batch_tokens is None:
            size = self.items_per_device
            groups = [share[start : start + size] for start in range(0, len(share), size)]
        else:
            bins = pack_best_fit([self.lengths[index] for index in share], self.micro_batch_tokens)
            groups = [[share[place] for place in places] for places in bins]
        return [[self.items[index] for index in group] for group in groups]

    def positions(self, lengths: Sequence[int]) -> int:
        """Positions that a forward pass over rows of these lengths computes, padding included."""
        if not lengths:
            return 0
        return len(lengths) * padded_width(max(lengths)) if self.is_padded else sum(lengths)

    def _by_length(self, share: list[int]) -> list[list[int]]:
        """Rows of similar length together, the longest first, at most `items_per_device` of them."""
        share = sorted(share, key=lambda place: -self.lengths[place])
        limit = self.micro_batch_tokens
        if limit is None:
            return self._in_full_passes(share)
        groups: list[list[int]] = []
        for index in share:
            group = groups[-1] if groups else []
            is_full = len(group) == self.items_per_device
            if group:
                is_full |= (len(group) + 1) * padded_width(self.lengths[group[0]]) > limit
            if is_full or not group:
                groups.append([index])
            else:
                group.append(index)
        return groups

    def _in_full_passes(self, ordered: list[int]) -> list[list[int]]:
        """Passes of `items_per_device` items, and one of the rest, where it costs the fewest positions."""
        size = self.items_per_device
        rest = len(ordered) % size

        def with_rest_at(place: int) -> list[list[int]]:
            starts = [*range(0, place + 1, size), *range(place + rest, len(ordered), size)]
            return [ordered[start:stop] for start, stop in pairwise([*starts, len(ordered)])]

        def cost(groups: list[list[int]]) -> int:
            return sum(self.positions([self.lengths[index] for index in group]) for group in groups)

        if not rest:
            return [ordered[start : start + size] for start in range(0, len(ordered), size)]
        return min(map(with_rest_at, range(len(ordered) - rest, -1, -size)), key=cost)


def _longest(mix: Mix, lengths: Sequence[int]) -> int:
    """Place of the longest of what a mix may draw."""
    return int(np.argmax(np.where(drawable_rows(mix), np.asarray(lengths, dtype=np.int64), 0)))


@lru_cache(maxsize=2)
def _bins(packed: PackedMix, epoch: int, at_least: int) -> tuple[Sequence[Item], Sequence[int]]:
    """The bins of an epoch and their tokens, kept for its next step; halves bins where there are too few of them."""
    bins = packed.bins(epoch)
    while len(bins) < at_least:
        most = max(range(len(bins)), key=lambda place: len(bins[place]))
        item = bins[most]
        bins[most : most + 1] = [item[: len(item) // 2], item[len(item) // 2 :]]
    return bins, [sum(packed.lengths[index] for index in item) for item in bins]


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """`epoch_order`, kept for the next step of the epoch."""
    order = epoch_order(count, seed, epoch)
    order.setflags(write=False)
    return order


@lru_cache(maxsize=4)
def _order(mix: Mix, epoch: int, seed: int, shuffle: bool) -> NDArray[np.int64]:
    """A mixed epoch, kept for its next step."""
    rows = mix_rows(mix, epoch, shuffle=shuffle)
    if shuffle:
        rows = rows[epoch_order(len(rows), seed, epoch)]
    rows.setflags(write=False)
    return rows


def single_items(num_examples: int) -> list[Item]:
    """Every example is an item of its own."""
    return [(index,) for index in range(num_examples)]


def group_items(offsets: Sequence[int]) -> list[Item]:
    """The examples of each group are one item."""
    return [tuple(range(first, last)) for first, last in pairwise(offsets)]


def packed_items(lengths: Sequence[int], capacity: int) -> list[Item]:
    """Examples packed into bins of at most `capacity` tokens over the whole set; never cut, never shared."""
    return [tuple(sorted(places)) for places in pack_best_fit(lengths, capacity)]
