"""Where the time between the start of a run and the end of its first step goes, in parts.

A clock that each phase reports to; it changes nothing. A phase ends when the next mark is made, so that the parts add
up to the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class StartUp:
    """The phases of a start, in order.

    Attributes:
        clock: seconds, from anywhere.
        seconds: name of a finished phase -> its seconds.
    """

    clock: Callable[[], float] = time.monotonic
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    _marks: list[float] = field(default_factory=list[float])

    def __post_init__(self) -> None:
        """Starts the first phase."""
        self._marks.append(self.clock())

    def ended(self, phase: str) -> None:
        """Ends a phase, and begins the next one."""
        now = self.clock()
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + now - self._marks[-1], 3)
        self._marks.append(now)

    @property
    def total(self) -> float:
        """Seconds from the start to the end of the last phase."""
        return round(self._marks[-1] - self._marks[0], 3)

    def line(self) -> str:
        """One line for people."""
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"first step done after {self.total:.1f} s: {parts}"

    def to_dict(self) -> dict[str, float]:
        """The parts and their sum in seconds, for `run.json`."""
        return {**self.seconds, "total": self.total}
