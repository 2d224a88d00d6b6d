"""Asks a running loop to stop: the first Ctrl+C or SIGTERM sets a flag, the second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

from llamafactory.extras import log

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While active, `signal` holds the number of the signal that asked to stop, or 0.

    The handler only sets the flag; saving happens in the main thread, at the next place that asks.
    """

    def __init__(self) -> None:
        """Nothing is installed before `with`."""
        self.signal = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        """Installs the handlers, where this is the main thread (only it may)."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Puts the old handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        log.warn(f"{signal.Signals(number).name}: saving, then stopping (once more stops at once, without saving)")
