"""The largest value and the 95th percentile of a metric, over batches and ranks, in a tensor of fixed size.

Values are counted in bins of equal width on a logarithmic scale: percentiles are right to 4%, the largest value is
exact. What this file never does: keep the values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

_SMALLEST, _LARGEST, _PER_DECADE = 1e-8, 1e3, 32
_BINS = 11 * _PER_DECADE + 2
"""One bin below the smallest edge, one above the largest."""


def spread_of(values: Tensor, weights: Tensor) -> Tensor:
    """Counts values.

    Args:
        values: `[n]`, none negative; what is not a number counts as infinite, so that the guard of steps can name it.
        weights: `[n]`; a value whose weight is not above 0 does not count.

    Returns:
        Float32 `[bins + 1]` on the device, without gradient: the number of values in each bin, then the largest.
    """
    values = values.detach().float().nan_to_num(nan=torch.inf, posinf=torch.inf)
    counts = (weights > 0).float()
    places = ((values.clamp(_SMALLEST, _LARGEST) / _SMALLEST).log10() * _PER_DECADE).floor().long() + 1
    places = torch.where(values < _SMALLEST, 0, places)
    table = values.new_zeros(_BINS + 1).index_add_(0, places.clamp(max=_BINS - 1), counts)
    if len(values):
        table[-1] = torch.where(counts > 0, values, 0.0).max()
    return table


def merged(one: Tensor, other: Tensor) -> Tensor:
    """The spread of the values of both."""
    total = one + other
    total[-1] = torch.maximum(one[-1], other[-1])
    return total


def over_ranks(accelerator: Accelerator, spreads: Tensor) -> Tensor:
    """Spreads `[names, bins + 1]` of all ranks together; waits for them."""
    if accelerator.num_processes == 1:
        return spreads
    parts: Tensor = accelerator.gather(spreads[None].contiguous())  # type: ignore[assignment]
    total = parts.sum(dim=0)
    total[:, -1] = parts[:, :, -1].amax(dim=0)
    return total


def read_spread(table: Tensor) -> dict[str, float]:
    """`max` and `p95` of a spread on the host; empty where nothing was counted."""
    counts, largest = table[:-1].double(), float(table[-1])
    total = float(counts.sum())
    if not total:
        return {}
    place = int(torch.searchsorted(counts.cumsum(0), 0.95 * total))
    middle = 0.0 if place == 0 else _SMALLEST * 10 ** ((place - 0.5) / _PER_DECADE)
    return {"max": largest, "p95": min(middle, largest)}
