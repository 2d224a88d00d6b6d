"""Row formats, one file each, looked up by file name: row -> canonical record.

A file offers `DEFAULT_COLUMNS`, `DEFAULT_TAGS`, `detect` and `read_row`, as `RowFormat` lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import NamedTuple, Protocol, TypeAlias, cast

from llamafactory.data.types import Conversation, DatasetSpec, Feedback, Preference, Scored
from llamafactory.extras.errors import DataError
from llamafactory.extras.suggest import did_you_mean

Row: TypeAlias = Mapping[str, object]
Record: TypeAlias = Conversation | Preference | Feedback | Scored


class Detected(NamedTuple):
    """Columns and tags under which a format can read a row."""

    columns: Mapping[str, str | None]
    tags: Mapping[str, str | None]
    is_ranking: bool = False


class RowFormat(Protocol):
    """What a file in this folder offers."""

    DEFAULT_COLUMNS: Mapping[str, str | None]
    """Column names where the dataset's entry has no `columns` block."""
    DEFAULT_TAGS: Mapping[str, str | None]
    """Tags where the entry has no `tags` block."""

    @staticmethod
    def detect(row: Row) -> Detected | None:
        """How this format would read the row; None if it would not."""
        ...

    @staticmethod
    def read_row(row: Row, spec: DatasetSpec, origin: str) -> Record:
        """The row in canonical form.

        Raises:
            RowError: the row breaks a rule of the format.
        """
        ...


_OPTIONAL = ("system", "tools", "images", "videos", "audios")
_JUDGEMENTS = ("kto_tag", "label")
NUMBERS = ("score", "margin")
"""Columns of numbers about answers, under their usual names."""


def with_usual_columns(columns: Mapping[str, str | None], tags: Mapping[str, str | None], row: Row) -> Detected:
    """The columns of a format, and of those that any format may have the ones that this row has.

    Two answers under `chosen` and `rejected` make it a preference pair, whose `margin` is taken if there is one; a
    boolean under `label` makes it a judged answer, anything under `score` a scored one.
    """
    found = {**columns, **{name: name for name in _OPTIONAL if name in row}}
    if "chosen" in row and "rejected" in row:
        found.pop("response", None)
        found |= {"margin": "margin"} if "margin" in row else {}
        return Detected({**found, "chosen": "chosen", "rejected": "rejected"}, tags, is_ranking=True)
    if judgement := next((name for name in _JUDGEMENTS if isinstance(row.get(name), bool)), None):
        found["kto_tag"] = judgement
    if "score" in row:
        found["score"] = "score"
    return Detected(found, tags)


def without_empty_answer(listed: object, spec: DatasetSpec, usual: Mapping[str, str | None]) -> object:
    """The messages of a row without a last answer that is empty, where the answer is not needed; `usual`: the tags."""
    if spec.needs_answer or not isinstance(listed, list) or not listed or not isinstance(listed[-1], Mapping):
        return listed
    last = cast("Mapping[str, object]", listed[-1])
    role, content = (spec.tags.get(tag) or str(usual[tag]) for tag in ("role_tag", "content_tag"))
    is_answer = last.get(role) == spec.tags.get("assistant_tag") and not last.get("tool_calls")
    return listed[:-1] if is_answer and is_blank(last.get(content)) else listed


def is_blank(value: object) -> bool:
    """Whether there is no text: null, or white space."""
    return value is None or (isinstance(value, str) and not value.strip())


def format_names() -> tuple[str, ...]:
    """Names of all formats."""
    return tuple(sorted(module.name for module in iter_modules(__path__)))


@cache
def find_format(name: str) -> RowFormat:
    """The format of that name.

    Raises:
        DataError: there is no such file.
    """
    if name not in format_names():
        raise DataError(
            f"unknown formatting '{name}'",
            where="formatting",
            expected=", ".join(format_names()),
            fix=did_you_mean(name, format_names()) or None,
        )
    return cast(RowFormat, import_module(f"{__name__}.{name}"))


def detect_format(row: Row) -> tuple[str, Detected] | None:
    """The first format that recognises the row, with its columns and tags."""
    for name in ("openai", "sharegpt", "alpaca"):
        if (found := find_format(name).detect(row)) is not None:
            return name, found
    return None
