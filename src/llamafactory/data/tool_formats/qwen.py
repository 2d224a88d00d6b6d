"""Qwen 2.5 and 3 (Hermes style): a JSON object in `<tool_call>` tags for each call. Carries all arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llamafactory.data.tool_formats.parts.json_calls import call_pieces, list_tools, read_call, skip_space
from llamafactory.data.tool_formats.parts.results import join_with
from llamafactory.data.tool_formats.parts.syntax import Block, Syntax, Tools, fixed
from llamafactory.data.types import Piece, ToolCall

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def describe_tools(tools: Sequence[Mapping[str, object]]) -> list[Piece]:
    """One JSON line a tool, then how to call one."""
    return [
        Piece(
            "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        ),
        Piece(list_tools(tools), is_literal=True),
        Piece(
            "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
            "<tool_call></tool_call> XML tags:\n<tool_call>\n"
            '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        ),
    ]


def render_calls(calls: Sequence[ToolCall]) -> list[Piece]:
    """One block a call."""
    pieces: list[Piece] = []
    for number, call in enumerate(calls):
        opening = "\n<tool_call>\n" if number else "<tool_call>\n"
        pieces += [Piece(opening), *call_pieces(call), Piece("\n</tool_call>")]
    return pieces


def join_results(results: Sequence[str]) -> list[Piece]:
    """Each result in tags of its own."""
    return join_with("\n</tool_response>\n<tool_response>\n", results)


def parse_calls(text: str, tools: Tools = ()) -> tuple[str, tuple[ToolCall, ...]]:
    """As `ToolFormat.parse_calls`; a closing tag that is missing is forgiven."""
    return SYNTAX.parse(text, tools)


def _read(text: str, position: int, tools: Tools) -> Block | None:
    read = read_call(text, skip_space(text, position + len(_OPEN)))
    if read is None:
        return None
    call, end = read
    closing = skip_space(text, end)
    return Block((call,), closing + len(_CLOSE) if text.startswith(_CLOSE, closing) else end)


_START, _PARTIAL = fixed(_OPEN)
SYNTAX = Syntax(start=_START, partial=_PARTIAL, end=_CLOSE, read=_read)
