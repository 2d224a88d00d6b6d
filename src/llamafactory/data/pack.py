"""Fills bins with examples, so that a batch has no padding and no example is cut."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each example, longest first, goes into the fullest bin that still has room for it.

    Deterministic: equal lengths keep their order, of equally full bins the one opened first is taken, and bins come in
    the order in which they were opened. The time an example takes does not depend on how many there are: bins are kept
    by their free tokens, and one bit for each number of free tokens says whether there is such a bin.

    Args:
        lengths: tokens of each example.
        capacity: tokens of a bin.

    Returns:
        Indices into `lengths`, one list a bin; each index occurs once. An example longer than `capacity` (truncation
        should have prevented it) has a bin of its own.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> heap of bins
    has_room = 0  # bit `n` is set where `with_room[n]` has a bin
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable") if len(lengths) else []
    for index in map(int, order):
        length = int(lengths[index])
        fitting = has_room >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            number = heappop(with_room[free])
            if not with_room[free]:
                has_room ^= 1 << free
        else:
            free, number = max(capacity, length), len(bins)
            bins.append([])
        bins[number].append(index)
        if left := free - length:
            heappush(with_room.setdefault(left, []), number)
            has_room |= 1 << left
    return bins
