"""A JSON file -> its entries, with line numbers. Duplicate keys, NaN and deep nesting are refused."""

from __future__ import annotations

import json
import re
from typing import Any, cast

from llamafactory.extras.errors import ConfigError, Problem

_SPACE = re.compile(r"[\s,:]*")


def parse_json(text: str, name: str) -> list[tuple[str, Any, int]]:
    """Key, value and line (from 1) of the entries of a JSON object.

    Args:
        text: content of the file.
        name: path for messages.

    Raises:
        ConfigError: with line and column, where the text is not a JSON object.
    """
    try:
        whole = json.loads(text, object_pairs_hook=unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"{name}:{error.lineno}:{error.colno}"
        message = f"not valid JSON: {error.msg[0].lower()}{error.msg[1:]}"
        fix = "check quotes and commas; JSON knows no comments and no comma before a closing bracket"
        raise ConfigError(Problem(message=message, origin=place, fix=fix)) from None
    except RecursionError:
        raise ConfigError(Problem(message="nested too deeply", origin=name, fix="write a flat object")) from None
    except ValueError as error:
        raise ConfigError(Problem(message=str(error), origin=name, fix="check this key")) from None
    if not isinstance(whole, dict):
        kind = "a list" if isinstance(whole, list) else "a single value"
        raise ConfigError(Problem(message=f"holds {kind}", origin=name, allowed='one object: {"key": value, ...}'))
    lines = _lines_of_keys(text)
    return [(key, value, lines[key]) for key, value in cast("dict[str, Any]", whole).items()]


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The entries of a JSON object.

    Raises:
        ValueError: a key is given twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"'{key}' is given twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _lines_of_keys(text: str) -> dict[str, int]:
    """Line of each key of the outermost object of a valid JSON text."""
    decoder = json.JSONDecoder()
    lines: dict[str, int] = {}
    position = text.index("{") + 1
    while True:
        position = _skip(text, position)
        if text[position] == "}":
            return lines
        line = text.count("\n", 0, position) + 1
        key, position = decoder.raw_decode(text, position)
        lines[key] = line
        _, position = decoder.raw_decode(text, _skip(text, position))


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position
