"""Ends all processes of a run where one of them has stopped, and says which one and where it was.

A process that is stopped or dead cannot speak, so that each one says every second how it is doing: a thread writes a
counter and the line that its main thread is in to the key-value store through which the processes found each other.
Who sees a counter stand still for `SILENT_POLLS` of its own seconds names that rank, ends it where it runs on the same
machine, and ends itself. A process that hangs in a step still counts on; the time-out of the collective ends it
(`ddp_timeout`). A signal to stop that only one process got reaches the others on the same way.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

from llamafactory.extras import log
from llamafactory.extras.supervision import tell
from llamafactory.train.run_lock import boot_id

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llamafactory.train.signals import StopRequest

SILENT_POLLS = 20
POLL_SECONDS = 1.0
EXIT_CODE = 1
_PREFIX = "llamafactory/heartbeat"


@contextmanager
def watching(
    accelerator: Accelerator, stop_request: StopRequest, on_end: Callable[[str], None]
) -> Iterator[Watchdog | None]:
    """Watches the other processes of a run while the block runs; alone it does nothing, and gives None.

    Args:
        accelerator: of the run.
        stop_request: of this process; a signal that it got is passed on.
        on_end: gets the reason before this process is ended, to write it down.
    """
    store = _connect() if accelerator.num_processes > 1 else None
    if store is None:
        yield None
        return
    stop = threading.Event()
    main = threading.main_thread().ident or 0
    dog = Watchdog(store, accelerator.process_index, accelerator.num_processes, main, stop_request, on_end)
    thread = threading.Thread(target=dog.run, args=(stop,), name="watchdog", daemon=True)
    thread.start()
    try:
        yield dog
    finally:
        dog.say(is_done=True)
        stop.set()
        thread.join(2 * POLL_SECONDS)


def _connect() -> Any:
    """A connection of its own to the launcher's store, or None where there is none to be reached."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    except (KeyError, ValueError, RuntimeError) as error:
        log.debug(f"no watchdog: {error}")
        return None


class Watchdog:
    """One process's view of all others.

    Attributes:
        doing: says which step this process is in, and its rows.
    """

    def __init__(
        self, store: Any, rank: int, world: int, main: int, stop_request: StopRequest, on_end: Callable[[str], None]
    ) -> None:
        """Nothing is said yet.

        Args:
            store: with `set`, `get` and `check`, shared by all.
            rank: of this process.
            world: how many there are.
            main: ident of the thread that works.
            stop_request: of this process.
            on_end: see `watching`.
        """
        self._store, self._rank, self._world, self._main, self._on_end = store, rank, world, main, on_end
        self._stop_request = stop_request
        self.doing: Callable[[], str] = lambda: ""
        self._count = 0
        self._lock = threading.Lock()
        self._seen: dict[int, tuple[int, int]] = {}  # rank -> its counter, and our polls since it moved

    def run(self, stop: threading.Event) -> None:
        """Speaks and listens until `stop` is set; at once, because who never spoke cannot fall silent."""
        while True:
            try:
                self.say()
                silent = self.silent_rank()
            except RuntimeError as error:
                log.debug(f"the watchdog lost the store: {error}")
                return
            if silent is not None and not stop.is_set():
                self._end(silent)
            if stop.wait(POLL_SECONDS):
                return

    def say(self, *, is_done: bool = False) -> None:
        """Writes this rank's sign of life."""
        with self._lock:
            self._count += 1
            beat = {"count": self._count, "done": is_done, "pid": os.getpid(), "host": socket.gethostname(),
                    "boot_id": boot_id(), "pids": _pid_space(), "signal": self._stop_request.signal,
                    "line": where(self._frame())}  # fmt: skip
            try:
                self._store.set(f"{_PREFIX}/{self._rank}", json.dumps(beat))
            except RuntimeError:
                if not is_done:
                    raise

    def silent_rank(self) -> dict[str, Any] | None:
        """Hears all others.

        Returns:
            The last sign of life of a rank that has given none for too long, or None.
        """
        for rank in range(self._world):
            key = f"{_PREFIX}/{rank}"
            if rank == self._rank or not self._store.check([key]):
                continue
            beat = json.loads(self._store.get(key))
            if beat["signal"] and not self._stop_request.signal and not beat["done"]:
                os.kill(os.getpid(), beat["signal"])  # as if this process had got it too
            count, polls = self._seen.get(rank, (-1, 0))
            self._seen[rank] = (beat["count"], polls + 1 if beat["count"] == count else 0)
            if self._seen[rank][1] >= SILENT_POLLS and not beat["done"]:
                return {"rank": rank, **beat}
        return None

    def _frame(self) -> FrameType | None:
        """Where the main thread is now."""
        return sys._current_frames().get(self._main)  # pyright: ignore[reportPrivateUsage]

    def _end(self, beat: dict[str, Any]) -> None:
        here = where(self._frame())
        who = f"rank {beat['rank']} (pid {beat['pid']} on {beat['host']})"
        last = f"has given no sign of life for {SILENT_POLLS * POLL_SECONDS:.0f} s; it was at {beat['line']}"
        reason = f"{who} {last}. Rank {self._rank} was at {here}{self._said_to_be_doing()}"
        print(f"error: {reason}", file=sys.stderr, flush=True)
        frame = self._frame()
        if frame is not None:
            print("".join(traceback.format_stack(frame)), file=sys.stderr, flush=True)
        self._on_end(reason)  # only the first rank writes
        if (beat["boot_id"], beat["pids"]) == (boot_id(), _pid_space()) and hasattr(signal, "SIGKILL"):
            try:
                os.kill(beat["pid"], signal.SIGKILL)  # a stopped process hears nothing else
            except OSError:
                pass
        tell(EXIT_CODE, f"error: {reason}")
        time.sleep(0.5)
        os._exit(EXIT_CODE)

    def _said_to_be_doing(self) -> str:
        try:
            doing = self.doing()
        except Exception as error:  # the main thread is in the middle of something; that must not keep this one alive
            return f", in a step whose rows cannot be named ({type(error).__name__})"
        return f", in {doing}" if doing else ""


def _pid_space() -> str:
    """What the numbers of processes belong to: in another container the same number is another process."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def where(frame: FrameType | None) -> str:
    """The innermost line of this project in a stack, `file.py:12 in function`, and what it called."""
    inner = frame
    while frame is not None and "llamafactory" not in frame.f_code.co_filename:
        frame = frame.f_back
    frame = frame or inner
    if frame is None:
        return "an unknown line"
    place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"
    if inner is not None and inner is not frame:
        place += f" (calling {inner.f_code.co_name} of {os.path.basename(inner.f_code.co_filename)})"
    return place
