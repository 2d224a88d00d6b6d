"""Calls written as JSON objects, and JSON as all formats write it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llamafactory.data.types import Piece, ToolCall

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"\s*")


def write_json(value: object, indent: int | None = None) -> str:
    """JSON text, other scripts as they are."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def wrap_tool(tool: Mapping[str, object]) -> Mapping[str, object]:
    """The description inside OpenAI's wrapper."""
    return {"type": "function", "function": tool}


def list_tools(tools: Sequence[Mapping[str, object]]) -> str:
    """One wrapped description a line."""
    return "\n".join(write_json(wrap_tool(tool)) for tool in tools)


def call_pieces(call: ToolCall, key: str = "arguments") -> list[Piece]:
    """`{"name": ..., "arguments": ...}`, with another key for the arguments where asked."""
    return [
        Piece('{"name": "'),
        Piece(write_json(call.name)[1:-1], is_literal=True),
        Piece(f'", "{key}": '),
        Piece(call.arguments, is_literal=True),
        Piece("}"),
    ]


def skip_space(text: str, position: int) -> int:
    """Where the next character that is no white space stands."""
    match = _SPACE.match(text, position)
    return match.end() if match else position


def read_object(text: str, position: int) -> tuple[dict[str, Any], int] | None:
    """The JSON object that starts at a position, and its end."""
    try:
        value, end = _DECODER.raw_decode(text, position)
    except (ValueError, RecursionError):  # ValueError: not JSON, or a number too long to read
        return None
    return (value, end) if isinstance(value, dict) else None


def read_call(text: str, position: int, key: str = "arguments") -> tuple[ToolCall, int] | None:
    """The call that a JSON object at a position describes, and the object's end."""
    read = read_object(text, position)
    if read is None:
        return None
    fields, end = read
    arguments = fields.get(key)
    if isinstance(arguments, str):  # some models write the object as a text
        inner = read_object(arguments, skip_space(arguments, 0))
        arguments = inner[0] if inner else None
    call = make_call(fields.get("name"), arguments)
    return (call, end) if call else None


def make_call(name: object, arguments: object) -> ToolCall | None:
    """A call of what was read; None where the name is no name or the arguments are no object."""
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
        return None
    try:
        text = write_json(arguments)
        f"{name}{text}".encode()
    except UnicodeEncodeError:  # a lone half of a surrogate pair, which no UTF-8 text can hold
        text, name = json.dumps(arguments), name.encode("utf-8", "replace").decode("utf-8")
    except (ValueError, RecursionError):
        return None
    return ToolCall(name=name, arguments=text)
