"""`run.lock`: one run at a time in an output folder, whatever ended the one before.

On one machine the operating system's file lock decides: it ends with its process, so that a crash never leaves a
folder locked. Between machines that share a disk, the holder touches the file every few seconds; one that stays
untouched is taken over. The file says who holds it: host, pid, boot id, start time.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from llamafactory.extras import log
from llamafactory.extras.errors import ConfigError, Problem

if os.name == "posix":
    import fcntl
else:
    fcntl = None

LOCK_FILE = "run.lock"
TOUCH_SECONDS = 10.0
LOOK_SECONDS = 0.3
"""A lock that goes away within so long was only looked at."""
SILENT_SECONDS = 60.0
"""A lock of another machine that was not touched for so long is stale."""
WATCHED_SECONDS = 2.5 * TOUCH_SECONDS
"""At least so long it is watched before it is taken over: its age depends on clocks, which may have jumped."""


class RunLock:
    """The right to write into an output folder; held from `take` to `release`, or to the end of the process."""

    def __init__(self, output_dir: Path) -> None:
        """Nothing is locked yet."""
        self._path = output_dir / LOCK_FILE
        self._descriptor: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        """Takes the lock."""
        return self.take()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Releases the lock."""
        self.release()

    def take(self) -> RunLock:
        """Takes the lock, or says who holds it.

        Raises:
            ConfigError: another run is using the folder, or it cannot be locked.
        """
        try:
            descriptor, holder = self._open_locked()
        except OSError as error:
            raise _locked_out(self._path, error) from error
        try:
            if holder and not _is_here(holder):
                self._wait_for_silence(holder)
            elif holder and fcntl is None and _is_alive(holder.get("pid")):
                raise _taken(self._path, holder)
        except BaseException:
            os.close(descriptor)
            raise
        if holder:
            log.note(f"{self._path} is left over from pid {holder.get('pid')} on {holder.get('host')}: taken over")
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, (json.dumps(_this_process()) + "\n").encode(), 0)
        except OSError as error:  # a full disk; the lock itself needs no room
            log.warn(f"{self._path} cannot say who holds it: {error.strerror}")
        self._descriptor = descriptor
        self._thread = threading.Thread(target=self._touch, args=(descriptor,), name="run.lock", daemon=True)
        self._thread.start()
        return self

    def _open_locked(self) -> tuple[int, dict[str, Any]]:
        """The lock file, locked, and who held it before.

        One who looks (`is_held`) locks for a moment too, so that the first refusal does not count. A file that its
        holder removed meanwhile is no lock any more: another process would make a new one beside it.

        Raises:
            ConfigError: another run is using the folder.
            OSError: the file cannot be opened.
        """
        until = time.monotonic() + LOOK_SECONDS
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            holder = read_holder(self._path)
            if _lock(descriptor):
                if _is_same_file(descriptor, self._path):
                    return descriptor, holder
            elif time.monotonic() > until:
                os.close(descriptor)
                raise _taken(self._path, holder)
            os.close(descriptor)
            time.sleep(0.02)

    def release(self) -> None:
        """Gives the folder free; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join(1.0)  # before the descriptor may name another file
        try:
            os.ftruncate(descriptor, 0)
            self._path.unlink(missing_ok=True)
        except OSError as error:
            log.debug(f"{self._path} cannot be removed: {error}")
        os.close(descriptor)

    def _touch(self, descriptor: int) -> None:
        while not self._stop.wait(TOUCH_SECONDS):
            try:
                os.utime(descriptor)
            except OSError:
                return

    def _wait_for_silence(self, holder: dict[str, Any]) -> None:
        """Waits as long as the lock of another machine may still be touched; how long is measured on this one.

        Raises:
            ConfigError: it was.
        """
        first = self._path.stat().st_mtime
        probe = self._path.with_name(f".{LOCK_FILE}-{os.getpid()}")
        probe.touch()  # the clock of the disk, which may not be ours
        age = probe.stat().st_mtime - first
        probe.unlink()
        wait = min(max(SILENT_SECONDS - age, WATCHED_SECONDS), SILENT_SECONDS)
        log.info(f"{self._path} is held by {_describe(holder)}: waiting up to {wait:.0f} s for a sign of life")
        until = time.monotonic() + wait
        while time.monotonic() < until:
            time.sleep(0.5)
            if self._path.stat().st_mtime != first:
                raise _taken(self._path, holder)


def read_holder(path: Path) -> dict[str, Any]:
    """Who holds a lock file; empty where nobody does."""
    try:
        found = json.loads(path.read_text(encoding="utf-8") or "{}")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_held(output_dir: Path) -> bool | None:
    """Whether a run is using the folder now; None where only another machine knows."""
    path = output_dir / LOCK_FILE
    holder = read_holder(path)
    if not holder:
        return False
    try:
        if not _is_here(holder):
            return True if abs(time.time() - path.stat().st_mtime) < SILENT_SECONDS else None
        if fcntl is None:
            return _is_alive(holder.get("pid"))
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # released meanwhile
        return False
    try:
        return not _lock(descriptor, shared=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, shared: bool = False) -> bool:
    """Takes the system's lock; True also where the file system has none."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.debug(f"no file locks here: {error}")
    return True


def _this_process() -> dict[str, Any]:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "boot_id": boot_id(), "started": started}


def boot_id() -> str:
    """A name for this start of this machine's system; the host's name where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether the holder runs, or ran, on this machine, so that the system's lock speaks for it."""
    return holder.get("boot_id") == boot_id() or holder.get("host") == socket.gethostname()


def _is_alive(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Whether the path still names the open file; True where the system cannot say."""
    ours = os.fstat(descriptor)
    try:
        return os.path.samestat(ours, path.stat()) if ours.st_ino else True
    except FileNotFoundError:
        return False


def _describe(holder: dict[str, Any]) -> str:
    return f"pid {holder.get('pid')} on {holder.get('host')}, started {holder.get('started')}"


def _locked_out(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        Problem(
            key="output_dir",
            given=str(path.parent),
            message=f"{path.name} cannot be opened: {error.strerror or error}",
            fix="give a folder that this user may write to; remove run.lock where it is no file of a run",
        )
    )


def _taken(path: Path, holder: dict[str, Any]) -> ConfigError:
    who = _describe(holder) if holder else "a process that has not said its name yet"
    return ConfigError(
        Problem(
            key="output_dir",
            given=str(path.parent),
            message=f"another run is using this folder: {who}",
            fix="wait for it or stop it, or choose another output_dir",
        )
    )
