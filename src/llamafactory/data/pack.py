"""Fills bins with examples, so that a batch has no padding and no example is cut."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each example, longest first, goes into the fullest bin that still has room for it.

    Deterministic: equal lengths keep their order, bins come in the order in which they were opened.

    Args:
        lengths: tokens of each example.
        capacity: tokens of a bin.

    Returns:
        Indices into `lengths`, one list a bin; each index occurs once. An example longer than `capacity` (truncation
        should have prevented it) has a bin of its own.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        place = bisect_left(room, (length, -1))
        if place < len(room):
            free, number = room.pop(place)
        else:
            free, number = max(capacity, length), len(bins)
            bins.append([])
        bins[number].append(index)
        if free > length:
            insort(room, (free - length, number))
    return bins
