"""What the command that starts several processes and those processes know of each other.

Each process tells how it ended, in a line of a file whose name stands in the environment; of these lines the launcher
makes its exit code and its last line. The launcher holds a lock on that file, so that a process sees within a second
that nobody waits for it any more, and stops as after SIGTERM. Without the variable all of this does nothing.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llamafactory.extras import log

if os.name == "posix":
    import fcntl
else:
    fcntl = None

VARIABLE = "LLAMAFACTORY_ENDINGS"
POLL_SECONDS = 1.0
LAST_RESORT_SECONDS = 60.0
"""How long a process that nobody waits for may be deaf: in a call that never returns to Python."""
_LOCKED = b"locked\n"
"""First line of the file where the system has locks."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a process has told.

    Attributes:
        pid: of the process.
        rank: of the process among all.
        code: that it ends with; None: it has begun.
        line: its last line.
    """

    pid: int
    rank: int
    code: int | None
    line: str


@contextmanager
def endings_file() -> Iterator[Path]:
    """A file for what child processes tell, locked as long as this process lives."""
    descriptor, name = tempfile.mkstemp(prefix="llamafactory-", suffix=".jsonl")
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.write(descriptor, _LOCKED)
            except OSError as error:
                log.debug(f"no file locks in {name}: {error}")
        yield Path(name)
    finally:
        os.close(descriptor)
        Path(name).unlink(missing_ok=True)


def read_told(path: Path) -> list[Told]:
    """What the processes told, the first one first; lines that are not whole are passed over."""
    found: list[Told] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(Told(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def still_running(told: Sequence[Told]) -> list[int]:
    """Processes that have begun, have not said how they end, and are there."""
    ended = {one.pid for one in told if one.code is not None}
    return [one.pid for one in told if one.code is None and one.pid not in ended and _is_there(one.pid)]


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def tell(code: int | None, line: str = "") -> None:
    """Says that this process has begun, or how it ends; never raises."""
    name = os.environ.get(VARIABLE)
    if not name:
        return
    words = {"pid": os.getpid(), "rank": int(os.environ.get("RANK") or 0), "code": code, "line": line}
    try:
        descriptor = os.open(name, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, (json.dumps(words) + "\n").encode())
        finally:
            os.close(descriptor)
    except OSError:  # the launcher is gone
        pass


def stop_with_parent(has_heard: Callable[[], bool]) -> None:
    """Says that this process has begun. From now on it is told to stop where torchrun, or the launcher, has died.

    Args:
        has_heard: whether the signal was noticed; if it is not for long, the process is ended.
    """
    tell(None)
    descriptor = _locked_file()
    if descriptor is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    watch = threading.Thread(target=_watch, args=(os.getppid(), descriptor, has_heard), daemon=True)
    watch.name = "supervision"
    watch.start()


def _watch(parent: int, descriptor: int | None, has_heard: Callable[[], bool]) -> None:
    while os.getppid() == parent and not _is_free(descriptor):
        time.sleep(POLL_SECONDS)
    try:
        os.write(2, b"the launcher is gone: stopping, as after SIGTERM\n")
    except OSError:  # nobody reads it
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_RESORT_SECONDS)
    if not has_heard():
        os._exit(128 + signal.SIGTERM)


def _locked_file() -> int | None:
    """The launcher's file, where it holds a lock on it."""
    name = os.environ.get(VARIABLE)
    if not name or fcntl is None:
        return None
    try:
        descriptor = os.open(name, os.O_RDONLY)
    except OSError:
        return None
    if os.read(descriptor, len(_LOCKED)) == _LOCKED:
        return descriptor
    os.close(descriptor)
    return None


def _is_free(descriptor: int | None) -> bool:
    """Whether the launcher's lock has ended, as it does with its process."""
    if descriptor is None or fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
