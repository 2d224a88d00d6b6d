"""Sums over a stretch of steps, from which its mean loss and its rates are made."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from llamafactory.train.step import summed

if TYPE_CHECKING:
    from accelerate import Accelerator


class Span:
    """Sums over the steps since it was made. The loss stays on the device until `mean_loss` waits for it."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.paused = self.stalled = 0.0
        self.steps: list[tuple[int, torch.Tensor, int]] = []
        self.loss: torch.Tensor | None = None
        self.units = self.tokens = self.examples = 0
        self.flops: int | None = 0
        self.grad_norm: torch.Tensor | None = None
        self.learning_rate: float = 0.0

    def add(self, loss: torch.Tensor, units: int, tokens: int, examples: int, flops: int | None) -> None:
        """Adds one step."""
        self.loss = loss if self.loss is None else self.loss + loss
        self.units += units
        self.tokens += tokens
        self.examples += examples
        self.flops = None if flops is None or self.flops is None else self.flops + flops

    def forget_after(self, step: int) -> None:
        """Takes steps after `step` out of the losses; the other sums are only rates."""
        kept = [entry for entry in self.steps if entry[0] <= step]
        if len(kept) < len(self.steps):
            self.steps, self.loss, self.units = kept, None, sum(units for _, _, units in kept)
            for _, loss, _ in kept:
                self.loss = loss if self.loss is None else self.loss + loss

    def step_losses(self, accelerator: Accelerator) -> list[tuple[int, float]]:
        """Step and loss in nats per supervised token of each step, over all ranks; waits for the device."""
        if not self.steps:
            return []
        sums = summed(accelerator, torch.stack([loss for _, loss, _ in self.steps])).tolist()
        return [(step, total / max(1, units)) for (step, _, units), total in zip(self.steps, sums, strict=True)]

    @property
    def seconds(self) -> float:
        """Training time so far; true on an asynchronous device right after `mean_loss`."""
        return max(1e-9, time.monotonic() - self._started - self.paused)

    def mean_loss(self, accelerator: Accelerator) -> float:
        """Nats per supervised token over all ranks; waits for the device."""
        if self.loss is None:
            return float("nan")
        return float(summed(accelerator, self.loss.clone())) / max(1, self.units)
