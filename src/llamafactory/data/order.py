"""The order of rows: a pure function of seed and epoch, so that a resumed run finds its place by arithmetic."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of `range(num_rows)` for one epoch, the same on every machine."""
    return _generator(seed, epoch, stream=0).permutation(num_rows)


def split_order(num_rows: int, seed: int) -> NDArray[np.int64]:
    """The permutation that decides which rows are held out for evaluation; unrelated to every epoch's order."""
    return _generator(seed, 0, stream=1).permutation(num_rows)


def _generator(seed: int, epoch: int, *, stream: int) -> np.random.Generator:
    mask = 2**64 - 1
    key = np.array([seed & mask, (stream << 48) | (epoch & (2**48 - 1))], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def sample_order(num_rows: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """`wanted` row numbers in random order; rows repeat only where there are fewer than `wanted`."""
    generator = _generator(seed, 0, stream=2)
    first = generator.permutation(num_rows)[:wanted]
    return np.concatenate([first, generator.integers(num_rows, size=wanted - len(first))])


def row_order(num_rows: int, seed: int, epoch: int, *, dataset: int, lap: int) -> NDArray[np.int64]:
    """The order in which a mixed epoch takes the rows of one data set, going through them for the `lap`th time."""
    key = np.random.SeedSequence([seed & (2**64 - 1), epoch, dataset, lap]).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_rows)
