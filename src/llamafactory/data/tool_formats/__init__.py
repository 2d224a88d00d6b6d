"""Tool-call syntaxes, one file each, looked up by file name; `parts` holds what they share.

A file offers what `ToolFormat` lists. Special tokens of a syntax must still be in the text that is parsed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol, cast

from llamafactory.data.tool_formats.parts.stream import CallStream, Streamed
from llamafactory.data.tool_formats.parts.syntax import Syntax
from llamafactory.data.types import Piece, ToolCall
from llamafactory.extras.errors import DataError
from llamafactory.extras.suggest import did_you_mean

__all__ = ["CallStream", "Streamed", "ToolFormat", "find_tool_format", "tool_format_names"]


class ToolFormat(Protocol):
    """What a file in this folder offers, as module functions. Text of a row is marked literal, markup is not."""

    SYNTAX: Syntax
    """How calls are found: `CallStream(tool_format.SYNTAX, tools)` reads an answer that arrives in pieces."""

    @staticmethod
    def describe_tools(tools: Sequence[Mapping[str, object]]) -> list[Piece]:
        """The text that tells the model which tools there are."""
        ...

    @staticmethod
    def render_calls(calls: Sequence[ToolCall]) -> list[Piece]:
        """Calls as the model writes them.

        Raises:
            DataError: the syntax names every argument, and a call's arguments are no JSON object.
        """
        ...

    @staticmethod
    def join_results(results: Sequence[str]) -> list[Piece]:
        """Results of several calls, as one content of the observation slot.

        The slot holds what stands around one result; this adds what stands between two.
        """
        ...

    @staticmethod
    def parse_calls(text: str, tools: Sequence[Mapping[str, object]] = ()) -> tuple[str, tuple[ToolCall, ...]]:
        """The text before the calls, and the calls; no calls where the text holds none that can be read.

        Never raises and takes time linear in the text. `tools` tell arguments that are text from numbers, where the
        syntax does not.
        """
        ...


def tool_format_names() -> tuple[str, ...]:
    """Names of all tool formats, sorted."""
    return tuple(sorted(module.name for module in iter_modules(__path__) if not module.ispkg))


@cache
def find_tool_format(name: str) -> ToolFormat:
    """The tool format of that name.

    Raises:
        DataError: there is no such file.
    """
    names = tool_format_names()
    if name not in names:
        raise DataError(
            f"unknown tool format '{name}'",
            where="tool_format",
            expected=", ".join(names),
            fix=did_you_mean(name, names) or None,
        )
    return cast(ToolFormat, import_module(f"{__name__}.{name}"))
