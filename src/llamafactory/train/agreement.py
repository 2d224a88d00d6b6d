"""What several processes must decide alike: whether any of them was told to stop, and where they ask each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from llamafactory.extras.errors import SaveAndStopError
from llamafactory.train.metrics import summed

if TYPE_CHECKING:
    from accelerate import Accelerator

FAILED = 1 << 10
"""What a process says instead of a signal where its work failed and what the run has so far is sound."""
MadeT = TypeVar("MadeT")
ASK_SECONDS = 1.0
"""How often processes ask each other, about."""
_MOST_BETWEEN = 16
"""Micro-batches after which they ask at the latest: the next ones may take far longer than those before."""


class Turns:
    """Counts micro-batches, and asks all processes at some of them, the same ones in each."""

    def __init__(self, accelerator: Accelerator) -> None:
        """The first micro-batch asks."""
        self._accelerator = accelerator
        self._left = self._between = 1
        self._since = time.monotonic()

    def ask(self, signal: int) -> int:
        """Passes one micro-batch.

        Args:
            signal: what this process was told, or 0.

        Returns:
            The signal that any process got, or 0 where none did or this is no micro-batch to ask at.
        """
        if self._accelerator.num_processes == 1:
            return signal
        self._left -= 1
        if self._left:
            return 0
        number, seconds = agree(self._accelerator, signal, time.monotonic() - self._since)
        wanted = int(ASK_SECONDS * self._between / max(seconds, 1e-3))
        self._left = self._between = max(1, min(wanted, 2 * self._between, _MOST_BETWEEN))
        self._since = time.monotonic()
        return number


def agree(accelerator: Accelerator, signal: int, seconds: float = 0.0) -> tuple[int, float]:
    """The largest signal number and the longest time of all processes, which must ask together."""
    if accelerator.num_processes == 1:
        return signal, seconds
    told = torch.zeros(accelerator.num_processes, 2, dtype=torch.float32, device=accelerator.device)
    told[accelerator.process_index] = torch.tensor([float(signal), seconds])
    number, longest = summed(accelerator, told).max(dim=0).values.tolist()
    return int(number), longest


def fault_of_all(accelerator: Accelerator, fault: SaveAndStopError | None) -> SaveAndStopError:
    """The error of the first process that has one; every process must ask, and each raises it.

    Args:
        accelerator: of the run.
        fault: of this process, or None.
    """
    if accelerator.num_processes == 1 and fault is not None:
        return fault
    from accelerate.utils import gather_object

    texts: list[str | None] = gather_object([None if fault is None else str(fault)])
    rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
    return SaveAndStopError(f"rank {rank}: {text}")


def together(accelerator: Accelerator, work: Callable[[], MadeT]) -> MadeT:
    """What `work` makes in this process; where the disk fails one process, no process goes on without it.

    Raises:
        OSError: here or in another process.
    """
    try:
        made = work()
    except OSError:
        agree(accelerator, 1)
        raise
    if agree(accelerator, 0)[0]:
        raise OSError("another process could not read or write")
    return made
