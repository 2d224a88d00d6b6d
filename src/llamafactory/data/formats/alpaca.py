"""Alpaca rows: `instruction`, `input`, `output`, and perhaps `system`, `history`, `tools`."""

from __future__ import annotations

from collections.abc import Mapping

from llamafactory.data.formats import Detected, Record, Row, is_blank, with_usual_columns
from llamafactory.data.row_error import RowError, describe, read_filled_text, read_text
from llamafactory.data.row_tools import read_tools
from llamafactory.data.types import Conversation, DatasetSpec, Feedback, Message, Preference

DEFAULT_COLUMNS: Mapping[str, str | None] = {"prompt": "instruction", "query": "input", "response": "output"}
DEFAULT_TAGS: Mapping[str, str | None] = {}
_OTHER_NAMES = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("input", "output"))


def detect(row: Row) -> Detected | None:
    """Rows with `instruction` and `output`, another usual pair of names, a prompt with two answers, or `text`."""
    if "instruction" in row and ("output" in row or {"chosen", "rejected"} <= row.keys()):
        history = {"history": "history"} if "history" in row else {}
        return with_usual_columns({**DEFAULT_COLUMNS, **history}, {}, row)
    for prompt, response in _OTHER_NAMES:
        if isinstance(row.get(prompt), str) and isinstance(row.get(response), str):
            return with_usual_columns({"prompt": prompt, "response": response}, {}, row)
    for prompt in ("prompt", "question"):
        if all(isinstance(row.get(name), str) for name in (prompt, "chosen", "rejected")):
            return with_usual_columns({"prompt": prompt}, {}, row)
    return Detected({"prompt": "text"}, {}) if isinstance(row.get("text"), str) else None


def read_row(row: Row, spec: DatasetSpec, origin: str) -> Record:
    """The row as a conversation; a row without a response column (plain text) has only a user message.

    Raises:
        RowError: a missing column, an empty prompt or answer, a value of the wrong type.
    """
    columns = spec.columns
    messages: list[Message] = []
    if (name := columns.get("system")) and (system := read_text(row.get(name), name)):
        messages.append(Message(role="system", content=system))
    if name := columns.get("history"):
        messages += _read_history(row.get(name), name)
    messages.append(Message(role="user", content=_read_prompt(row, columns)))
    tools = read_tools(row.get(name), name) if (name := columns.get("tools")) else None
    if not spec.is_ranking and (name := columns.get("response")):
        if spec.needs_answer or not is_blank(read_column(row, name)):
            messages.append(_answer(row, name))
    conversation = Conversation(messages=tuple(messages), tools=tools, origin=origin)
    if spec.is_ranking:
        chosen, rejected = (_answer(row, columns.get(side) or side) for side in ("chosen", "rejected"))
        return Preference(prompt=conversation, chosen=chosen, rejected=rejected)
    if not columns.get("response"):
        return conversation
    if tag := columns.get("kto_tag"):
        return Feedback(conversation=conversation, is_desirable=read_flag(row, tag))
    return conversation


def read_flag(row: Row, column: str) -> bool:
    """The boolean that says whether an answer is desirable.

    Raises:
        RowError: not a boolean.
    """
    value = row.get(column)
    if not isinstance(value, bool):
        raise RowError("not a boolean", field=column, found=describe(value), expected="true or false, without quotes")
    return value


def read_column(row: Row, column: str) -> object:
    """The value of a column that must be there.

    Raises:
        RowError: the row has no such column.
    """
    if column not in row:
        raise RowError(
            f"column '{column}' is missing",
            field=column,
            found=describe(row),
            expected=f"a column '{column}'",
            fix="name the columns in the `columns` block of dataset_info.json",
        )
    return row[column]


def _read_prompt(row: Row, columns: Mapping[str, str | None]) -> str:
    name, query = columns.get("prompt"), columns.get("query")
    parts = [read_text(read_column(row, name), name)] if name else []
    parts += [read_text(row.get(query), query)] if query else []
    text = "\n".join(part for part in parts if part)
    return read_filled_text(text, name or query or "prompt", "prompt")


def _answer(row: Row, column: str) -> Message:
    return Message(role="assistant", content=read_filled_text(read_column(row, column), column, "answer"))


def _read_history(value: object, column: str) -> list[Message]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError("the history is not a list", field=column, found=describe(value), expected="a list of pairs")
    messages = []
    for place, pair in enumerate(value):
        field = f"{column}[{place}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("not a pair", field=field, found=describe(pair), expected="[user text, assistant text]")
        messages += [
            Message(role="user", content=read_filled_text(pair[0], f"{field}[0]", "user message")),
            Message(role="assistant", content=read_filled_text(pair[1], f"{field}[1]", "answer")),
        ]
    return messages
