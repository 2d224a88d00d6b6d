"""What the cache folder of tokenised rows holds, and what of it can go. Removes nothing that it did not write."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from llamafactory.data.token_cache import LOCK, MANIFEST, TokenCache
from llamafactory.extras import log

LARGE = 20_000_000_000
"""Bytes of kept rows from which on a run that adds to them says so."""
_DAY = 86_400.0
_SHARDS = "[0-9]" * 6 + ".safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptRows:
    """One tokenised data set.

    Attributes:
        folder: where it lies.
        name: of the data set, when it was tokenised; empty where the work was not finished.
        use: `train` or `eval`; empty as above.
        num_bytes: of its files.
        last_used: seconds since 1970 at which a run made or read it last.
        is_complete: False where a run was stopped; the next one goes on from there.
    """

    folder: Path
    name: str
    use: str
    num_bytes: int
    last_used: float
    is_complete: bool


def find_kept(root: Path) -> list[KeptRows]:
    """All tokenised data sets in a cache folder, the one that was used last first."""
    kept: list[KeptRows] = []
    for lock in root.glob(f"*/{LOCK}"):
        folder = lock.parent
        with suppress(OSError):  # it may go while we look
            manifest = TokenCache(folder=folder, parts={}).manifest() or {}
            if not manifest and ((folder / MANIFEST).exists() or not any(folder.glob(_SHARDS))):
                continue  # another program's lock, or nothing to keep yet
            stats = [path.stat() for path in _own_files(folder)]
            one = KeptRows(
                folder=folder,
                name=str(manifest.get("name", "")),
                use=str(manifest.get("use", "")),
                num_bytes=sum(stat.st_size for stat in stats),
                last_used=max(stat.st_mtime for stat in stats),
                is_complete=bool(manifest),
            )
            kept.append(one)
    return sorted(kept, key=lambda one: (-one.last_used, one.folder))


def note_size(root: Path, most: int = LARGE) -> None:
    """Says once where more than `most` bytes are kept, and how to have less; a run removes nothing by itself."""
    size = sum(one.num_bytes for one in find_kept(root))
    if size > most:
        command = f"llamafactory-cli data cache prune --max-gb {most / 1e9:g} --folder {shlex.quote(str(root))}"
        text = f"tokenised rows that are kept take {size / 1e9:,.1f} GB in {root}; {command} removes the oldest"
        log.note(text, once=True)


def choose_unneeded(
    kept: Sequence[KeptRows],
    *,
    unused_days: float | None = None,
    max_bytes: int | None = None,
    now: float | None = None,
) -> list[KeptRows]:
    """Those that were used longest ago, until both limits are kept.

    Args:
        kept: all, as `find_kept` gives them.
        unused_days: those that no run used for as many days go.
        max_bytes: what is left takes no more than this.
        now: seconds since 1970; None: the clock.
    """
    oldest = (time.time() if now is None else now) - (unused_days or 0.0) * _DAY
    chosen: list[KeptRows] = []
    left = sum(one.num_bytes for one in kept)
    for one in sorted(kept, key=lambda one: one.last_used):
        is_old = unused_days is not None and one.last_used < oldest
        if is_old or (max_bytes is not None and left > max_bytes):
            chosen.append(one)
            left -= one.num_bytes
    return chosen


def remove(one: KeptRows) -> bool:
    """Remove a data set's files, and its folder if nothing else is in it.

    Returns:
        False where a process is writing to it; it is left alone then.

    Raises:
        OSError: the files cannot be removed.
    """
    lock = FileLock(one.folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        (one.folder / MANIFEST).unlink(missing_ok=True)  # first: without it, nobody takes the rest for complete
        for path in _own_files(one.folder):
            if path.name != LOCK:
                path.unlink(missing_ok=True)
        with suppress(OSError):  # while it is held: who waits for it sees that it is gone. (Not on Windows)
            (one.folder / LOCK).unlink()
    finally:
        lock.release()
    with suppress(OSError):  # other files are in it
        one.folder.rmdir()
    return True


def _own_files(folder: Path) -> list[Path]:
    patterns = (LOCK, MANIFEST, _SHARDS, f".{_SHARDS}.*")
    return [path for pattern in patterns for path in folder.glob(pattern)]
