"""Everything that is wrong with the rows of a data set, each problem with its file and line. Shows no row whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamafactory.data.data_report import LostRow, has_too_many_bad_rows
from llamafactory.data.encoded_rows import NO_TARGET, EncodedRow, RowEncoder, encode_rows, open_reader
from llamafactory.data.sources import list_files
from llamafactory.data.types import DatasetSpec, Template, ViewName
from llamafactory.extras.errors import DataError
from llamafactory.hparams.data import DataConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DataProblem:
    """One thing that is wrong, as a person finds it in an editor.

    Attributes:
        file: name of the file, or of the data set where there is no file.
        line: line of the file, from 1; None where the file has no lines or the fault is not in one place.
        row: number of the row in the file, from 1, where rows are counted and not lines.
        field: where in the row, such as `conversations[2].value`; empty where the whole file is meant.
    """

    dataset: str
    file: str
    reason: str
    line: int | None = None
    row: int | None = None
    field: str = ""
    found: str = ""
    expected: str = ""
    fix: str = ""

    def render(self) -> str:
        """A headline that editors can jump to, then one indented line for each thing that is known."""
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        place += "" if self.row is None else f" (row {self.row:,})"
        head = ": ".join(part for part in (place, self.field, self.reason) if part)
        details = (("found", self.found), ("expected", self.expected), ("fix", self.fix))
        return "\n".join([head, *(f"    {name + ':':<10}{text}" for name, text in details if text)])


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedDataset:
    """What a check found. `stops_training` says whether training would refuse the data set, and not drop the rows."""

    name: str
    num_rows: int
    num_usable: int
    problems: tuple[DataProblem, ...]
    stops_training: bool


def check_dataset(
    spec: DatasetSpec, data: DataConfig, template: Template, tokenizer: Any, *, seed: int, view: ViewName = "sft"
) -> CheckedDataset:
    """Read, render and encode every row that training would read, and collect what is wrong.

    Of a row with several faults the first one is reported. Rows that `overlong` cuts or drops are no problem.
    """
    problems: list[DataProblem] = []
    num_usable = 0
    stops = False
    reader = None
    try:
        rows = RowEncoder.from_config(data, view, template, tokenizer)
        reader = open_reader(spec, data, rows.view, seed=seed)
        for row in encode_rows(reader, rows):
            try:
                kept, reason = rows.keep(row)
            except DataError as error:
                stops = True
                problems.append(_of_error(spec.name, error, field="row"))
                continue
            num_usable += bool(kept)
            if not kept and reason == NO_TARGET:
                problems.append(_no_target(spec.name, row, data))
    except DataError as error:
        stops = True
        problems.append(_of_error(spec.name, error))
    lost = reader.lost if reader else []
    num_rows = reader.num_rows if reader else 0
    problems += [_of_row(row) for row in lost]
    return CheckedDataset(
        name=spec.name,
        num_rows=num_rows,
        num_usable=num_usable,
        problems=tuple(sorted(_with_lines(problems, spec), key=_place)),
        stops_training=stops or num_usable == 0 or has_too_many_bad_rows(lost, num_rows, data.max_bad_rows),
    )


def row_lines(text: str) -> list[int]:
    """The line at which each row of a JSON list begins; empty if the text is no list."""
    decoder = json.JSONDecoder()
    lines: list[int] = []
    place = text.find("[") + 1
    line, counted = 1, 0
    while place:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if place >= len(text) or text[place] == "]":
            return lines
        line, counted = line + text.count("\n", counted, place), place
        lines.append(line)
        try:
            _, place = decoder.raw_decode(text, place)
        except (json.JSONDecodeError, RecursionError):
            return lines
    return lines


def _with_lines(problems: Iterable[DataProblem], spec: DatasetSpec) -> Iterator[DataProblem]:
    """The problems, with lines where rows of a JSON file were counted; a file is read again only if it has one."""
    lines_of: dict[str, list[int]] = {}
    for problem in problems:
        if problem.row is None or not problem.file.lower().endswith((".json", ".jsonl")):
            yield problem
            continue
        if problem.file not in lines_of:
            files = [file for file in list_files(Path(spec.location)) if file.name == problem.file]
            lines_of[problem.file] = row_lines(files[0].read_text(encoding="utf-8-sig")) if files else []
        lines = lines_of[problem.file]
        yield replace(problem, line=lines[problem.row - 1]) if problem.row <= len(lines) else problem


def _place(problem: DataProblem) -> tuple[str, int, int]:
    return problem.file, problem.row or 0, problem.line or 0


def _split_origin(origin: str) -> tuple[str, int | None, int | None]:
    """File, line and row of `rows.jsonl:12` (a line) or `rows.json#12` (a row)."""
    for mark in "#:":
        file, found, number = origin.rpartition(mark)
        if found and number.isdigit():
            return (file, None, int(number)) if mark == "#" else (file, int(number), None)
    return origin, None, None


def _problem(
    dataset: str, origin: str, reason: str, *, field: str, found: str, expected: str, fix: str
) -> DataProblem:
    file, line, row = _split_origin(origin)
    return DataProblem(
        dataset=dataset,
        file=file,
        line=line,
        row=row,
        field=field,
        reason=reason,
        found=found,
        expected=expected,
        fix=fix,
    )


def _of_row(row: LostRow) -> DataProblem:
    return _problem(
        row.dataset, row.origin, row.reason, field=row.field, found=row.found, expected=row.expected, fix=row.fix
    )


def _of_error(dataset: str, error: DataError, field: str = "") -> DataProblem:
    return _problem(
        dataset,
        error.where or dataset,
        error.what,
        field=field,
        found=error.found or "",
        expected=error.expected or "",
        fix=error.fix or "",
    )


def _no_target(dataset: str, row: EncodedRow, data: DataConfig) -> DataProblem:
    num_cut = sum(row.num_cut)
    found = f"none in the first {data.cutoff_len:,} tokens" if num_cut else "no answer that carries loss"
    fix = f"raise cutoff_len ({num_cut:,} tokens are cut)" if num_cut else "look at train and weight in the row"
    return _problem(
        dataset, row.origin, NO_TARGET, field="row", found=found, expected="at least one supervised token", fix=fix
    )
