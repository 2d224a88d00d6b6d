"""ShareGPT rows: a list of messages under `conversations`, each with a role tag and a content tag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llamafactory.data.formats import Detected, Record, Row, with_usual_columns, without_empty_answer
from llamafactory.data.formats.alpaca import read_column, read_flag
from llamafactory.data.row_error import RowError, describe, read_filled_text, read_text
from llamafactory.data.row_tools import read_tools, read_train, read_weight, split_calls
from llamafactory.data.types import Conversation, DatasetSpec, Feedback, Message, Preference
from llamafactory.extras.suggest import did_you_mean

DEFAULT_COLUMNS: Mapping[str, str | None] = {"messages": "conversations"}
DEFAULT_TAGS: Mapping[str, str | None] = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


def detect(row: Row) -> Detected | None:
    """Rows with a `conversations` (or `messages`) list of `from`/`value` objects."""
    for column in ("conversations", "messages"):
        value = row.get(column)
        if (
            isinstance(value, list)
            and value
            and isinstance(value[0], Mapping)
            and {"from", "value"} <= value[0].keys()
        ):
            return with_usual_columns({"messages": column}, DEFAULT_TAGS, row)
    return None


def read_row(row: Row, spec: DatasetSpec, origin: str) -> Record:
    """The row as a conversation, a preference pair (ranking) or a judged conversation (KTO).

    Raises:
        RowError: a missing column, an unknown role, roles out of order, a wrong number of turns, an empty answer.
    """
    columns, tags = spec.columns, spec.tags
    column = columns.get("messages") or "conversations"
    listed = without_empty_answer(read_column(row, column), spec, DEFAULT_TAGS)
    if not isinstance(listed, list):
        raise RowError(
            "the messages are not a list", field=column, found=describe(listed), expected="a list of messages"
        )
    system, rest, skipped = _split_system(listed, column, tags)
    if not system and (name := columns.get("system")):
        system = read_text(row.get(name), name)
    turns = [_read_turn(message, place, f"{column}[{place + skipped}]", tags) for place, message in enumerate(rest)]
    _check_count(turns, column, spec)
    tools = read_tools(row.get(name), name) if (name := columns.get("tools")) else None
    messages = [Message(role="system", content=system), *turns] if system else turns
    conversation = Conversation(messages=tuple(messages), tools=tools, origin=origin)
    if spec.is_ranking:
        chosen, rejected = (_read_side(row, columns.get(side) or side, tags) for side in ("chosen", "rejected"))
        return Preference(prompt=conversation, chosen=chosen, rejected=rejected)
    if tag := columns.get("kto_tag"):
        return Feedback(conversation=conversation, is_desirable=read_flag(row, tag))
    return conversation


def _split_system(listed: list[object], column: str, tags: Mapping[str, str | None]) -> tuple[str, list[object], int]:
    """The system text of a first message with the system tag, the other messages, and how many were taken off."""
    tag = tags.get("system_tag")
    if tag and listed and _role(listed[0], f"{column}[0]", tags) == tag:
        return _content(listed[0], f"{column}[0]", tags), listed[1:], 1
    return "", listed, 0


def _read_turn(message: object, place: int, field: str, tags: Mapping[str, str | None]) -> Message:
    """The message at `place` (from 0) behind the system message: questions at even places, answers at odd ones."""
    role = _role(message, field, tags)
    asking = [tags.get("user_tag"), tags.get("observation_tag")]
    answering = [tags.get("assistant_tag"), tags.get("function_tag")]
    if role not in [tag for tag in asking + answering if tag]:
        known = [tag for tag in asking + answering if tag]
        hint = did_you_mean(role, known) or "name the roles in the `tags` block of dataset_info.json"
        where = f"{field}.{tags.get('role_tag')}"
        if role == tags.get("system_tag"):
            hint = "move it to the front, or into a `system` column"
        raise RowError("unknown role", field=where, found=describe(role), expected=" or ".join(known), fix=hint)
    allowed = [tag for tag in (answering if place % 2 else asking) if tag]
    if role not in allowed:
        raise RowError(
            "wrong order of roles",
            field=f"{field}.{tags.get('role_tag')}",
            found=f"{describe(role)} as message {place + 1}",
            expected=" or ".join(allowed),
            fix="questions and answers alternate, and a question comes first",
        )
    read = _message(role, _content(message, field, tags), f"{field}.{tags.get('content_tag')}", tags)
    if not isinstance(message, Mapping) or read.role != "assistant":
        return read
    return replace(read, train=read_train(message, field), weight=read_weight(message, field))


def _message(role: str, text: str, field: str, tags: Mapping[str, str | None]) -> Message:
    if role == tags.get("user_tag"):
        return Message(role="user", content=read_filled_text(text, field, "user message"))
    if role == tags.get("observation_tag"):
        return Message(role="tool", content=text)
    if role == tags.get("function_tag"):
        before, calls = split_calls(read_filled_text(text, field, "tool call"), field)
        return Message(role="assistant", content=before, tool_calls=calls)
    return Message(role="assistant", content=read_filled_text(text, field, "answer"))


def _check_count(turns: list[Message], column: str, spec: DatasetSpec) -> None:
    if not turns:
        raise RowError(
            "no messages", field=column, found="an empty list", expected="at least a question and an answer"
        )
    if spec.needs_answer and len(turns) % 2 != int(spec.is_ranking):
        if spec.is_ranking:
            expected, fix = "an odd number: the answer is in chosen and rejected", "remove the last answer"
        else:
            expected, fix = "an even number: each question with its answer", "remove the last question, or answer it"
        raise RowError(
            "wrong number of messages", field=column, found=f"{len(turns)} messages", expected=expected, fix=fix
        )


def _read_side(row: Row, column: str, tags: Mapping[str, str | None]) -> Message:
    value = read_column(row, column)
    answering = [tag for tag in (tags.get("assistant_tag"), tags.get("function_tag")) if tag]
    role = _role(value, column, tags)
    if role not in answering:
        where = f"{column}.{tags.get('role_tag')}"
        raise RowError("unknown role", field=where, found=describe(role), expected=" or ".join(answering))
    return _message(role, _content(value, column, tags), f"{column}.{tags.get('content_tag')}", tags)


def _role(message: object, field: str, tags: Mapping[str, str | None]) -> str:
    key = tags.get("role_tag") or "from"
    role = message.get(key) if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise RowError(
            f"a message without '{key}'",
            field=field,
            found=describe(message),
            expected=f"an object with '{key}' and '{tags.get('content_tag')}'",
            fix="name the keys in the `tags` block of dataset_info.json (role_tag, content_tag)",
        )
    return role


def _content(message: object, field: str, tags: Mapping[str, str | None]) -> str:
    key = tags.get("content_tag") or "value"
    if not isinstance(message, Mapping) or key not in message:
        raise RowError(
            f"a message without '{key}'", field=field, found=describe(message), expected=f"an object with '{key}'"
        )
    return read_text(message[key], f"{field}.{key}")
