"""The checkpoint folders of a run: finding the newest good one, removing old ones, the links `last` and `best`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Set
from pathlib import Path

from llamafactory.extras import failpoints, log
from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.extras.files import fsync
from llamafactory.train.checkpoint.manifest import find_fault, read_facts

_NAME = re.compile(r"checkpoint-(\d+)")
OPTIMIZER = "optimizer.safetensors"
"""What a checkpoint holds from which training can go on."""
STAGING, TRASH = ".staging-", ".trash-"


def checkpoint_name(step: int) -> str:
    """Name of the folder that holds the state after `step` optimizer steps."""
    return f"checkpoint-{step}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders named `checkpoint-<step>`, oldest first."""
    found = [
        (int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def newest_checkpoint(output_dir: Path, run_id: str | None = None) -> Path | None:
    """The newest checkpoint that verifies, or None where there is none at all.

    One with weights only is taken where none that verifies holds a whole state.

    Args:
        output_dir: of the run.
        run_id: only checkpoints of this run count; those of others are named and left alone. None takes any.

    Raises:
        LlamaFactoryError: there are checkpoints, and none of them verifies.
    """
    broken, weights = 0, None
    for folder in reversed(by_age(list_checkpoints(output_dir))):
        owner = read_facts(folder).get("run_id")
        if run_id is not None and owner is not None and owner != run_id:
            log.warn(f"{folder} is not used: another run wrote it ({owner})")
            continue
        fault = find_fault(folder)
        if fault is None and OPTIMIZER in read_facts(folder)["files"]:
            if weights is not None:
                log.warn(
                    f"{weights} is not used: it holds weights only (save_only_model), {folder.name} a whole state"
                )
            return folder
        if fault is None:
            weights = weights or folder
            continue
        broken += 1
        log.warn(f"{folder} is not used: {fault}")
    if weights is not None:
        return weights
    if broken:
        raise LlamaFactoryError(
            f"{output_dir}: none of {broken} checkpoints is intact. Restore one from a backup, or start "
            "again with overwrite_output_dir: true."
        )
    return None


def by_age(folders: list[Path]) -> list[Path]:
    """Checkpoints as they were written, oldest first.

    A run that goes on from an older checkpoint writes lower steps later, so that steps alone do not say what is new.
    """

    def age(folder: Path) -> int:
        times = read_facts(folder).get("times_continued", 0)
        return times if isinstance(times, int) else 0

    return sorted(folders, key=age)


def removable(
    output_dir: Path, run_id: str, limit: int | None, keep: Set[str] = frozenset(), *, hashes: bool = False
) -> list[Path]:
    """A run's oldest checkpoints beyond `limit`; what is damaged or belongs to another run does not count.

    Args:
        output_dir: of the run.
        run_id: of the run.
        limit: checkpoints that stay; None or 0 keeps all.
        keep: names that stay in any case; they count as part of `limit`.
        hashes: read every byte of those that stay; False compares sizes only.

    Returns:
        Those that may go, oldest first.
    """
    if not limit:
        return []
    own = by_age([path for path in list_checkpoints(output_dir) if read_facts(path).get("run_id") == run_id])
    kept = [path for path in own if path.name in keep]
    left = limit - sum(find_fault(path, hashes=hashes) is None for path in kept)
    if own and own[-1] not in kept:
        left = max(left, 1)
    found: list[Path] = []
    for path in reversed(own):
        if path in kept:
            continue
        if left <= 0:
            found.append(path)
        else:
            left -= find_fault(path, hashes=hashes) is None
    return found[::-1]


def prune(output_dir: Path, run_id: str, limit: int | None, keep: Set[str] = frozenset()) -> list[str]:
    """Removes what `removable` names.

    Returns:
        Names of the removed folders.
    """
    removed = removable(output_dir, run_id, limit, keep)
    for path in removed:
        discard(path)
    return [path.name for path in removed]


def make_way(target: Path, run_id: str) -> None:
    """Frees the name of a checkpoint: an older one of the same run goes, one of another run gets another name."""
    if not os.path.lexists(target):
        return
    owner = read_facts(target).get("run_id")
    if owner is None or owner == run_id:
        discard(target)
        return
    aside = target.with_name(f"{target.name}-of-{str(owner)[:8]}")
    target.rename(aside)
    log.warn(f"{target} was of another run, and is now {aside.name}")


def discard(folder: Path) -> None:
    """Removes a checkpoint so that a crash in the middle leaves nothing that looks like one."""
    trash = folder.with_name(f"{TRASH}{folder.name}-{os.getpid()}")
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    failpoints.visit("save.prune")
    shutil.rmtree(trash, ignore_errors=True)


def clear_leftovers(output_dir: Path) -> None:
    """Removes what a crash left of saves and removals. Only the owner of the folder's lock may call it."""
    for path in [*output_dir.glob(f"{STAGING}*"), *output_dir.glob(f"{TRASH}*")]:
        shutil.rmtree(path, ignore_errors=True)
    for path in [file for link in (".last-*", ".best-*", ".run.json.*") for file in output_dir.glob(link)]:
        path.unlink(missing_ok=True)


def point(output_dir: Path, link: str, target: str | None) -> None:
    """Makes the relative link `link` name the folder `target`; None removes it. Never fails a run.

    A system without links goes without; a file or folder of that name that is no link is left alone.
    """
    path = output_dir / link
    try:
        if path.exists() and not path.is_symlink():
            return
        if target is None or not (output_dir / target).is_dir():
            path.unlink(missing_ok=True)
            return
        staging = output_dir / f".{link}-{os.getpid()}"
        staging.unlink(missing_ok=True)
        staging.symlink_to(target, target_is_directory=True)
        staging.replace(path)
        fsync(output_dir)
    except OSError as error:
        log.debug(f"no link {path}: {error}")
