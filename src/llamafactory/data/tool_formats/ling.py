"""Ling 2: calls as Qwen writes them, under a description of its own. Carries all arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llamafactory.data.tool_formats import qwen
from llamafactory.data.types import Piece

SYNTAX = qwen.SYNTAX
render_calls, join_results, parse_calls = qwen.render_calls, qwen.join_results, qwen.parse_calls


def describe_tools(tools: Sequence[Mapping[str, object]]) -> list[Piece]:
    """One JSON line a tool, how to call one, and the switch that ends a system text of this family."""
    first, *others = qwen.describe_tools(tools)
    return [Piece(first.text.lstrip("\n")), *others, Piece("\ndetailed thinking off")]
