"""Mistral: a JSON list of calls behind `[TOOL_CALLS]`, which the template's function slot writes.

Carries all arguments. The mark may be missing where special tokens were left out of the text, so a JSON answer of just
this shape reads as a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llamafactory.data.tool_formats.parts.json_calls import call_pieces, read_call, wrap_tool, write_json
from llamafactory.data.tool_formats.parts.results import join_with
from llamafactory.data.tool_formats.parts.syntax import Block, Syntax, Tools, fixed
from llamafactory.data.types import Piece, ToolCall

_MARK, _OBJECT = "[TOOL_CALLS]", '{"name"'


def describe_tools(tools: Sequence[Mapping[str, object]]) -> list[Piece]:
    """All tools as one JSON list."""
    listing = write_json([wrap_tool(tool) for tool in tools])
    return [Piece("[AVAILABLE_TOOLS] "), Piece(listing, is_literal=True), Piece("[/AVAILABLE_TOOLS]")]


def render_calls(calls: Sequence[ToolCall]) -> list[Piece]:
    """A list of objects, without the mark."""
    pieces: list[Piece] = []
    for number, call in enumerate(calls):
        pieces += [Piece(", " if number else "["), *call_pieces(call)]
    return [*pieces, Piece("]")] if pieces else []


def join_results(results: Sequence[str]) -> list[Piece]:
    """Each result in a block of its own."""
    return join_with('}[/TOOL_RESULTS][TOOL_RESULTS] {"content": ', results)


def parse_calls(text: str, tools: Tools = ()) -> tuple[str, tuple[ToolCall, ...]]:
    """As `ToolFormat.parse_calls`."""
    return SYNTAX.parse(text, tools)


def _read(text: str, position: int, tools: Tools) -> Block | None:
    read = read_call(text, text.index(_OBJECT, position))
    return Block((read[0],), read[1]) if read else None


_START, _PARTIAL = fixed(*(before + _OBJECT for before in ("", "[", f"{_MARK}[", f"{_MARK} [", f"{_MARK} ", _MARK)))
SYNTAX = Syntax(start=_START, partial=_PARTIAL, end="}", read=_read)
