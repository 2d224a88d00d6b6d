"""One optimizer step and one evaluation: the arithmetic of the loop, without its bookkeeping.

The gradient of a step is that of the sum of its losses divided by its global number of units, however the
step is split into micro-batches and ranks. No value is read back from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llamafactory.model.shards import whole_value
from llamafactory.train.metrics import Sums, summed

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llamafactory.data.batch import Batch
    from llamafactory.hparams.section import Section
    from llamafactory.train.feed import Window
    from llamafactory.train.noise import EmbeddingNoise
    from llamafactory.train.stage import LossOutput, Models, Stage


class StageModule(nn.Module):
    """A stage's loss as a module, so that DDP and FSDP see one forward for everything a step computes."""

    def __init__(self, stage: Stage, models: Models, options: Section, *, noise: EmbeddingNoise | None = None) -> None:
        """Holds the policy as a sub-module; the other models are only referred to."""
        super().__init__()
        self.policy = models.policy
        self._stage, self._models, self._options = stage, models, options
        self._noise = noise

    def forward(self, batch: Batch) -> LossOutput:
        """Computes the stage's loss on one batch."""
        if self._noise is not None:
            self._noise.expect(batch)
        return self._stage.loss(replace(self._models, policy=self.policy), batch, self._options)

    @property
    def prepares(self) -> bool:
        """Whether batches go through `prepare` before the first loss of their optimizer step."""
        return self._stage.prepares(self._options)

    def prepare(self, batch: Any) -> tuple[Tensor, Batch]:
        """Measures what the stage needs to know of the whole optimizer step; see `Stage.prepare`."""
        if self._stage.prepare is None:
            raise ValueError(f"stage {self._stage.name} has no prepare")
        with torch.no_grad():
            return self._stage.prepare(replace(self._models, policy=self.policy), batch, self._options)

    def forget_reference(self) -> None:
        """Lets go of the reference, whose log-probabilities come with the rows."""
        self._models = replace(self._models, reference=None)

    def summarise(self, averages: Mapping[str, float]) -> dict[str, float]:
        """Averages of a logged span of steps or of an evaluation as they are shown, with what follows from them."""
        more = {} if self._stage.summarise is None else self._stage.summarise(averages)
        return {name: value for name, value in {**averages, **more}.items() if not name.startswith("_")}


def accumulate(accelerator: Accelerator, module: nn.Module, window: Window) -> Sums:
    """Adds the gradient of a window to the parameters' `.grad`.

    Args:
        accelerator: of the run.
        module: the prepared `StageModule`.
        window: this rank's batches and the global number of units.

    Returns:
        The sums of this rank's losses and metrics, on the device.
    """
    scale = accelerator.num_processes / max(1, window.num_units)  # DDP averages over ranks
    sums = Sums(accelerator.device)
    batches = ready_batches(accelerator, module, window.batches)
    for place, batch in enumerate(batches, start=1):
        is_last = place == len(batches)
        with nullcontext() if is_last else accelerator.no_sync(module):
            output: LossOutput = module(batch)
            accelerator.backward(output.loss_sum * scale)
        sums.add(output)
    return sums


def ready_batches(accelerator: Accelerator, module: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    """The batches of one optimizer step on the device, with what their stage measures over the whole step."""
    stage: StageModule = accelerator.unwrap_model(module)
    moved = [batch.to(accelerator.device) for batch in batches]
    if not stage.prepares:
        return moved
    with accelerator.autocast():
        prepared = [stage.prepare(batch) for batch in moved]
    total = summed(accelerator, torch.stack([sums for sums, _ in prepared]).sum(dim=0))
    return [replace(cast("Any", batch), step_sums=total) for _, batch in prepared]


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
    norm = None if norm is None else whole_value(norm)
    is_taken = admits(norm)
    if is_taken:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, is_taken


@torch.no_grad()
def evaluation_loss(
    accelerator: Accelerator, module: nn.Module, steps: Iterable[Sequence[Batch]]
) -> tuple[dict[str, float], int]:
    """Averages over all ranks' units. Memory does not grow with the number of batches.

    Args:
        accelerator: of the run.
        module: the prepared `StageModule`.
        steps: this rank's batches, those of one step together.

    Returns:
        The mean loss per unit under `loss`, the stage's metrics under their names, and how many supervised tokens.
    """
    was_training = module.training
    module.eval()
    sums = Sums(accelerator.device)
    num_targets = 0
    for batches in steps:
        for batch in ready_batches(accelerator, module, batches):
            output: LossOutput = module(batch)
            sums.add(output)
            num_targets += batch.num_targets if output.num_units else 0  # else it only keeps ranks in step
    module.train(was_training)
    counts = summed(accelerator, torch.tensor([sums.num_units, num_targets], device=accelerator.device))
    units, num_targets = counts.tolist()
    averages = sums.averages(accelerator)
    loss = float(summed(accelerator, sums.loss.clone())) / units if units else float("nan")
    return accelerator.unwrap_model(module).summarise({"loss": loss, **averages}), num_targets
