"""Argument values written without quotes, as XML-like syntaxes do: what is text and what is a number.

Writing loses the difference between the text `12` and the number 12. The tool's schema settles it where there is one;
without a schema, what reads as JSON (a number, true, false, null, a list, an object) is taken as that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from llamafactory.data.tool_formats.parts.json_calls import write_json
from llamafactory.data.tool_formats.parts.syntax import Tools
from llamafactory.data.types import ToolCall
from llamafactory.extras.errors import DataError


def read_arguments(call: ToolCall) -> dict[str, Any]:
    """The call's arguments as an object.

    Raises:
        DataError: the arguments are no JSON object.
    """
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise DataError(
            f"the arguments of a call of '{call.name}' are no JSON object",
            found=call.arguments[:80],
            expected='{"argument": value, ...}: the syntax of this model names every argument',
        )
    return cast("dict[str, Any]", arguments)


def write_value(value: object) -> str:
    """Text as it is, anything else as JSON."""
    return value if isinstance(value, str) else write_json(value)


def declared_types(tools: Tools, tool: str, argument: str) -> frozenset[str]:
    """JSON types that the tool's schema allows for an argument; empty where it does not say."""
    for given in tools:
        if given.get("name") == tool:
            parameters = _mapping(given.get("parameters"))
            return frozenset(_types(_mapping(_mapping(parameters.get("properties")).get(argument))))
    return frozenset()


def read_value(text: str, types: frozenset[str]) -> object:
    """The value that a text stands for, given the types that the schema allows."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text
    kind = _kind(value)
    if not types:
        return text if kind == "string" else value
    if kind in types or (kind == "integer" and "number" in types):
        return text if kind == "string" else value
    return text if "string" in types else value


def _types(schema: Mapping[str, object]) -> set[str]:
    given = schema.get("type")
    names = [given] if isinstance(given, str) else given if isinstance(given, Sequence) else []
    types = {name.lower() for name in names if isinstance(name, str)}
    for key in ("anyOf", "oneOf"):
        for choice in cast("Sequence[object]", schema.get(key) or ()):
            types |= _types(_mapping(choice)) if isinstance(choice, Mapping) else set()
    return types


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def _mapping(value: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else {}


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")
