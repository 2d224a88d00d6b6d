"""One optimizer step and one evaluation: the arithmetic of the loop, without its bookkeeping.

The gradient of a step is that of the sum of its losses divided by its global number of supervised tokens, however the
step is split into micro-batches and ranks. No value is read back from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llamafactory.data.batch import Batch
    from llamafactory.hparams.section import Section
    from llamafactory.train.feed import Window
    from llamafactory.train.stage import LossOutput, Models, Stage


class StageModule(nn.Module):
    """A stage's loss as a module, so that DDP and FSDP see one forward for everything a step computes."""

    def __init__(self, stage: Stage, models: Models, options: Section) -> None:
        """Holds the policy as a sub-module; the other models are only referred to."""
        super().__init__()
        self.policy = models.policy
        self._stage, self._models, self._options = stage, models, options

    def forward(self, batch: Batch) -> LossOutput:
        """Computes the stage's loss on one batch."""
        return self._stage.loss(replace(self._models, policy=self.policy), batch, self._options)


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """Sums of one optimizer step, on the device.

    Attributes:
        loss_sum: of this rank's batches.
        num_units: supervised tokens of all ranks.
        grad_norm: global norm before clipping, or None where clipping is off.
    """

    loss_sum: Tensor
    num_units: int
    grad_norm: Tensor | None


def accumulate(accelerator: Accelerator, module: nn.Module, window: Window) -> Tensor:
    """Adds the gradient of a window to the parameters' `.grad`.

    Args:
        accelerator: of the run.
        module: the prepared `StageModule`.
        window: this rank's batches and the global number of supervised tokens.

    Returns:
        The sum of this rank's losses, a scalar on the device.
    """
    scale = accelerator.num_processes / max(1, window.num_units)  # DDP averages over ranks
    total = torch.zeros((), device=accelerator.device)
    for place, batch in enumerate(window.batches, start=1):
        is_last = place == len(window.batches)
        with nullcontext() if is_last else accelerator.no_sync(module):
            output: LossOutput = module(batch.to(accelerator.device))
            accelerator.backward(output.loss_sum * scale)
        total += output.loss_sum.detach()
    return total


def apply_gradient(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    clip: float,
    *,
    admits: Callable[[Tensor | None], bool] = lambda norm: True,
) -> tuple[Tensor | None, bool]:
    """Clips, steps and clears the gradient.

    Args:
        accelerator: of the run.
        module: the prepared module.
        optimizer: the prepared optimizer.
        clip: largest global gradient norm; 0 or less does not clip.
        admits: gets the norm before clipping, and says whether the step is taken.

    Returns:
        The norm before clipping, on the device, or None; and whether the step was taken.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    norm = accelerator.clip_grad_norm_(parameters, clip) if clip > 0 else None
    is_taken = admits(norm)
    if is_taken:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, is_taken


def summed(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; waits for them."""
    return cast("Tensor", accelerator.reduce(tensor, reduction="sum"))


@torch.no_grad()
def evaluation_loss(accelerator: Accelerator, module: nn.Module, batches: Iterable[Batch]) -> tuple[float, int]:
    """Mean loss over all ranks' supervised tokens. Memory does not grow with the number of batches.

    Returns:
        The mean in nats per supervised token, and their number.
    """
    was_training = module.training
    module.eval()
    sums = torch.zeros(
        2, dtype=torch.float64, device="cpu" if accelerator.device.type == "mps" else accelerator.device
    )
    for batch in batches:
        output: LossOutput = module(batch.to(accelerator.device))
        sums[0] += output.loss_sum
        sums[1] += output.num_units
    module.train(was_training)
    total, units = summed(accelerator, sums).tolist()
    return (total / units if units else float("nan")), int(units)
