"""MiniMax-Text-01 and M1: one JSON object a line, all in one `<tool_calls>` block. Carries all arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llamafactory.data.tool_formats.parts.json_calls import call_pieces, read_call, skip_space, write_json
from llamafactory.data.tool_formats.parts.results import join_with
from llamafactory.data.tool_formats.parts.syntax import Block, Syntax, Tools, fixed
from llamafactory.data.types import Piece, ToolCall

_OPEN, _CLOSE = "<tool_calls>", "</tool_calls>"


def describe_tools(tools: Sequence[Mapping[str, object]]) -> list[Piece]:
    """One JSON line a tool, then how to call one."""
    return [
        Piece("You are provided with these tools:\n<tools>\n"),
        Piece("\n".join(write_json(tool) for tool in tools), is_literal=True),
        Piece(
            "\n</tools>\n\nIf you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and "
            "provide tool-name and json-object of arguments, following the format below:\n<tool_calls>\n"
            '{"name": <tool-name-1>, "arguments": <args-json-object-1>}\n...\n</tool_calls>'
        ),
    ]


def render_calls(calls: Sequence[ToolCall]) -> list[Piece]:
    """All calls in one block."""
    pieces = [Piece("<tool_calls>\n")]
    for call in calls:
        pieces += [*call_pieces(call), Piece("\n")]
    return [*pieces, Piece("</tool_calls>")] if calls else []


def join_results(results: Sequence[str]) -> list[Piece]:
    """Results one below the other."""
    return join_with("\n", results)


def parse_calls(text: str, tools: Tools = ()) -> tuple[str, tuple[ToolCall, ...]]:
    """As `ToolFormat.parse_calls`; where the block is cut off, the calls that are whole count."""
    return SYNTAX.parse(text, tools)


def _read(text: str, position: int, tools: Tools) -> Block | None:
    calls: list[ToolCall] = []
    end = position + len(_OPEN)
    while read := read_call(text, skip_space(text, end)):
        calls.append(read[0])
        end = read[1]
    closing = skip_space(text, end)
    if text.startswith(_CLOSE, closing):
        return Block(tuple(calls), closing + len(_CLOSE)) if calls else None
    # A closing tag further on stands inside an argument of a call that has not arrived in full, or behind rubbish.
    return Block(tuple(calls), len(text)) if calls and text.find(_CLOSE, end) < 0 else None


_START, _PARTIAL = fixed(_OPEN)
SYNTAX = Syntax(start=_START, partial=_PARTIAL, end=_CLOSE, read=_read)
