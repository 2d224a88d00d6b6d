"""The `split` of files: they have the one split `train`, of which a part may be taken, as `datasets` writes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from llamafactory.data.sources.row import Place, SourceRow
from llamafactory.extras.errors import DataError

_FORM = re.compile(r"train(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\])?")


class Part(NamedTuple):
    """The ends of a part as written, such as `10%` and `-100`; empty where the part has no such end."""

    start: str
    stop: str


def parse_split(split: str, where: str) -> Part:
    """The part of the rows that `train`, `train[:100]` or `train[10%:]` means.

    Raises:
        DataError: files have no such split.
    """
    match = _FORM.fullmatch(split.strip())
    if match is None:
        raise DataError(
            "files have no such split",
            where=where,
            found=split,
            expected="train, or a part of it such as train[:100] or train[10%:]",
            fix="leave split out; a part for evaluation is another entry with its own file_name",
        )
    start, stop = match[1] or "", match[2] or ""
    if "%" in start + stop:  # then both ends are shares
        start, stop = (f"{end.removesuffix('%')}%" if end else "" for end in (start, stop))
    return Part(start, stop)


def take_split(
    read: Callable[[Place | None], Iterator[SourceRow]],
    split: str,
    where: str,
    *,
    start_at: Place | None = None,
    num_before: int = 0,
) -> Iterator[SourceRow]:
    """The rows of a part. Shares and negative numbers need the number of rows, so the rows are read once more.

    Args:
        read: reads the rows from a place on; None: from the first.
        split: as the entry says it.
        where: for errors.
        start_at: place of the row to begin with; None: the first of the part.
        num_before: rows of the part before it.

    Raises:
        DataError: files have no such split.
    """
    part = parse_split(split, where)
    if part == ("", ""):
        return read(start_at)
    needs_total = any("%" in end or end.startswith("-") for end in part)
    total = sum(1 for _ in read(None)) if needs_total else 0
    start, stop = (_row_number(end, total) for end in part)
    if start_at is None:
        return islice(read(None), start or 0, stop)
    return islice(read(start_at), None if stop is None else max(0, stop - (start or 0) - num_before))


def _row_number(end: str, total: int) -> int | None:
    """A share is rounded to the nearest row, as `datasets` does."""
    if not end:
        return None
    number = round(int(end[:-1]) * total / 100) if end.endswith("%") else int(end)
    return max(0, total + number) if end.startswith("-") else number
