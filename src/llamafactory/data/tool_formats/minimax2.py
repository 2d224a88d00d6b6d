"""MiniMax-M2: `<invoke name="...">` with one `<parameter name="...">` for each argument.

Values have no quotes: the tool's schema tells the text `12` from the number 12. Cannot carry values that hold
`</parameter>`, names that hold `"` or a line break, or arguments that are no object. Calls are written without the
`<minimax:tool_call>` around them, as rows for this template are known; both spellings are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llamafactory.data.tool_formats.parts.json_calls import write_json
from llamafactory.data.tool_formats.parts.results import join_with
from llamafactory.data.tool_formats.parts.syntax import Syntax, Tools, fixed
from llamafactory.data.tool_formats.parts.xml_calls import tagged_calls, tagged_reader
from llamafactory.data.types import Piece, ToolCall

_NAME = re.compile(r'(?:<minimax:tool_call>\s*)?<invoke name="([^"\n]+)">')
_FIELD = re.compile(r'\s*<parameter name="([^"\n]+)">(.*?)</parameter>', re.DOTALL)
_BEHIND = re.compile(r"\s*</invoke>(?:\s*</minimax:tool_call>)?")


def describe_tools(tools: Sequence[Mapping[str, object]]) -> list[Piece]:
    """One tagged JSON line a tool, then how to call one."""
    pieces = [
        Piece(
            "\n\n# Tools\n\nYou may call one or more tools to assist with the user query.\n"
            "Here are the tools available in JSONSchema format:\n\n<tools>\n"
        )
    ]
    for tool in tools:
        pieces += [Piece("<tool>"), Piece(write_json(tool), is_literal=True), Piece("</tool>\n")]
    usage = (
        "</tools>\n\nWhen making tool calls, use XML format to invoke tools and pass parameters:\n\n"
        '<minimax:tool_call>\n<invoke name="tool-name-1">\n<parameter name="param-key-1">param-value-1</parameter>\n'
        '<parameter name="param-key-2">param-value-2</parameter>\n...\n</invoke>\n</minimax:tool_call>'
    )
    return [*pieces, Piece(usage)]


def render_calls(calls: Sequence[ToolCall]) -> list[Piece]:
    """One block a call."""
    return tagged_calls(
        calls,
        opening='<invoke name="',
        behind_name='">\n',
        field=('<parameter name="', '">', "</parameter>\n"),
        closing="</invoke>",
    )


def join_results(results: Sequence[str]) -> list[Piece]:
    """Each result in tags of its own."""
    return join_with("</response>\n<response>", results)


def parse_calls(text: str, tools: Tools = ()) -> tuple[str, tuple[ToolCall, ...]]:
    """As `ToolFormat.parse_calls`."""
    return SYNTAX.parse(text, tools)


_READ = tagged_reader(name=_NAME, field=_FIELD, behind=_BEHIND)
_START, _PARTIAL = fixed("<minimax:tool_call>", "<invoke name=")
SYNTAX = Syntax(start=_START, partial=_PARTIAL, end="</invoke>", read=_READ)
