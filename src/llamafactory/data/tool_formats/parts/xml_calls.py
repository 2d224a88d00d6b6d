"""Calls written as one tag for each argument."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from llamafactory.data.tool_formats.parts.json_calls import make_call
from llamafactory.data.tool_formats.parts.syntax import Block, Tools
from llamafactory.data.tool_formats.parts.untyped_values import declared_types, read_arguments, read_value, write_value
from llamafactory.data.types import Piece, ToolCall


def tagged_calls(
    calls: Sequence[ToolCall], *, opening: str, behind_name: str, field: tuple[str, str, str], closing: str
) -> list[Piece]:
    """One block a call: `opening` name `behind_name`, one `field` for each argument, `closing`.

    Args:
        calls: what is written.
        opening: stands before the name of the tool; a line break stands between two blocks.
        behind_name: stands behind it.
        field: what stands before the name of an argument, before its value, and behind that.
        closing: ends the block.

    Raises:
        DataError: the arguments are no JSON object.
    """
    pieces: list[Piece] = []
    for number, call in enumerate(calls):
        pieces += [
            Piece("\n" if number else ""),
            Piece(opening),
            Piece(call.name, is_literal=True),
            Piece(behind_name),
        ]
        for name, value in read_arguments(call).items():
            written = Piece(write_value(value), is_literal=True)
            pieces += [Piece(field[0]), Piece(name, is_literal=True), Piece(field[1]), written, Piece(field[2])]
        pieces.append(Piece(closing))
    return [piece for piece in pieces if piece.text]


def tagged_reader(
    *, name: re.Pattern[str], field: re.Pattern[str], behind: re.Pattern[str]
) -> Callable[[str, int, Tools], Block | None]:
    """What reads one block, for `Syntax.read`.

    Args:
        name: matches from the start of a block to behind the tool's name, its group.
        field: matches one argument; its groups are name and value.
        behind: matches the end of a block.
    """

    def read(text: str, position: int, tools: Tools) -> Block | None:
        match = name.match(text, position)
        if match is None:
            return None
        call, end = _read_fields(text, match.end(), field, match.group(1), tools)
        closing = behind.match(text, end)
        return Block((call,), closing.end()) if call and closing else None

    return read


def _read_fields(
    text: str, position: int, field: re.Pattern[str], name: str, tools: Tools
) -> tuple[ToolCall | None, int]:
    """The call that the fields from a position on make up, and where they end; `field` has groups name and value."""
    arguments: dict[str, object] = {}
    while match := field.match(text, position):
        key, value = match.groups()
        arguments[key] = read_value(value, declared_types(tools, name, key))
        position = match.end()
    return make_call(name, arguments), position
