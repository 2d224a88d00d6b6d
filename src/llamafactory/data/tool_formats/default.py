"""The plain-text syntax for models without one of their own: `Action: name` and `Action Input: {json}`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llamafactory.data.tool_formats.parts.json_calls import read_object
from llamafactory.data.tool_formats.parts.syntax import Block, Syntax, Tools, fixed
from llamafactory.data.types import Piece, ToolCall

_MARK = "Action:"
_START = re.compile(r"Action:(?=(?:(?!Action:)[^\n]){1,200}\n[ \t]*Action Input:)")
_CALL = re.compile(r"Action:([^\n]*)\n[ \t]*Action Input:[ \t]*")


def describe_tools(tools: Sequence[Mapping[str, object]]) -> list[Piece]:
    """Each tool with its arguments, then how to call one."""
    listing = "\n".join(_describe(tool) for tool in tools)
    names = ", ".join(str(tool.get("name", "")) for tool in tools)
    return [
        Piece("You have access to the following tools:\n"),
        Piece(listing, is_literal=True),
        Piece("\nUse the following format if using a tool:\n```\nAction: tool name (one of ["),
        Piece(names, is_literal=True),
        Piece(
            "])\nAction Input: the input to the tool, in a JSON format representing the kwargs "
            '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
        ),
    ]


def render_calls(calls: Sequence[ToolCall]) -> list[Piece]:
    """One `Action` and one `Action Input` line for each call."""
    pieces: list[Piece] = []
    for number, call in enumerate(calls):
        pieces += [
            Piece("\nAction: " if number else "Action: "),
            Piece(call.name, is_literal=True),
            Piece("\nAction Input: "),
            Piece(call.arguments, is_literal=True),
        ]
    return pieces


def join_results(results: Sequence[str]) -> list[Piece]:
    """Results one below the other."""
    return [Piece("\n".join(results), is_literal=True)]


def parse_calls(text: str, tools: Tools = ()) -> tuple[str, tuple[ToolCall, ...]]:
    """As `ToolFormat.parse_calls`.

    A call is an `Action: name` line above an `Action Input:` line that goes on with a JSON object.
    """
    return SYNTAX.parse(text, tools)


def _read(text: str, position: int, tools: Tools) -> Block | None:
    match = _CALL.match(text, position)
    read = read_object(text, match.end()) if match else None
    if match is None or read is None or not (name := match.group(1).strip()):
        return None
    return Block((ToolCall(name=name, arguments=text[match.end() : read[1]]),), read[1])


def _describe(tool: Mapping[str, object]) -> str:
    parameters = tool.get("parameters")
    schema = parameters if isinstance(parameters, Mapping) else {}
    properties = schema.get("properties")
    required = schema.get("required")
    needed = set(required) if isinstance(required, Sequence) else set()
    lines = [f"> Tool Name: {tool.get('name', '')}\nTool Description: {tool.get('description', '')}\nTool Args:\n"]
    for name, given in (properties if isinstance(properties, Mapping) else {}).items():
        field = given if isinstance(given, Mapping) else {}
        marks = ", required" if name in needed else ""
        kind, about = field.get("type", ""), field.get("description", "")
        lines.append(f"  - {name} ({kind}{marks}): {about}{_choices(field)}\n")
    return "".join(lines)


def _choices(field: Mapping[str, object]) -> str:
    text = ""
    if isinstance(enum := field.get("enum"), Sequence) and enum:
        text += f", should be one of [{', '.join(str(choice) for choice in enum)}]"
    if isinstance(items := field.get("items"), Mapping) and items:
        text += f", where each item should be {items.get('type', '')}"
    return text


_OPENING, _PARTIAL = fixed(_MARK)
SYNTAX = Syntax(opening=_OPENING, start=_START, partial=_PARTIAL, end="}", read=_read)
