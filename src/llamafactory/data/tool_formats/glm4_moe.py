"""GLM-4.5 and later: a name and one pair of tags for each argument in `<tool_call>`.

Values have no quotes: the tool's schema tells the text `12` from the number 12. Cannot carry values that hold
`</arg_value>`, argument names that hold `<`, tool names with white space, or arguments that are no object. Calls and
results are written as in the published template of GLM-4.5; a last call that is left open is read, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llamafactory.data.tool_formats.parts.json_calls import list_tools
from llamafactory.data.tool_formats.parts.results import join_with
from llamafactory.data.tool_formats.parts.syntax import Syntax, Tools, fixed
from llamafactory.data.tool_formats.parts.xml_calls import tagged_calls, tagged_reader
from llamafactory.data.types import Piece, ToolCall

_CLOSE = "</tool_call>"
_NAME = re.compile(r"<tool_call>\s*([^\s<>{]+)")
_FIELD = re.compile(r"\s*<arg_key>([^<]*)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_BEHIND = re.compile(r"\s*(?:</tool_call>|(?=<tool_call>)|\Z)")


def describe_tools(tools: Sequence[Mapping[str, object]]) -> list[Piece]:
    """One JSON line a tool, then how to call one."""
    return [
        Piece(
            "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        ),
        Piece(list_tools(tools), is_literal=True),
        Piece(
            "\n</tools>\n\nFor each function call, output the function name and arguments within the following XML "
            "format:\n<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>"
            "\n<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>\n"
        ),
    ]


def render_calls(calls: Sequence[ToolCall]) -> list[Piece]:
    """One block a call."""
    return tagged_calls(
        calls,
        opening="<tool_call>",
        behind_name="",
        field=("\n<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>"),
        closing="\n</tool_call>",
    )


def join_results(results: Sequence[str]) -> list[Piece]:
    """Each result in tags of its own."""
    return join_with("\n</tool_response>\n<tool_response>\n", results)


def parse_calls(text: str, tools: Tools = ()) -> tuple[str, tuple[ToolCall, ...]]:
    """As `ToolFormat.parse_calls`."""
    return SYNTAX.parse(text, tools)


_READ = tagged_reader(name=_NAME, field=_FIELD, behind=_BEHIND)
_START, _PARTIAL = fixed("<tool_call>")
SYNTAX = Syntax(start=_START, partial=_PARTIAL, end=_CLOSE, read=_READ)
