"""What can be said about an output folder from its files alone: state, progress, checkpoints. Needs no torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamafactory.train.checkpoint.folders import list_checkpoints
from llamafactory.train.checkpoint.manifest import find_fault, read_facts, size_of
from llamafactory.train.run_lock import is_held

RUN_FILE, LOG_FILE = "run.json", "trainer_log.jsonl"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint folder.

    Attributes:
        name: of the folder.
        step: optimizer steps that it holds, or None where its manifest cannot be read.
        size: bytes of its files as the manifest says.
        fault: what is wrong with it, or None.
        is_own: whether this run wrote it.
    """

    name: str
    step: int | None
    size: int
    fault: str | None
    is_own: bool


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """A run, as its folder tells it.

    Attributes:
        folder: of the run.
        run_id: of the run.
        state: running, finished, interrupted, failed; crashed: it says running, and no process holds its lock;
            damaged: its `run.json` cannot be read.
        step: steps in the log.
        total_steps: of the whole run.
        loss: the last one logged, or None.
        remaining: time left as the log says, while it runs.
        error: why it failed, or None.
        checkpoints: oldest first.
        resume: the command that continues it, or None where it is finished or running.
        best: name of the checkpoint that the link `best` names, or None.
    """

    folder: str
    run_id: str
    state: str
    step: int
    total_steps: int | None
    loss: float | None
    remaining: str | None
    error: str | None
    resume: str | None
    best: str | None
    checkpoints: list[CheckpointInfo] = field(default_factory=list[CheckpointInfo])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def find_runs(root: Path) -> Iterator[Path]:
    """Folders with a run below `root`, itself included; checkpoint folders and hidden ones are not looked into."""
    if (root / RUN_FILE).is_file():
        yield root
    try:
        children = sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return
    for child in children:
        if not child.name.startswith((".", "checkpoint-")):
            yield from find_runs(child)


def read_run(folder: Path, *, hashes: bool = False) -> RunInfo:
    """What the files of a run say.

    Args:
        folder: of the run.
        hashes: read every byte of every checkpoint; False compares sizes only.

    Raises:
        FileNotFoundError: there is no `run.json`.
    """
    record, fault = _read_record(folder)
    run_id = str(record.get("run_id", ""))
    rows = read_log(folder)
    last = rows[-1] if rows else {}
    state = "damaged" if fault else str(record.get("state", "unknown"))
    held = is_held(folder)
    if state == "running" and held is False:
        state = "crashed"
    elif held and state != "finished":
        state = "running"
    checkpoints = [_checkpoint(path, run_id, hashes=hashes) for path in list_checkpoints(folder)]
    best = folder / "best"
    return RunInfo(
        folder=str(folder),
        run_id=run_id,
        state=state,
        step=last.get("current_steps", 0),
        total_steps=last.get("total_steps"),
        loss=next((row["loss"] for row in reversed(rows) if "loss" in row), None),
        remaining=last.get("remaining_time") if state == "running" else None,
        error=fault or (_reason(record) if state not in ("finished", "running") else None),
        resume=None if fault or state in ("running", "finished") else resume_command(folder, record),
        best=best.resolve().name if best.is_symlink() and best.exists() else None,
        checkpoints=checkpoints,
    )


def _read_record(folder: Path) -> tuple[dict[str, Any], str | None]:
    """`run.json`, or nothing and what is wrong with it.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{RUN_FILE} cannot be read: {error}"
    if not isinstance(record, dict) or not isinstance(record.get("config", {}), dict):
        return {}, f"{RUN_FILE} is no record of a run"
    return record, None


def _reason(record: dict[str, Any]) -> str | None:
    found = record.get("error") or record.get("summary")
    return None if found is None else str(found)


def _is_row(row: Any) -> bool:
    """Whether a line of the log is what a run writes."""
    if not isinstance(row, dict) or not isinstance(row.get("current_steps", 0), int):
        return False
    return isinstance(row.get("loss", 0.0), int | float) and isinstance(row.get("total_steps", 0), int | None)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Rows of the log; a torn last line and lines that are no row are left out."""
    try:
        lines = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_row(row):
            rows.append(row)
    return rows


def resume_command(folder: Path, record: dict[str, Any]) -> str:
    """A command that continues the run, whatever its configuration file was."""
    words = ["llamafactory-cli", "train", "--rerun", str(folder / RUN_FILE), f"output_dir={folder}", "rerun_of=null"]
    named = record.get("config", {}).get("resume_from_checkpoint")
    if isinstance(named, str) and not list_checkpoints(folder):  # it began elsewhere, and has saved nothing since
        words.append(f"resume_from_checkpoint={named}")
    found = record.get("num_processes", 1)
    num_processes = found if isinstance(found, int) else 1
    prefix = f"FORCE_TORCHRUN=1 NPROC_PER_NODE={num_processes} " if num_processes > 1 else ""
    return prefix + shlex.join(words)


def _checkpoint(path: Path, run_id: str, *, hashes: bool) -> CheckpointInfo:
    facts = read_facts(path)
    step = facts.get("step")
    return CheckpointInfo(
        name=path.name,
        step=step if isinstance(step, int) else None,
        size=size_of(path),
        fault=find_fault(path, hashes=hashes),
        is_own=facts.get("run_id") == run_id,
    )
