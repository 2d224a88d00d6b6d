"""Qwen 3.5 and 3.6 (as Qwen3-Coder): `<function=name>` with one `<parameter=name>` block for each argument.

Values have no quotes: the tool's schema tells the text `12` from the number 12. Cannot carry values that hold
`</parameter>`, names that hold `>` or a line break, or arguments that are no object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llamafactory.data.tool_formats.parts.json_calls import write_json
from llamafactory.data.tool_formats.parts.results import join_with
from llamafactory.data.tool_formats.parts.syntax import Syntax, Tools, fixed
from llamafactory.data.tool_formats.parts.xml_calls import tagged_calls, tagged_reader
from llamafactory.data.types import Piece, ToolCall

_NAME = re.compile(r"<tool_call>\s*<function=([^>\n]+)>")
_FIELD = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_BEHIND = re.compile(r"\s*</function>(?:\s*</tool_call>)?")


def describe_tools(tools: Sequence[Mapping[str, object]]) -> list[Piece]:
    """One JSON line a tool, then how to call one."""
    return [
        Piece("\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>\n"),
        Piece("\n".join(write_json(tool) for tool in tools), is_literal=True),
        Piece(
            "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
            "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
            "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\n"
            "multiple lines\n</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n"
            "- Function calls MUST follow the specified format: an inner <function=...></function> block must be "
            "nested within <tool_call></tool_call> XML tags\n"
            "- Required parameters MUST be specified\n"
            "- You may provide optional reasoning for your function call in natural language BEFORE the function "
            "call, but NOT after\n"
            "- If there is no function call available, answer the question like normal with your current knowledge "
            "and do not tell the user about function calls\n</IMPORTANT>"
        ),
    ]


def render_calls(calls: Sequence[ToolCall]) -> list[Piece]:
    """One block a call."""
    return tagged_calls(
        calls,
        opening="<tool_call>\n<function=",
        behind_name=">\n",
        field=("<parameter=", ">\n", "\n</parameter>\n"),
        closing="</function>\n</tool_call>",
    )


def join_results(results: Sequence[str]) -> list[Piece]:
    """Each result in tags of its own."""
    return join_with("\n</tool_response>\n<tool_response>\n", results)


def parse_calls(text: str, tools: Tools = ()) -> tuple[str, tuple[ToolCall, ...]]:
    """As `ToolFormat.parse_calls`; a missing `</tool_call>` is forgiven."""
    return SYNTAX.parse(text, tools)


_READ = tagged_reader(name=_NAME, field=_FIELD, behind=_BEHIND)
_START, _PARTIAL = fixed("<tool_call>")
SYNTAX = Syntax(start=_START, partial=_PARTIAL, end="</function>", read=_READ)
