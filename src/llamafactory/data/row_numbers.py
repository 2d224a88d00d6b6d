"""Numbers that judge answers: the score of one, and by how much one of two is better. The same in every row format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from llamafactory.data.formats import Record
from llamafactory.data.row_error import RowError, describe
from llamafactory.data.types import Conversation, DatasetSpec, Preference, Scored

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_LARGEST = float(np.finfo(np.float32).max)


def with_numbers(record: Record, row: Mapping[str, object], spec: DatasetSpec) -> Record:
    """The record with the numbers of the columns `score` and `margin`, where the data set names them.

    Raises:
        RowError: no number, or one that is not finite as float32.
    """
    if isinstance(record, Preference) and (name := spec.columns.get("margin")):
        return replace(record, margin=_read_number(row, name, "margin"))
    if isinstance(record, Conversation) and (name := spec.columns.get("score")):
        return Scored(conversation=record, score=_read_number(row, name, "score"))
    return record


def _read_number(row: Mapping[str, object], column: str, what: str) -> float:
    value = row.get(column)
    if value is None:
        raise RowError(
            f"the {what} is missing",
            field=column,
            found="null" if column in row else "no such column",
            expected="a number in every row",
            fix=f"give the row a {what}, or remove the row",
        )
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):  # a .csv file has nothing but texts
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"the {what} is not a number", field=column, found=describe(value), expected="a number")
    if not abs(value) <= _LARGEST:  # NaN is not
        found = describe(value) if isinstance(value, float) else "a number of too many digits"
        raise RowError(f"the {what} is not finite", field=column, found=found, expected="a finite number")
    return float(value)
