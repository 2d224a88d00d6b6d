"""Seed-OSS: `<seed:tool_call>` around a function and one `<parameter=name>` block for each argument.

Values have no quotes: the tool's schema tells the text `12` from the number 12. Cannot carry values that hold
`</parameter>`, names that hold `>` or a line break, or arguments that are no object. The function's tag is written
without its `>`, as rows for this template are known; both spellings are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llamafactory.data.tool_formats.parts.json_calls import write_json
from llamafactory.data.tool_formats.parts.results import join_with
from llamafactory.data.tool_formats.parts.syntax import Syntax, Tools, fixed
from llamafactory.data.tool_formats.parts.xml_calls import tagged_calls, tagged_reader
from llamafactory.data.types import Piece, ToolCall

_NAME = re.compile(r"<seed:tool_call>\s*<function=([^>\n]+)>?")
_FIELD = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)
_BEHIND = re.compile(r"\s*</function>(?:\s*</seed:tool_call>)?")


def describe_tools(tools: Sequence[Mapping[str, object]]) -> list[Piece]:
    """All tools as one JSON list, then how to call one."""
    return [
        Piece(
            "system\nYou are Doubao, a helpful AI assistant. You may call one or more functions to assist with the "
            "user query.Tool List:\nYou are authorized to use the following tools (described in JSON Schema format). "
            "Before performing any task, you must decide how to call them based on the descriptions and parameters of "
            "these tools.\n"
        ),
        Piece(write_json(list(tools)), is_literal=True),
        Piece(
            "\n工具调用请遵循如下格式:\n<seed:tool_call>\n<function=example_function_name>\n"
            "<parameter=example_parameter_1>value_1</parameter>\n<parameter=example_parameter_2>This is the value for "
            "the second parameter\nthat can span\nmultiple lines</parameter>\n</function>\n</seed:tool_call>\n"
        ),
    ]


def render_calls(calls: Sequence[ToolCall]) -> list[Piece]:
    """One block a call."""
    return tagged_calls(
        calls,
        opening="<seed:tool_call>\n<function=",
        behind_name="\n",
        field=("<parameter=", ">", "</parameter>\n"),
        closing="</function>\n</seed:tool_call>",
    )


def join_results(results: Sequence[str]) -> list[Piece]:
    """Results one below the other."""
    return join_with("\n", results)


def parse_calls(text: str, tools: Tools = ()) -> tuple[str, tuple[ToolCall, ...]]:
    """As `ToolFormat.parse_calls`; a missing `</seed:tool_call>` is forgiven."""
    return SYNTAX.parse(text, tools)


_READ = tagged_reader(name=_NAME, field=_FIELD, behind=_BEHIND)
_START, _PARTIAL = fixed("<seed:tool_call>")
SYNTAX = Syntax(start=_START, partial=_PARTIAL, end="</function>", read=_READ)
