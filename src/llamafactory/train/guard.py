"""Stops a step whose loss or gradient is not finite before it reaches the weights, and notices losses that jump.

On a CPU the numbers are looked at where they are. On a GPU a look would wait for the device in every step, so that the
fused AdamW is given a flag on the device that makes it leave the weights alone from the first bad step on; the host
reads that flag one step later, when the answer is already there. Other optimizers, and `on_nan: skip:N`, wait.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llamafactory.model.shards import whole_value

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer


class NotFiniteError(Exception):
    """A step's loss or gradient is NaN or infinite, and was not applied.

    Attributes:
        step: 0-based number of the step: the weights are those after `step` steps.
    """

    def __init__(self, step: int) -> None:
        """Keeps the step."""
        self.step = step
        super().__init__(f"step {step + 1} is not finite")


class StepGuard:
    """Decides for each step whether the optimizer may take it.

    Attributes:
        num_skipped: steps that were left out so far.
    """

    def __init__(
        self, accelerator: Accelerator, optimizer: Optimizer, *, max_skipped: int, num_skipped: int = 0
    ) -> None:
        """Prepares a flag on the device, where the optimizer can use one.

        Args:
            accelerator: of the run.
            optimizer: the prepared one.
            max_skipped: bad steps that are left out before the run stops; 0 stops at the first.
            num_skipped: left out before (resume).
        """
        self.num_skipped = num_skipped
        self._max_skipped = max_skipped
        self._has_scaler = accelerator.scaler is not None
        self._is_alone = accelerator.num_processes == 1
        self._raw: Any = getattr(optimizer, "optimizer", optimizer)
        is_fused = isinstance(self._raw, torch.optim.AdamW) and bool(self._raw.defaults.get("fused"))
        gates = is_fused and accelerator.device.type == "cuda" and not self._has_scaler and max_skipped == 0
        self._flag = torch.zeros((), device=accelerator.device) if gates else None
        self._pending: deque[tuple[int, Tensor, Any]] = deque()

    def admits(self, step: int, loss: Tensor, norm: Tensor | None, module: nn.Module) -> bool:
        """Whether step `step` may be taken; on a GPU the optimizer itself leaves a bad one out.

        Args:
            step: 0-based.
            loss: this rank's sum, a scalar on the device.
            norm: of the gradient of all ranks, before clipping; None has it computed here.
            module: whose gradient it is.

        Raises:
            NotFiniteError: this step, or on a GPU an earlier one, is not finite.
        """
        if self._has_scaler:
            value = loss.detach()  # loss scaling makes infinite gradients, and leaves such steps out itself
        else:
            value = _norm(module) if norm is None else norm.detach()
            if self._is_alone:
                value = value + loss.detach()  # other ranks only see the norm, and all must decide alike
        if self._flag is None:
            return self._decide(step, bool(torch.isfinite(value)))
        self._flag = torch.maximum(self._flag, (~torch.isfinite(value)).to(self._flag.dtype))
        self._raw.found_inf = self._flag
        on_host = torch.empty((), dtype=self._flag.dtype, pin_memory=True)
        on_host.copy_(self._flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((step, on_host, event))
        self.settle(leave=1)
        return True

    def _decide(self, step: int, is_finite: bool) -> bool:
        if is_finite:
            return True
        if self.num_skipped >= self._max_skipped:
            raise NotFiniteError(step)  # it is not left out, but tried again by a run that goes on from here
        self.num_skipped += 1
        return False

    def settle(self, leave: int = 0) -> None:
        """Waits for the answers of all steps but the last `leave`.

        Raises:
            NotFiniteError: one of them was not finite; it and all later ones were left out.
        """
        while len(self._pending) > leave:
            step, flag, event = self._pending.popleft()
            event.synchronize()
            if flag.item():
                self._pending.clear()
                raise NotFiniteError(step)


def _norm(module: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return whole_value(torch.nn.utils.get_total_norm(gradients)) if gradients else torch.zeros(())


def poison(module: nn.Module) -> None:
    """Makes a gradient NaN, for the failpoint `nan`."""
    gradient = next(parameter.grad for parameter in module.parameters() if parameter.grad is not None)
    gradient.fill_(float("nan"))


class SpikeWatch:
    """Notices single steps whose loss is far above that of the steps before."""

    def __init__(self, window: int = 64, least: int = 16) -> None:
        """Remembers the last `window` losses, and says nothing before it has seen `least`."""
        self._seen: deque[float] = deque(maxlen=window)
        self._least = least

    def look(self, losses: list[tuple[int, float]]) -> list[tuple[int, float, float]]:
        """Takes the losses of finished steps.

        Args:
            losses: step and loss in nats per supervised token, in order.

        Returns:
            Step, loss, and usual loss (median) of each jump: at least half as much again as usual, and further from
            it than eight times the usual spread.
        """
        found: list[tuple[int, float, float]] = []
        for step, loss in losses:
            if len(self._seen) >= self._least:
                usual = statistics.median(self._seen)
                spread = statistics.median(abs(value - usual) for value in self._seen)
                if loss > 1.5 * usual and loss - usual > 8 * 1.4826 * spread:
                    found.append((step, loss, usual))
            self._seen.append(loss)
        return found
