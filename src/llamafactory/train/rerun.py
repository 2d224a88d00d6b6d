"""A run that repeats a recorded one: what differs from then. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamafactory.extras import log
from llamafactory.extras.errors import ConfigError, Problem


def read_record(path: Path) -> dict[str, Any]:
    """The content of a `run.json`.

    Raises:
        ConfigError: it is not there, or no record of a run.
    """
    file = path / "run.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record.get("config"), dict):
            raise ValueError("it has no config")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            Problem(
                key="rerun",
                given=str(path),
                message=f"no record of a run: {error}",
                allowed="the run.json of an output folder",
            )
        ) from error
    return record


def say_what_differs(path: str, data: Mapping[str, Any], versions: Mapping[str, str], *, may_differ: bool) -> None:
    """Compares a repeated run with its record: other versions are said, other rows stop it.

    Args:
        path: of the record.
        data: the data report of this run.
        versions: of the packages.
        may_differ: whether the rows may be others (`--allow-change data`).

    Raises:
        ConfigError: the rows are others.
    """
    record = read_record(Path(path))
    before, now = _fingerprints(record.get("data", {})), _fingerprints(data)
    changed = [
        f"{name}: {before.get(name, 'not there')} -> {now.get(name, 'not there')}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    old = record.get("packages", {})
    others = [f"{name} {old.get(name)} -> {versions.get(name)}" for name in sorted({*old, *versions})
              if old.get(name) != versions.get(name)]  # fmt: skip
    if others:
        log.warn("versions differ from those of the recorded run, so its numbers may too: " + "; ".join(others))
    if changed and not may_differ:
        raise ConfigError(
            Problem(
                key="rerun_of",
                given=path,
                message="the rows are not those of the recorded run: " + "; ".join(changed),
                fix="put the old rows back, or --allow-change data to run with the new ones",
            )
        )
    if not (changed or others):
        log.info("rerun: rows and versions are those of the recorded run")


def _fingerprints(data: Mapping[str, Any]) -> dict[str, Any]:
    return {one.get("name"): one.get("fingerprint") for one in data.get("datasets", [])}
