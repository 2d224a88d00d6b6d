"""Plain lines on stderr: what a person running a command should know.

Only the process of rank 0 speaks. `LLAMAFACTORY_VERBOSITY` (DEBUG, INFO, WARNING, ERROR) sets what is shown. Standard
output stays free for results.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LEVELS = {"DEBUG": 10, "INFO": 20, "WARN": 30, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
_said_once: set[str] = set()
_recordings: list[list[tuple[str, str]]] = []


def info(message: str, *, once: bool = False) -> None:
    """Say what is being done."""
    _say("INFO", "", message, once=once)


def note(message: str, *, once: bool = False) -> None:
    """Say something that the user may not expect, but that needs no action."""
    _say("INFO", "note: ", message, once=once)


def warn(message: str, *, once: bool = False) -> None:
    """Say that something is probably not what the user wants."""
    _say("WARNING", "warning: ", message, once=once)


def debug(message: str) -> None:
    """Say something that only helps to find a fault."""
    _say("DEBUG", "debug: ", message, once=False)


@contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """Collects what is said inside with `once=True`, as (kind, message), whether or not it is shown.

    Whoever keeps the result of work can keep its warnings with it, and repeat them with `repeat`.
    """
    said: list[tuple[str, str]] = []
    _recordings.append(said)
    try:
        yield said
    finally:
        _recordings.remove(said)


def repeat(kind: str, message: str) -> None:
    """Says what `recording` collected, unless it was said before."""
    {"info": info, "note": note, "warning": warn}[kind](message, once=True)


def is_main_process() -> bool:
    """Whether this process has global rank 0; true where no launcher set a rank."""
    return (os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0") in {"0", "-1"}


def _say(level: str, prefix: str, message: str, *, once: bool) -> None:
    for said in _recordings if once else ():
        entry = (prefix.removesuffix(": ") or "info", message)
        if entry not in said:
            said.append(entry)
    threshold = _LEVELS.get(os.environ.get("LLAMAFACTORY_VERBOSITY", "INFO").upper(), 20)
    if _LEVELS[level] < threshold or not is_main_process():
        return
    if once:
        if message in _said_once:
            return
        _said_once.add(message)
    try:
        print(prefix + message.replace("\n", "\n" + " " * len(prefix)), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        go_silent()


def go_silent() -> None:
    """Sends everything meant for people into nothing: the terminal or pipe is gone, and that must not stop a run."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    except OSError:
        pass
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  for the rest of the process
