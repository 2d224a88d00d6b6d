"""Sums of losses and metrics that stay on the device until somebody reads an average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from llamafactory.train import spread

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llamafactory.train.stage import LossOutput


class Sums:
    """Sums over batches of one rank.

    Attributes:
        loss: float64 scalar (float32 where the device has no float64) on the device.
        num_units: units of this rank.
        metrics: name -> `[2]`, a sum and what it is divided by.
        spreads: name -> counts of values, see `train.spread`.
    """

    def __init__(self, device: torch.device) -> None:
        """All sums are zero."""
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros((), dtype=self._dtype, device=device)
        self.num_units = 0
        self.metrics: dict[str, Tensor] = {}
        self.spreads: dict[str, Tensor] = {}

    def add(self, output: LossOutput) -> None:
        """Adds one batch."""
        self.loss += output.loss_sum.detach()
        self.num_units += output.num_units
        self._add_metrics(output.metrics)
        self._add_spreads(output.spreads)

    def merge(self, other: Sums) -> None:
        """Adds the sums of other batches."""
        self.loss += other.loss
        self.num_units += other.num_units
        self._add_metrics(other.metrics)
        self._add_spreads(other.spreads)

    def averages(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics over all ranks; waits for them and for the device. What nothing counted for is left out.

        Every rank must have added the same names, which a stage gives for every batch.
        """
        if not self.metrics:
            return {}
        table = summed(accelerator, torch.stack(list(self.metrics.values()))).tolist()
        found = {name: total / count for name, (total, count) in zip(self.metrics, table, strict=True) if count}
        if self.spreads:
            wide = spread.over_ranks(accelerator, torch.stack(list(self.spreads.values()))).cpu()
            for name, counts in zip(self.spreads, wide, strict=True):
                found |= {f"{name}/{fact}": value for fact, value in spread.read_spread(counts).items()}
        return found

    def _add_metrics(self, metrics: object) -> None:
        for name, values in cast("dict[str, Tensor]", metrics).items():
            wide = values.detach().to(self._dtype)
            self.metrics[name] = self.metrics[name] + wide if name in self.metrics else wide

    def _add_spreads(self, spreads: Mapping[str, Tensor]) -> None:
        for name, counts in spreads.items():
            wide = counts.detach().to(self._dtype)
            self.spreads[name] = spread.merged(self.spreads[name], wide) if name in self.spreads else wide


def summed(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; waits for them."""
    return cast("Tensor", accelerator.reduce(tensor, reduction="sum"))
