"""Sums over a stretch of steps, from which its mean loss, its metrics and its rates are made."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from llamafactory.train.metrics import Sums, summed

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llamafactory.train.feed import Window


class Span:
    """Sums over the steps since it was made. Losses stay on the device until somebody waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._started = time.monotonic()
        self._device = device
        self.paused = self.stalled = 0.0
        self.steps: list[tuple[int, Sums, int]] = []
        self.sums = Sums(device)
        self.units = self.targets = self.tokens = self.examples = 0
        self.flops: int | None = 0
        self.grad_norm: torch.Tensor | None = None
        self.learning_rate: float = 0.0

    def add(self, sums: Sums, window: Window, flops: int | None) -> None:
        """Adds one step."""
        self.sums.merge(sums)
        self.units += window.num_units
        self.targets += window.num_targets
        self.tokens += sum(window.lengths)
        self.examples += window.num_rows
        self.flops = None if flops is None or self.flops is None else self.flops + flops

    def forget_after(self, step: int) -> None:
        """Takes steps after `step` out of losses and metrics; the other sums are only rates."""
        kept = [entry for entry in self.steps if entry[0] <= step]
        if len(kept) < len(self.steps):
            self.steps, self.sums, self.units = kept, Sums(self._device), sum(units for _, _, units in kept)
            for _, sums, _ in kept:
                self.sums.merge(sums)

    def step_totals(self, accelerator: Accelerator) -> list[tuple[int, float, int]]:
        """Step, sum of losses and units of each step, over all ranks; waits for the device."""
        if not self.steps:
            return []
        totals = summed(accelerator, torch.stack([sums.loss for _, sums, _ in self.steps])).tolist()
        return [(step, total, units) for (step, _, units), total in zip(self.steps, totals, strict=True)]

    @property
    def seconds(self) -> float:
        """Training time so far; true on an asynchronous device right after `mean_loss`."""
        return max(1e-9, time.monotonic() - self._started - self.paused)

    def mean_loss(self, accelerator: Accelerator) -> float:
        """Loss per unit over all ranks; waits for the device."""
        if not self.units:
            return float("nan")
        return float(summed(accelerator, self.sums.loss.clone())) / self.units
