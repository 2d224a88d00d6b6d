"""Llama 3.1 and later: a bare JSON object `{"name": ..., "parameters": {...}}`, a list of them for several calls.

Carries all arguments. A JSON answer of just this shape reads as a call: the syntax has no mark of its own. The
description names the day on which it is written, as the published template does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llamafactory.data.day import today
from llamafactory.data.tool_formats.parts.json_calls import call_pieces, read_call, wrap_tool, write_json
from llamafactory.data.tool_formats.parts.results import join_with
from llamafactory.data.tool_formats.parts.syntax import Block, Syntax, Tools, fixed
from llamafactory.data.types import Piece, ToolCall

NAMES_DAY = True
"""The text is another one tomorrow, so that rows tokenised today must be tokenised again."""
_OBJECT = '{"name"'
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def describe_tools(tools: Sequence[Mapping[str, object]]) -> list[Piece]:
    """The dates, how to call a tool, and one indented JSON object a tool."""
    date = today()
    day = f"{date.day:02} {_MONTHS[date.month - 1]} {date.year}"
    return [
        Piece(
            f"Cutting Knowledge Date: December 2023\nToday Date: {day}\n\nYou have access to the following functions. "
            'To call a function, please respond with JSON for a function call. Respond in the format {"name": '
            'function name, "parameters": dictionary of argument name and its value}. Do not use variables.\n\n'
        ),
        Piece("".join(write_json(wrap_tool(tool), indent=4) + "\n\n" for tool in tools), is_literal=True),
    ]


def render_calls(calls: Sequence[ToolCall]) -> list[Piece]:
    """One object, or a list of objects."""
    pieces: list[Piece] = []
    for number, call in enumerate(calls):
        pieces += [Piece(", ")] if number else []
        pieces += call_pieces(call, "parameters")
    return [Piece("["), *pieces, Piece("]")] if len(calls) > 1 else pieces


def join_results(results: Sequence[str]) -> list[Piece]:
    """Results one below the other."""
    return join_with("\n", results)


def parse_calls(text: str, tools: Tools = ()) -> tuple[str, tuple[ToolCall, ...]]:
    """As `ToolFormat.parse_calls`."""
    return SYNTAX.parse(text, tools)


def _read(text: str, position: int, tools: Tools) -> Block | None:
    read = read_call(text, text.index(_OBJECT, position), "parameters")
    return Block((read[0],), read[1]) if read else None


_START, _PARTIAL = fixed(*(before + _OBJECT for before in ("", "[", "<|python_tag|>", "<|python_tag|>[")))
SYNTAX = Syntax(start=_START, partial=_PARTIAL, end="}", read=_read)
