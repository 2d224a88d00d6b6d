"""Gemma 4: `call:name{key:value}` between two special tokens; a third one, `<|"|>`, quotes text.

Keys are sorted, as the published template does. Cannot carry text that holds `<|"|>`, tool names that hold `{`, or
arguments that are no object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import cast

from llamafactory.data.tool_formats.parts.json_calls import make_call, write_json
from llamafactory.data.tool_formats.parts.results import join_with
from llamafactory.data.tool_formats.parts.syntax import Block, Syntax, Tools, fixed
from llamafactory.data.tool_formats.parts.untyped_values import read_arguments
from llamafactory.data.types import Piece, ToolCall

_OPEN, _CLOSE, _QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_NAME = re.compile(r"(?:<\|tool>)?<\|tool_call>call:([^{}\n]+)(?=\{)")
_BARE_KEY = re.compile(r"[\w.-]+")
_SCALAR = re.compile(r"true|false|null|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_MAX_DEPTH = 100


def describe_tools(tools: Sequence[Mapping[str, object]]) -> list[Piece]:
    """One declaration a tool."""
    pieces: list[Piece] = []
    for tool in tools:
        parameters = _mapping(tool.get("parameters"))
        declared: list[Piece] = _described(tool)
        if parameters:
            declared += [Piece(",parameters:{" if declared else "parameters:{"), *_schema(parameters), Piece("}")]
        pieces += [Piece("declaration:"), _text(tool.get("name")), Piece("{"), *declared, Piece("}")]
    return pieces


def render_calls(calls: Sequence[ToolCall]) -> list[Piece]:
    """One block a call."""
    pieces: list[Piece] = []
    for call in calls:
        opening = [Piece(f"{_OPEN}call:"), Piece(call.name, is_literal=True)]
        pieces += [*opening, *_value(read_arguments(call)), Piece(_CLOSE)]
    return pieces


def join_results(results: Sequence[str]) -> list[Piece]:
    """Results one below the other."""
    return join_with("\n", results)


def parse_calls(text: str, tools: Tools = ()) -> tuple[str, tuple[ToolCall, ...]]:
    """As `ToolFormat.parse_calls`; a closing token that is missing is forgiven."""
    return SYNTAX.parse(text, tools)


def _schema(schema: Mapping[str, object]) -> list[Piece]:
    """`properties`, `required` and `type` of an object, without its braces."""
    parts: list[list[Piece]] = []
    if properties := _mapping(schema.get("properties")):
        fields = _joined(
            [[_text(key), Piece(":{"), *_field(properties[key]), Piece("}")] for key in _order(properties)]
        )
        parts.append([Piece("properties:{"), *fields, Piece("}")])
    if required := schema.get("required"):
        parts.append([Piece("required:"), *_value(required)])
    return _joined([*parts, *_type(schema)])


def _field(given: object) -> list[Piece]:
    field = _mapping(given)
    described = _described(field)
    parts = [described] if described else []
    if items := _mapping(field.get("items")):
        inner = [part for part in (_described(items), _schema(items)) if part]
        parts.append([Piece("items:{"), *_joined(inner), Piece("}")])
    if field.get("nullable"):
        parts.append([Piece("nullable:true")])
    rest = _schema(field) if str(field.get("type")).upper() == "OBJECT" else _joined(_type(field))
    return _joined([*parts, *([rest] if rest else [])])


def _described(fields: Mapping[str, object]) -> list[Piece]:
    about = fields.get("description")
    return [Piece("description:"), *_value(str(about))] if about else []


def _type(fields: Mapping[str, object]) -> list[list[Piece]]:
    kind = fields.get("type")
    named = [str(name).upper() for name in cast("list[object]", kind)] if isinstance(kind, list) else str(kind).upper()
    return [[Piece("type:"), *_value(named)]] if kind else []


def _value(value: object) -> list[Piece]:
    match value:
        case str():
            return [Piece(_QUOTE), Piece(value, is_literal=True), Piece(_QUOTE)]
        case dict():
            fields = cast("dict[str, object]", value)
            return [Piece("{"), *_joined([[*_key(key), *_value(fields[key])] for key in _order(fields)]), Piece("}")]
        case list() | tuple():
            return [Piece("["), *_joined([_value(inner) for inner in cast("list[object]", value)]), Piece("]")]
        case _:
            return [Piece(write_json(value))]


def _key(name: str) -> list[Piece]:
    quote = [] if _BARE_KEY.fullmatch(name) else [Piece(_QUOTE)]
    return [*quote, Piece(name, is_literal=True), *quote, Piece(":")]


def _order(fields: Mapping[str, object]) -> list[str]:
    return sorted(fields, key=str.lower)


def _joined(parts: Sequence[list[Piece]]) -> list[Piece]:
    return [piece for number, part in enumerate(parts) for piece in ([Piece(",")] if number else []) + part]


def _text(value: object) -> Piece:
    return Piece(str(value), is_literal=True)


def _mapping(value: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else {}


def _read(text: str, position: int, tools: Tools) -> Block | None:
    match = _NAME.match(text, position)
    if match is None:
        return None
    try:
        arguments, end = _read_value(text, match.end(), 0)
    except ValueError:
        return None
    call = make_call(match.group(1), arguments)
    return Block((call,), end + len(_CLOSE) if text.startswith(_CLOSE, end) else end) if call else None


def _read_value(text: str, position: int, depth: int) -> tuple[object, int]:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deep")
    if text.startswith(_QUOTE, position):
        start = position + len(_QUOTE)
        end = text.index(_QUOTE, start)
        return text[start:end], end + len(_QUOTE)
    if text[position : position + 1] in ("{", "["):
        return _read_items(text, position, depth)
    match = _SCALAR.match(text, position)
    if match is None:
        raise ValueError("no value")
    return json.loads(match.group()), match.end()


def _read_items(text: str, position: int, depth: int) -> tuple[object, int]:
    """An object or a list."""
    is_object = text[position] == "{"
    closing = "}" if is_object else "]"
    fields: dict[str, object] = {}
    items: list[object] = []
    position += 1
    while not text.startswith(closing, position):
        if fields or items:
            if not text.startswith(",", position):
                raise ValueError("no comma")
            position += 1
        if is_object:
            key, position = _read_key(text, position)
            fields[key], position = _read_value(text, position, depth + 1)
        else:
            item, position = _read_value(text, position, depth + 1)
            items.append(item)
    return (fields if is_object else items), position + 1


def _read_key(text: str, position: int) -> tuple[str, int]:
    if text.startswith(_QUOTE, position):
        start = position + len(_QUOTE)
        end = text.index(_QUOTE, start)
        name, position = text[start:end], end + len(_QUOTE)
    else:
        match = _BARE_KEY.match(text, position)
        name, position = (match.group(), match.end()) if match else ("", position)
    if not text.startswith(":", position):
        raise ValueError("no key")
    return name, position + 1


_START, _PARTIAL = fixed(_OPEN, f"<|tool>{_OPEN}")
SYNTAX = Syntax(start=_START, partial=_PARTIAL, end=_CLOSE, read=_read)
