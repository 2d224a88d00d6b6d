"""What a run keeps from its beginning: the day that templates write into prompts, and the commits of its models.

Both stand in `run.json`. A run that goes on takes them from there, and so does one that repeats it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory.data.day import fixed_day, today
from llamafactory.model.hub import found_revisions, pinned
from llamafactory.train.rerun import read_record

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig

_BASE_KEY = "model_name_or_path"


def origin() -> dict[str, Any]:
    """The part of `run.json` that `as_it_began` reads."""
    return {"day": today().isoformat(), "revisions": found_revisions()}


@contextmanager
def as_it_began(cfg: RunConfig, record: Mapping[str, Any] | None) -> Iterator[None]:
    """The day and the commits of the run that is continued or repeated; for a new one today, and those of now.

    Args:
        cfg: names the record of a repeated run; models that are allowed to change are taken as they are now.
        record: of the run that is continued, or None.
    """
    if record is None and cfg.train.rerun_of:
        record = read_record(Path(cfg.train.rerun_of))
    record = record or {}
    with ExitStack() as stack:
        stack.enter_context(fixed_day(_day(record.get("day")) or date.today()))
        if _BASE_KEY not in cfg.train.allow_change:
            stack.enter_context(pinned(record.get("revisions") or {}))
        yield


def _day(text: object) -> date | None:
    try:
        return date.fromisoformat(str(text))
    except ValueError:
        return None
