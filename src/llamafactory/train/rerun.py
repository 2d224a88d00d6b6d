"""A run that repeats a recorded one: what differs from then. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory.extras import log
from llamafactory.extras.errors import ConfigError, Problem

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig

_BASE_KEYS = ("model_name_or_path", "adapter_name_or_path", "adapter_folder")
_DECISIONS = (
    "device", "weight_dtype", "autocast", "attention", "layout", "micro_batch_tokens", "loss_chunk_rows", "fused_head",
    "fused_blocks", "compiled_blocks", "sharding",
)  # fmt: skip
"""What the plan decides that changes the last digits of a run's numbers."""


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
        if not isinstance(record.get("text", {}), dict):
            raise ValueError("what it says of its text is no object")
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


def require_recorded_base(cfg: RunConfig, base: str) -> None:
    """Refuses a repeated run whose base model has other weights than the recorded run began with.

    Args:
        cfg: the resolved configuration; another model, or other adapters, that it asks for are no surprise.
        base: fingerprint of the weights that are there now.

    Raises:
        ConfigError: the weights have changed.
    """
    path = str(cfg.train.rerun_of)
    record, now = read_record(Path(path)), cfg.flat(mask_secrets=True)
    asked = any(record["config"].get(key) != json.loads(json.dumps(now[key])) for key in _BASE_KEYS)
    if asked or record.get("base") in (None, base) or _BASE_KEYS[0] in cfg.train.allow_change:
        return
    raise ConfigError(
        Problem(
            key="rerun_of",
            given=path,
            message=f"the weights of {cfg.model.model_name_or_path}, or of an adapter beside it, are not those of the "
            "recorded run",
            fix=f"put the old weights back, or --allow-change {_BASE_KEYS[0]} to run with the new ones",
        )
    )


def say_other_text(path: str, parts: Mapping[str, str]) -> None:
    """Says where tokenizer or template are not those of the recorded run; see `data.cache_key.text_parts`."""
    before = read_record(Path(path)).get("text") or {}
    if others := [name for name in parts if name in before and before[name] != parts[name]]:
        log.warn(f"not those of the recorded run, so that rows become other tokens: {' and '.join(others)}")


def say_what_is_computed_otherwise(path: str, plan: Mapping[str, Any], num_processes: int) -> None:
    """Says which decisions of the plan, and how many processes, are not those of the recorded run.

    Args:
        path: of the record.
        plan: of this run, as `run.json` holds it.
        num_processes: of this run.
    """
    record = read_record(Path(path))
    own = {key: record[key] for key in ("num_processes",) if key in record}
    before, now = {**record.get("plan", {}), **own}, {**plan, "num_processes": num_processes}
    others = [
        f"{key} {before[key]} -> {now[key]}"
        for key in ("num_processes", *_DECISIONS)
        if key in before and before[key] != now.get(key)
    ]
    if others:
        log.warn("computed otherwise than the recorded run, so that its numbers may differ: " + "; ".join(others))
    if before.get("num_processes", num_processes) != num_processes:
        log.warn("each step holds other rows than in the recorded run: set NPROC_PER_NODE to its num_processes")


def _fingerprints(data: Mapping[str, Any]) -> dict[str, Any]:
    return {one.get("name"): one.get("fingerprint") for one in data.get("datasets", [])}
