"""Faults on demand, for tests: `LLAMAFACTORY_FAILPOINT=name:nth:action` makes the nth visit of a place go wrong.

Several are joined with commas: `save.file:3:kill,step:7:nan`. Actions: `kill` (SIGKILL to this process), `enospc`
and `eio` (the OSError of a full or broken disk), `sleep` or `sleep=SECONDS`, and `nan`, which the place carries out.
The nth visit counts from 1; `*` means every visit. A fault says so on standard error before it acts, so that a test
knows that it came. Without the variable a visit costs one look into a mapping.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter

VARIABLE = "LLAMAFACTORY_FAILPOINT"
NAMES = (
    "data", "load", "step", "micro", "eval", "predict", "sample", "final", "log", "reference",
    "tokens.read", "tokens.write",
    "save.start", "save.shards", "save.file", "save.manifest", "save.rename", "save.done", "save.prune",
)  # fmt: skip
"""The places there are."""
ACTIONS = ("kill", "enospc", "eio", "sleep", "nan")
_NAP_SECONDS = 5.0
_visits: Counter[str] = Counter()


def visit(name: str) -> bool:
    """Passes a place where something may be made to go wrong.

    Args:
        name: one of `NAMES`.

    Returns:
        Whether the place shall make its numbers NaN.

    Raises:
        OSError: the fault that was asked for.
        ValueError: the environment variable cannot be read.
    """
    if VARIABLE not in os.environ:
        return False
    _visits[name] += 1
    for place, nth, action in _read(os.environ[VARIABLE]):
        if place == name and nth in (0, _visits[name]):
            _say(f"failpoint {name}:{nth or '*'}:{action}")
            return _act(action)
    return False


def _say(line: str) -> None:
    try:
        os.write(2, f"{line}\n".encode())
    except OSError:  # nobody reads it
        pass


def _act(action: str) -> bool:
    kind, _, argument = action.partition("=")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    if kind in ("enospc", "eio"):
        number = errno.ENOSPC if kind == "enospc" else errno.EIO
        raise OSError(number, os.strerror(number))
    if kind == "sleep":
        time.sleep(float(argument or _NAP_SECONDS))
    return kind == "nan"


def _read(text: str) -> list[tuple[str, int, str]]:
    found: list[tuple[str, int, str]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        place, _, rest = part.partition(":")
        nth, _, action = rest.partition(":")
        is_known = place in NAMES and action.partition("=")[0] in ACTIONS
        if not is_known or not (nth == "*" or (nth.isdigit() and int(nth) > 0)):
            raise ValueError(
                f"{VARIABLE}={part!r}: want NAME:NTH:ACTION with a name of {', '.join(NAMES)}, an NTH from 1 up or *, "
                f"and an action of {', '.join(ACTIONS)}"
            )
        found.append((place, 0 if nth == "*" else int(nth), action))
    return found
