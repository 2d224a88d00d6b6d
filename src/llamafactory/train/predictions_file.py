"""`generated_predictions.jsonl`: one line a row, in order; a killed run goes on behind the last whole line.

Beside it lies `generated_predictions.meta.json`, which says what the lines were made of. Lines that were made of
something else are never mixed with new ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamafactory.extras import failpoints, log
from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.extras.files import write_json

NAME = "generated_predictions.jsonl"
MADE_OF = "generated_predictions.meta.json"
_FORMAT = 1
_BATCHING = "batching"


class PredictionsFile:
    """Appends lines; used by the first process alone.

    Attributes:
        num_lines: that are there.
    """

    def __init__(
        self,
        folder: Path,
        made_of: Mapping[str, Any],
        *,
        num_rows: int,
        starts_afresh: bool,
        batching: Mapping[str, int] | None = None,
    ) -> None:
        """Looks at what is there, and takes out a line that a crash cut in half.

        Args:
            folder: of the run.
            made_of: what decides the lines, JSON-able: model, rows, how answers are made.
            num_rows: lines of the whole file.
            starts_afresh: whether lines that are there are removed, whatever they were made of.
            batching: rows of a batch and number of processes, noted beside the lines; others may go on with them,
                because they change answers by rounding only, which is said.

        Raises:
            ConfigError: there are lines that were made of something else.
        """
        self.path, self._num_rows = folder / NAME, num_rows
        note = folder / MADE_OF
        wanted = json.loads(json.dumps({"format": _FORMAT, "num_rows": num_rows, **made_of}))
        earlier = None
        if starts_afresh:
            if self.path.is_file():
                log.note(f"{self.path} is written anew (overwrite_output_dir)")
            self.path.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
        elif self.path.is_file() or note.is_file():
            earlier = (there := _read_note(note) or {}).pop(_BATCHING, None)
            _require_same(self.path, there or None, wanted)
        self.num_lines, end = _whole_lines(self.path, num_rows)
        if 0 < self.num_lines < num_rows and earlier != batching:
            log.note(
                f"lines in {self.path} were made with {_words(earlier)}, and new ones are with {_words(batching)}: "
                "answers differ in rounding"
            )
        if self.path.is_file():
            os.truncate(self.path, end)
        write_json(note, wanted | {_BATCHING: batching})
        if self.num_lines:
            log.info(f"predictions: {self.num_lines:,} of {num_rows:,} are in {self.path} already")

    def write(self, start: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Adds the lines of the rows from `start` on; those that are there already are left as they are."""
        failpoints.visit("predict")
        new = lines[self.num_lines - start :]
        with self.path.open("ab") as file:
            for line in new:
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.num_lines += len(new)

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines that are there."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                for line in file:
                    yield json.loads(line)


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _require_same(path: Path, there: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    if there is None:
        what = f"no {MADE_OF} beside it says what it was made of"
    else:
        keys = [key for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
        what = "; ".join(f"{key}: {_short(there.get(key))} there, {_short(wanted.get(key))} now" for key in keys)
    if what:
        raise ConfigError(
            Problem(
                key="output_dir",
                given=str(path.parent),
                message=f"holds {NAME} of another run ({what})",
                fix="choose another output_dir, or set overwrite_output_dir: true to write the file anew",
            )
        )


def _words(batching: Mapping[str, int] | None) -> str:
    """`batch_size 4, num_processes 1`; files of earlier versions do not say."""
    return ", ".join(f"{name} {value}" for name, value in (batching or {}).items()) or "a batch size that is not known"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _whole_lines(path: Path, limit: int) -> tuple[int, int]:
    """Lines that are whole, and the byte behind the last of them."""
    count = end = 0
    if not path.is_file():
        return 0, 0
    with path.open("rb") as file:
        for line in file:
            if count == limit or not line.endswith(b"\n") or not _is_object(line):
                break
            count, end = count + 1, end + len(line)
    return count, end


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
