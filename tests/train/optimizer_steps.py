"""Steps of an optimizer for tests of its state, whatever it optimizes."""

from __future__ import annotations

import torch
from torch.optim import Optimizer


def take_steps(optimizer: Optimizer, count: int) -> None:
    """Takes `count` steps with random gradients, which the global generator draws."""
    for _ in range(count):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
