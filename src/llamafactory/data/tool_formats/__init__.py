"""Tool-call syntaxes, one file each, looked up by file name.

A file offers three functions beside `render_calls` pieces: what `ToolFormat` lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol, cast

from llamafactory.data.types import Piece, ToolCall
from llamafactory.extras.errors import DataError
from llamafactory.extras.suggest import did_you_mean


class ToolFormat(Protocol):
    """What a file in this folder offers, as module functions. Text of a row is marked literal, markup is not."""

    @staticmethod
    def describe_tools(tools: Sequence[Mapping[str, object]]) -> list[Piece]:
        """The text that tells the model which tools there are."""
        ...

    @staticmethod
    def render_calls(calls: Sequence[ToolCall]) -> list[Piece]:
        """Calls as the model writes them."""
        ...

    @staticmethod
    def join_results(results: Sequence[str]) -> list[Piece]:
        """Results of several calls, as one content of the observation slot."""
        ...

    @staticmethod
    def parse_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """The text before the calls, and the calls; no calls where the text holds none that can be read."""
        ...


@cache
def find_tool_format(name: str) -> ToolFormat:
    """The tool format of that name.

    Raises:
        DataError: there is no such file.
    """
    names = sorted(module.name for module in iter_modules(__path__))
    if name not in names:
        raise DataError(
            f"unknown tool format '{name}'",
            where="tool_format",
            expected=", ".join(names),
            fix=did_you_mean(name, names) or None,
        )
    return cast(ToolFormat, import_module(f"{__name__}.{name}"))
