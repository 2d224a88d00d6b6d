"""Calls written as one tag for each argument."""

from __future__ import annotations

import re

from llamafactory.data.tool_formats.parts.json_calls import make_call
from llamafactory.data.tool_formats.parts.syntax import Tools
from llamafactory.data.tool_formats.parts.untyped_values import declared_types, read_arguments, read_value, write_value
from llamafactory.data.types import Piece, ToolCall


def field_pieces(call: ToolCall, before: str, between: str, behind: str) -> list[Piece]:
    """`before` name `between` value `behind`, for each argument.

    Raises:
        DataError: the arguments are no JSON object.
    """
    pieces: list[Piece] = []
    for name, value in read_arguments(call).items():
        pieces += [
            Piece(before),
            Piece(name, is_literal=True),
            Piece(between),
            Piece(write_value(value), is_literal=True),
            Piece(behind),
        ]
    return [piece for piece in pieces if piece.text]


def read_fields(
    text: str, position: int, field: re.Pattern[str], name: str, tools: Tools
) -> tuple[ToolCall | None, int]:
    """The call that the fields from a position on make up, and where they end; `field` has groups name and value."""
    arguments: dict[str, object] = {}
    while match := field.match(text, position):
        key, value = match.groups()
        arguments[key] = read_value(value, declared_types(tools, name, key))
        position = match.end()
    return make_call(name, arguments), position
