"""Examples -> Batch, padded or flat. Chooses nothing: which examples share a batch is decided before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from llamafactory.data.batch import Batch
from llamafactory.data.types import IGNORE_INDEX, Example

PAD_MULTIPLE = 8
"""Widths of padded batches are multiples of this."""


def padded_width(longest: int, multiple_of: int = PAD_MULTIPLE) -> int:
    """Width of a padded batch whose longest row has `longest` tokens."""
    return -(-longest // multiple_of) * multiple_of


def collate_padded(examples: Sequence[Example], pad_id: int, multiple_of: int = PAD_MULTIPLE) -> Batch:
    """One row for each example, padded on the right to a common length that `multiple_of` divides.

    Raises:
        ValueError: no examples.
    """
    lengths = _lengths(examples)
    width = padded_width(max(lengths), multiple_of)
    input_ids = np.full((len(examples), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(examples), width), dtype=np.int64)
    for row, example in enumerate(examples):
        input_ids[row, : lengths[row]] = example.input_ids
        mask[row, : lengths[row]] = 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int64), input_ids.shape).copy()
    starts = [row * width for row in range(len(examples))]
    return _batch(examples, input_ids, positions, starts, mask=mask, segment_lengths=None)


def collate_flat(examples: Sequence[Example]) -> Batch:
    """One row that holds all examples end to end, without padding; positions restart at each of them.

    Raises:
        ValueError: no examples.
    """
    lengths = _lengths(examples)
    input_ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)[None, :]
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])[None, :]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    return _batch(examples, input_ids, positions, starts, mask=None, segment_lengths=tuple(lengths))


def _lengths(examples: Sequence[Example]) -> list[int]:
    if not examples:
        raise ValueError("a batch needs at least one example")
    return [len(example) for example in examples]


def _batch(
    examples: Sequence[Example],
    input_ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    starts: Sequence[int],
    *,
    mask: NDArray[np.int64] | None,
    segment_lengths: tuple[int, ...] | None,
) -> Batch:
    rows, ids, weights = [], [], []
    has_weights = any(example.weights is not None for example in examples)
    for start, example in zip(starts, examples, strict=True):
        targets = np.flatnonzero(example.labels[1:] != IGNORE_INDEX)
        rows.append(targets + start)
        ids.append(example.labels[targets + 1])
        if has_weights:
            ones = np.ones(len(targets), dtype=np.float32)
            weights.append(ones if example.weights is None else example.weights[targets + 1])
    target_rows = np.concatenate(rows).astype(np.int64)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(positions),
        attention_mask=None if mask is None else torch.from_numpy(mask),
        segment_lengths=segment_lengths,
        target_rows=torch.from_numpy(target_rows),
        target_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        target_weights=torch.from_numpy(np.concatenate(weights).astype(np.float32)) if has_weights else None,
        num_rows=len(examples),
        num_tokens=sum(len(example) for example in examples),
        num_targets=len(target_rows),
    )
