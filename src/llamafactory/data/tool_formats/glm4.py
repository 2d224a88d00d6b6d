"""GLM-4 and ChatGLM3: the name on a line of its own, a JSON object below it.

Carries all arguments. Names are letters, digits, `_`, `.` and `-`, 64 at most, as in OpenAI's protocol. Text before
the first call must end with a line break.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llamafactory.data.tool_formats.parts.json_calls import make_call, read_object, write_json
from llamafactory.data.tool_formats.parts.results import join_with
from llamafactory.data.tool_formats.parts.syntax import Block, Syntax, Tools
from llamafactory.data.types import Piece, ToolCall

_START = re.compile(r"^[\w.-]{1,64}\n(?=\{)", re.MULTILINE)
_PARTIAL = re.compile(r"^[\w.-]{1,64}\n?\Z", re.MULTILINE)


def describe_tools(tools: Sequence[Mapping[str, object]]) -> list[Piece]:
    """Who the model is, then each tool as indented JSON under its name."""
    pieces = [
        Piece(
            "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
            "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
        )
    ]
    for tool in tools:
        pieces += [
            Piece("\n\n## "),
            Piece(f"{tool.get('name', '')}\n\n{write_json(tool, indent=4)}", is_literal=True),
            Piece("\n在调用上述函数时，请使用 Json 格式表示调用的参数。"),
        ]
    return pieces


def render_calls(calls: Sequence[ToolCall]) -> list[Piece]:
    """Two lines a call."""
    pieces: list[Piece] = []
    for number, call in enumerate(calls):
        pieces += [Piece("\n")] if number else []
        pieces += [
            Piece(call.name, is_literal=True),
            Piece("\n"),
            Piece(call.arguments, is_literal=True),
        ]
    return pieces


def join_results(results: Sequence[str]) -> list[Piece]:
    """Each result as an observation of its own."""
    return join_with("<|observation|>\n", results)


def parse_calls(text: str, tools: Tools = ()) -> tuple[str, tuple[ToolCall, ...]]:
    """As `ToolFormat.parse_calls`."""
    return SYNTAX.parse(text, tools)


def _read(text: str, position: int, tools: Tools) -> Block | None:
    line = text.index("\n", position)
    read = read_object(text, line + 1)
    call = make_call(text[position:line], read[0]) if read else None
    return Block((call,), read[1]) if read and call else None


SYNTAX = Syntax(start=_START, partial=_PARTIAL, end="}", read=_read)
