"""OpenAI rows: `messages` with `role` and `content`, tool calls, tool results, and perhaps `train` or `weight`."""

from __future__ import annotations

from collections.abc import Mapping

from llamafactory.data.formats import Detected, Record, Row, with_usual_columns, without_empty_answer
from llamafactory.data.formats.alpaca import read_column, read_flag
from llamafactory.data.row_error import RowError, describe, read_filled_text, read_text
from llamafactory.data.row_media import PLACEHOLDERS, read_media
from llamafactory.data.row_tools import read_call, read_tools, read_train, read_weight
from llamafactory.data.types import (
    Conversation,
    DatasetSpec,
    Feedback,
    Media,
    MediaKind,
    Message,
    Preference,
    Role,
    ToolCall,
)
from llamafactory.extras.suggest import did_you_mean

DEFAULT_COLUMNS: Mapping[str, str | None] = {"messages": "messages", "tools": "tools"}
DEFAULT_TAGS: Mapping[str, str | None] = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
_PART_KINDS: Mapping[str, MediaKind] = {
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
_FOLLOWERS: Mapping[Role | None, tuple[Role, ...]] = {
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def detect(row: Row) -> Detected | None:
    """Rows with a `messages` (or `conversations`) list of `role`/`content` objects."""
    for column in ("messages", "conversations"):
        value = row.get(column)
        if (
            isinstance(value, list)
            and value
            and isinstance(value[0], Mapping)
            and "role" in value[0]
            and ("content" in value[0] or "tool_calls" in value[0])
        ):
            return with_usual_columns({"messages": column}, DEFAULT_TAGS, row)
    return None


def read_row(row: Row, spec: DatasetSpec, origin: str) -> Record:
    """The row as a conversation, a preference pair (ranking) or a judged conversation (KTO).

    Raises:
        RowError: a missing column, an unknown role, roles out of order, an answer without text and calls.
    """
    columns = spec.columns
    column = columns.get("messages") or "messages"
    listed = without_empty_answer(read_column(row, column), spec, DEFAULT_TAGS)
    if not isinstance(listed, list) or not listed:
        raise RowError("no messages", field=column, found=describe(listed), expected="a list of messages")
    media: list[Media] = []
    messages = [_read_message(message, f"{column}[{place}]", spec.tags, media) for place, message in enumerate(listed)]
    if messages[0].role != "system" and (name := columns.get("system")) and (text := read_text(row.get(name), name)):
        messages.insert(0, Message(role="system", content=text))
    _check_order(messages, column, spec, skipped=len(messages) - len(listed))
    tools = read_tools(row.get(name), name) if (name := columns.get("tools")) else None
    conversation = Conversation(messages=tuple(messages), tools=tools, origin=origin, media=tuple(media))
    if spec.is_ranking:
        sides = (columns.get("chosen") or "chosen", columns.get("rejected") or "rejected")
        chosen, rejected = (_read_message(_answer(row, side), side, spec.tags, []) for side in sides)
        return Preference(prompt=conversation, chosen=chosen, rejected=rejected)
    if tag := columns.get("kto_tag"):
        return Feedback(conversation=conversation, is_desirable=read_flag(row, tag))
    return conversation


def _check_order(messages: list[Message], column: str, spec: DatasetSpec, *, skipped: int) -> None:
    before: Role | None = None
    for place, message in enumerate(messages):
        if message.role == "system" and place == 0:
            continue
        if message.role not in _FOLLOWERS[before]:
            behind = "at the start" if before is None else f"behind {before}"
            raise RowError(
                "wrong order of roles",
                field=f"{column}[{place - skipped}].role",
                found=f"{message.role} {behind}",
                expected=" or ".join(_FOLLOWERS[before]),
            )
        before = message.role
    last_roles = ("user", "tool") if spec.is_ranking else ("assistant",)
    if not spec.needs_answer:
        last_roles = ("user", "tool", "assistant")
    if before not in last_roles:
        raise RowError(
            "wrong last message",
            field=column,
            found=f"{before or 'system'} at the end",
            expected=" or ".join(last_roles),
            fix="each conversation ends with its answer"
            if not spec.is_ranking
            else "the answers are in chosen and rejected",
        )


def _answer(row: Row, side: str) -> object:
    """The message under `chosen` or `rejected`; a list of one message is taken too."""
    value = read_column(row, side)
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _read_message(message: object, field: str, tags: Mapping[str, str | None], media: list[Media]) -> Message:
    """The message; what its content parts hold besides text is added to `media`."""
    role_key, content_key = tags.get("role_tag") or "role", tags.get("content_tag") or "content"
    if not isinstance(message, Mapping) or not isinstance(message.get(role_key), str):
        raise RowError(
            f"a message without '{role_key}'",
            field=field,
            found=describe(message),
            expected=f"an object with '{role_key}' and '{content_key}'",
        )
    role = _canonical_role(message[role_key], f"{field}.{role_key}", tags)
    text = _read_content(message.get(content_key), f"{field}.{content_key}", media)
    if role == "user":
        read_filled_text(text, f"{field}.{content_key}", "user message")
    if role != "assistant":
        return Message(role=role, content=text)
    calls = _read_calls(message.get("tool_calls"), f"{field}.tool_calls")
    if not calls:
        read_filled_text(text, f"{field}.{content_key}", "answer")
    return Message(
        role=role, content=text, tool_calls=calls, train=read_train(message, field), weight=read_weight(message, field)
    )


def _canonical_role(given: str, field: str, tags: Mapping[str, str | None]) -> Role:
    roles: dict[str | None, Role] = {
        tags.get("system_tag"): "system",
        "developer": "system",
        tags.get("user_tag"): "user",
        tags.get("assistant_tag"): "assistant",
        tags.get("observation_tag"): "tool",
    }
    if given not in roles:
        known = [str(role) for role in roles if role]
        hint = did_you_mean(given, known)
        raise RowError("unknown role", field=field, found=describe(given), expected=" or ".join(known), fix=hint)
    return roles[given]


def _read_content(value: object, field: str, media: list[Media]) -> str:
    """Text, null, or a list of content parts, joined; parts that are no text leave their placeholder."""
    if not isinstance(value, list):
        return read_text(value, field)
    texts: list[str] = []
    for place, part in enumerate(value):
        kind = str(part.get("type")) if isinstance(part, Mapping) else ""
        if isinstance(part, str):
            texts.append(read_text(part, f"{field}[{place}]"))
        elif kind == "text" and isinstance(part, Mapping):
            texts.append(read_text(part.get("text"), f"{field}[{place}].text"))
        elif isinstance(part, Mapping) and kind in _PART_KINDS:
            texts.append(PLACEHOLDERS[_PART_KINDS[kind]])
            media.append(_read_part(part, kind, f"{field}[{place}].{kind}"))
        else:
            raise RowError(
                "an unknown content part",
                field=f"{field}[{place}]",
                found=describe(kind or part),
                expected="a part of type " + ", ".join(("text", *_PART_KINDS)),
            )
    return "".join(texts)


def _read_part(part: Mapping[str, object], kind: str, field: str) -> Media:
    """What the part holds; a part may also only mark the place of an entry of the media columns."""
    value = part.get(kind, part.get("url", part.get("path")))
    if isinstance(value, Mapping) and isinstance(value.get("data"), str):  # input_audio: base64 text
        value = f"data:;base64,{value['data']}"
    kind_of_media = _PART_KINDS[kind]
    return Media(kind=kind_of_media, column=field) if value is None else read_media(kind_of_media, value, field)


def _read_calls(value: object, field: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RowError("the tool calls are not a list", field=field, found=describe(value), expected="a list of calls")
    calls = []
    for place, call in enumerate(value):
        inner = call.get("function") if isinstance(call, Mapping) and "function" in call else call
        calls.append(read_call(inner, f"{field}[{place}]"))
    return tuple(calls)
