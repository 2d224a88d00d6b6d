"""Messages in the shapes that chat templates of models take. Which shape a template wants is found out by trying."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from llamafactory.data.tool_formats import ToolFormat
from llamafactory.data.types import Message, ToolCall


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageStyle:
    """How a template wants its messages.

    Attributes:
        has_parts: content is a list of parts, not a text.
        has_null_content: a message with calls and no text has null as content, not an empty text.
        has_text_arguments: the arguments of a call are JSON text, not an object.
        has_ids: calls and results carry ids.
        has_no_tools: the template does not write tools or calls at all.
    """

    has_parts: bool = False
    has_null_content: bool = False
    has_text_arguments: bool = False
    has_ids: bool = False
    has_no_tools: bool = False


_ASKED, _ANSWERED = Message(role="user", content="Where?"), Message(role="assistant", content="There.")
_CALLED = Message(
    role="assistant", content="", tool_calls=(ToolCall(name="probe_tool", arguments='{"place": "Probeville"}'),)
)
_RESULT = Message(role="tool", content="Probe result.")
_TOOL: Mapping[str, object] = {
    "name": "probe_tool",
    "description": "Looks up a place.",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string", "description": "Name."}},
        "required": ["place"],
    },
}

Write = Callable[[Sequence[Message], Sequence[Mapping[str, object]], MessageStyle], str | None]
"""Renders messages with tools in a style; None where the template refuses."""


def find_style(write: Write) -> MessageStyle:
    """The first style in which content, tools, calls, arguments and results all show in the text."""

    def shows_content(style: MessageStyle) -> bool:
        text = write((_ASKED, _ANSWERED), (), style)
        return text is not None and _ASKED.content in text and _ANSWERED.content in text

    has_parts = not shows_content(MessageStyle()) and shows_content(MessageStyle(has_parts=True))
    for style in _tool_styles(has_parts):
        with_tool = write((_ASKED, _CALLED, _RESULT, _ANSWERED), (_TOOL,), style)
        without = write((_ASKED, _CALLED, _RESULT, _ANSWERED), (), style)
        if with_tool is None or without is None or "Probeville" not in without or _RESULT.content not in without:
            continue
        if with_tool.count("probe_tool") > without.count("probe_tool") >= 1 and '\\"place' not in without:
            return style
    return MessageStyle(has_parts=has_parts, has_no_tools=True)


def _tool_styles(has_parts: bool) -> Iterator[MessageStyle]:
    for is_null, is_text, has_ids in product((False, True), repeat=3):
        yield MessageStyle(has_parts=has_parts, has_null_content=is_null, has_text_arguments=is_text, has_ids=has_ids)


def as_dicts(messages: Sequence[Message], style: MessageStyle) -> list[dict[str, Any]]:
    """Messages as chat templates take them; call ids are made up, in order."""
    dicts: list[dict[str, Any]] = []
    waiting: list[str] = []
    num_calls = 0
    for message in messages:
        content: Any = [{"type": "text", "text": message.content}] if style.has_parts else message.content
        entry: dict[str, Any] = {"role": message.role, "content": content}
        calls = []
        for call in message.tool_calls:
            value = call.arguments if style.has_text_arguments else json.loads(call.arguments)
            entry_call: dict[str, Any] = {"type": "function", "function": {"name": call.name, "arguments": value}}
            if style.has_ids:
                entry_call["id"] = f"call{num_calls:05d}"
                waiting.append(entry_call["id"])
            num_calls += 1
            calls.append(entry_call)
        if calls:
            entry["tool_calls"] = calls
            if style.has_null_content and not message.content:
                entry["content"] = None
        if message.role == "tool" and waiting:
            entry["tool_call_id"] = waiting.pop(0)
        dicts.append(entry)
    return dicts


def write_tools_as_text(
    messages: Sequence[Message], tools: Sequence[Mapping[str, object]] | None, tool_format: ToolFormat
) -> list[Message]:
    """The messages with tools described in the system text and calls written into the answers."""
    written = list(messages)
    described = "".join(piece.text for piece in tool_format.describe_tools(tools)) if tools else ""
    if described and written and written[0].role == "system":
        written[0] = replace(written[0], content=f"{written[0].content}\n\n{described}")
    elif described:
        written.insert(0, Message(role="system", content=described))
    for place, message in enumerate(written):
        if message.tool_calls:
            calls = "".join(piece.text for piece in tool_format.render_calls(message.tool_calls))
            written[place] = replace(message, content=f"{message.content}{calls}", tool_calls=())
    return written


def row_texts(messages: Sequence[Message], tools: Sequence[Mapping[str, object]] | None) -> Iterator[str]:
    """Every text of the row that a template may write."""
    for message in messages:
        yield message.content
        for call in message.tool_calls:
            yield call.name
            yield call.arguments
    for tool in tools or ():
        yield json.dumps(tool, ensure_ascii=False)
