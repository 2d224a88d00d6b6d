"""Asks a run to stop: the first SIGINT, SIGTERM or SIGUSR1 saves and stops, the second one stops at once.

Handlers do almost nothing. Before the training loop there is nothing to save, so a signal ends the run there and then;
inside the loop it sets a flag, and the main thread saves at the next micro-batch. Once the last line is said, a signal
changes nothing: the exit code is that of the line. SIGHUP is ignored: a closed terminal does not stop a run.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

from llamafactory.extras import log
from llamafactory.extras.supervision import tell

EXIT_NOT_SAVED = 74
"""EX_IOERR."""
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
_ECHO_SECONDS = 2.0
"""torchrun passes on a signal that its children already have; what comes so soon is no second wish."""


class StopSignal(BaseException):
    """Unwinds whatever runs; `number` is that of the signal."""

    def __init__(self, number: int) -> None:
        """Keeps the signal's number."""
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for the others."""
        return exit_code_of(self.number)


def exit_code_of(number: int) -> int:
    """130 for SIGINT; 143 for SIGTERM and for SIGUSR1, by which schedulers announce it."""
    return 130 if number == signal.SIGINT else 143


class StopRequest:
    """While active, `signal` holds the number of the signal that asked to stop, or 0.

    Entered inside of another one it shares that one's state, so that a command, a run and a loop may each ask for it.
    """

    _active: StopRequest | None = None

    def __init__(self, grace: float = 30.0) -> None:
        """Nothing is installed before `with`.

        Args:
            grace: seconds from the signal until the save must have begun.
        """
        self.signal = 0
        self.grace = grace
        self._previous: dict[int, object] = {}
        self._is_deferred = self._is_saving = False
        self._end_code: int | None = None
        self._since = 0.0
        self._timer: threading.Timer | None = None

    def __enter__(self) -> StopRequest:
        """Installs the handlers, where this is the main thread (only it may)."""
        outer = StopRequest._active
        if outer is not None:
            outer.grace = self.grace
            return outer
        if threading.current_thread() is threading.main_thread():
            StopRequest._active = self
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
            if hasattr(signal, "SIGHUP"):
                self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Puts the old handlers back."""
        if StopRequest._active is not self:
            return
        self.in_time()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        StopRequest._active = None

    def defer(self) -> None:
        """From now on a signal only sets the flag: there is something to save.

        Raises:
            StopSignal: the flag is set already.
        """
        self.check()
        self._is_deferred = True

    def check(self) -> None:
        """Raises: StopSignal where a signal has asked to stop."""
        if self.signal:
            raise StopSignal(self.signal)

    def in_time(self) -> None:
        """Says that the last save has begun: from here the disk decides how long it takes, whatever signal follows."""
        self._is_saving = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def over(self, exit_code: int) -> None:
        """Says that the last line is said: one signal more changes nothing, two end the process with `exit_code`."""
        self.in_time()
        self.signal, self._end_code = 0, exit_code

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._end_code is not None:
            if self.signal:
                _end(self._end_code)
            self.signal = number
            return
        if self.signal:
            if "LOCAL_RANK" in os.environ and time.monotonic() - self._since < _ECHO_SECONDS:
                return
            _end(exit_code_of(number), f"stopped at once by a second {signal.Signals(number).name}: nothing was saved")
            return
        self.signal, self._since = number, time.monotonic()
        if not self._is_saving:
            self._timer = threading.Timer(self.grace, self._too_late)
            self._timer.daemon = True
            self._timer.start()
        if not self._is_deferred:
            raise StopSignal(number)
        log.warn(f"{signal.Signals(number).name}: saving, then stopping (once more stops at once, without saving)")

    def _too_late(self) -> None:
        import faulthandler

        faulthandler.dump_traceback(all_threads=True)
        if not self._is_deferred:
            _end(exit_code_of(self.signal), f"stopped by {signal.Signals(self.signal).name} before the first step")
        _end(EXIT_NOT_SAVED, f"error: no save within save_grace ({self.grace:g} s); the checkpoint before is whole")


def ignore_signals() -> None:
    """What comes while the interpreter of a finished run shuts down shall not change its exit code."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(code: int, line: str = "") -> None:
    """Ends the process where it stands. Files that are half written lie in a staging folder, which nobody reads."""
    tell(code, line)
    try:
        os.write(2, f"{line}\n".encode() if line else b"")
    except OSError:
        pass
    sys.stderr = None
    os._exit(code)
