"""Writes checkpoints, by default in a thread while training goes on; a save that fails never loses an older one."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from llamafactory.extras import failpoints, log
from llamafactory.extras.errors import SaveError
from llamafactory.extras.files import fsync
from llamafactory.train.checkpoint.folders import STAGING, checkpoint_name, make_way, point, prune
from llamafactory.train.checkpoint.manifest import find_fault, seal
from llamafactory.train.checkpoint.snapshot import Snapshot

ROOM = 1.2
"""Free space asked for before a save, as a multiple of the last checkpoint's size."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
        limit: how many, or None for all.
        keeps_best: whether the best one is never removed.
    """

    limit: int | None = None
    keeps_best: bool = False


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """How a run writes its checkpoints.

    Attributes:
        output_dir: of the run.
        retention: which checkpoints stay.
        is_async: write in a thread.
        reads_back: compare hashes, not only sizes, after a save.
        facts: what every manifest says besides run id and step.
    """

    output_dir: Path
    retention: Retention = field(default_factory=Retention)
    is_async: bool = True
    reads_back: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Saver:
    """Writes one checkpoint at a time.

    Attributes:
        last: the newest checkpoint that this process wrote and verified.
        failure: why the newest save failed, or None where it did not.
        stall: seconds that the main thread has spent on saves, waiting for earlier ones included.
        write_seconds: seconds that the newest save took to write.
        size: bytes of the newest checkpoint.
    """

    def __init__(self, plan: SavePlan) -> None:
        """Nothing is written yet."""
        self.last: Path | None = None
        self.failure: str | None = None
        self.stall = self.write_seconds = 0.0
        self.size = 0
        self._plan = plan
        self._thread: threading.Thread | None = None
        self._mistake: BaseException | None = None

    def __enter__(self) -> Saver:
        """The saver itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the save that is being written."""
        self.wait()

    def save(self, snapshot: Snapshot) -> None:
        """Writes `checkpoint-<step>`; returns at once where saving is asynchronous and no earlier save is running."""
        self.wait()
        if not self._plan.is_async:
            self._write(snapshot)
            self._raise_mistake()
            return
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint writer")
        self._thread.start()

    def give_up(self, step: int, error: SaveError) -> None:
        """Notes that a checkpoint could not be made; older ones stay."""
        self.wait()
        self._note_failure(step, error)

    def wait(self) -> None:
        """Waits until no save is running.

        Raises:
            Exception: whatever mistake of this program stopped the writer; faults of the disk are in `failure`.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise_mistake()

    def _raise_mistake(self) -> None:
        mistake, self._mistake = self._mistake, None
        if mistake is not None:
            raise mistake

    def _write(self, snapshot: Snapshot) -> None:
        started = time.monotonic()
        try:
            self.last, self.size = publish(self._plan, snapshot, last_size=self.size)
            self.failure = None
        except Exception as error:  # in a thread: what is not the disk's fault is raised in the main one
            if not is_disk_fault(error):
                self._mistake = error
            self._note_failure(snapshot.state.step, error)
        self.write_seconds = time.monotonic() - started

    def _note_failure(self, step: int, error: Exception) -> None:
        self.failure = f"{checkpoint_name(step)} could not be saved: {error}"
        kept = f"; {self.last.name} stays" if self.last else ""
        log.warn(f"{self.failure}{kept}; training goes on")


def is_disk_fault(error: Exception) -> bool:
    """Whether an error comes from the disk, as Python, safetensors or a library on top of them report it."""
    return isinstance(error, OSError | SaveError) or "os error" in str(error)


def publish(plan: SavePlan, snapshot: Snapshot, *, last_size: int = 0) -> tuple[Path, int]:
    """Writes a checkpoint beside, verifies it, renames it into place, then removes old ones.

    Args:
        plan: where and how.
        snapshot: what.
        last_size: bytes of the checkpoint before, or 0 where it is not known.

    Returns:
        The folder and its size in bytes.

    Raises:
        OSError: the disk is full or broken; nothing of this checkpoint is left, and older ones are whole.
        SaveError: too little room, or the written files do not verify.
    """
    output_dir, step = plan.output_dir, snapshot.state.step
    output_dir.mkdir(parents=True, exist_ok=True)
    require_room(output_dir, int(last_size * ROOM))
    staging = output_dir / f"{STAGING}{step}-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    target = output_dir / checkpoint_name(step)
    try:
        failpoints.visit("save.start")
        staging.mkdir()
        snapshot.write(staging)
        manifest = seal(staging, {"run_id": snapshot.state.run_id, "step": step, **plan.facts})
        if fault := find_fault(staging, hashes=plan.reads_back):
            raise SaveError(f"{staging}: {fault}")
        make_way(target, snapshot.state.run_id)
        failpoints.visit("save.rename")
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    fsync(output_dir)
    failpoints.visit("save.done")
    _tidy(plan, snapshot, target)
    return target, sum(int(entry["size"]) for entry in manifest["files"].values())


def _tidy(plan: SavePlan, snapshot: Snapshot, target: Path) -> None:
    """Links and retention; by now the checkpoint is safe, so that a fault here is only worth a warning."""
    best = checkpoint_name(snapshot.state.best["step"]) if snapshot.state.best else None
    try:
        point(plan.output_dir, "last", target.name)
        point(plan.output_dir, "best", best)
        kept = {best} if best and plan.retention.keeps_best else set[str]()
        prune(plan.output_dir, snapshot.state.run_id, plan.retention.limit, kept)
    except OSError as error:
        log.warn(f"old checkpoints in {plan.output_dir} could not be removed: {error}", once=True)


def require_room(folder: Path, needed: int) -> None:
    """Refuses what the disk has no room for, before anything is written.

    Args:
        folder: on the disk in question.
        needed: bytes.

    Raises:
        SaveError: with both numbers.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SaveError(
            f"{folder} needs {needed / 1e6:,.0f} MB for a checkpoint, and {free / 1e6:,.0f} MB are free: make room, "
            "or set save_total_limit"
        )
