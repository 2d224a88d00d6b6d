"""The day that chat templates write into prompts: one for a whole run, also where it goes on on another day."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime

_fixed: list[date] = []
"""Of the process, not of a thread: rows are rendered in several."""


def today() -> date:
    """The fixed day, or that of the clock."""
    return _fixed[-1] if _fixed else date.today()


def now() -> datetime:
    """The time of the clock, on the fixed day."""
    return datetime.combine(today(), datetime.now().time())


@contextmanager
def fixed_day(day: date) -> Iterator[None]:
    """Every template writes this day while the block lasts."""
    _fixed.append(day)
    try:
        yield
    finally:
        _fixed.pop()
