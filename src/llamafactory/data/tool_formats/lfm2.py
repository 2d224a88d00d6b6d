"""LFM2: a Python list of calls with keyword arguments, between two special tokens.

Values are Python literals, read as literals and never run. Argument names that are no Python names are written as
`**{...}`. Cannot carry tool names that are not dotted Python names, or arguments that are no object.
"""

from __future__ import annotations

import ast
import keyword
import re
import warnings
from collections.abc import Mapping, Sequence

from llamafactory.data.tool_formats.parts.json_calls import make_call, write_json
from llamafactory.data.tool_formats.parts.results import join_with
from llamafactory.data.tool_formats.parts.syntax import Block, Syntax, Tools, fixed
from llamafactory.data.tool_formats.parts.untyped_values import read_arguments
from llamafactory.data.types import Piece, ToolCall

_OPEN, _CLOSE = "<|tool_call_start|>", "<|tool_call_end|>"
_BODY = re.compile(
    r"""(?:[^"'<]++|"(?:[^"\\]|\\.)*+"|'(?:[^'\\]|\\.)*+'|<(?!\|tool_call_(?:start|end)\|>))*+""", re.DOTALL
)
_CONSTANTS = {"true": True, "false": False, "null": None}


def describe_tools(tools: Sequence[Mapping[str, object]]) -> list[Piece]:
    """All tools as one JSON list."""
    return [
        Piece("List of tools: <|tool_list_start|>"),
        Piece(write_json(list(tools)), is_literal=True),
        Piece("<|tool_list_end|>"),
    ]


def render_calls(calls: Sequence[ToolCall]) -> list[Piece]:
    """All calls in one list."""
    pieces: list[Piece] = []
    for number, call in enumerate(calls):
        opening = Piece(", " if number else f"{_OPEN}[")
        pieces += [opening, Piece(f"{call.name}({_write_arguments(read_arguments(call))})", is_literal=True)]
    return [*pieces, Piece(f"]{_CLOSE}")] if pieces else []


def join_results(results: Sequence[str]) -> list[Piece]:
    """Each result as a message of its own."""
    return join_with("<|tool_response_end|><|im_end|>\n<|im_start|>tool\n<|tool_response_start|>", results)


def parse_calls(text: str, tools: Tools = ()) -> tuple[str, tuple[ToolCall, ...]]:
    """As `ToolFormat.parse_calls`; a closing token that is missing is forgiven."""
    return SYNTAX.parse(text, tools)


def _write_arguments(arguments: Mapping[str, object]) -> str:
    plain = {name: value for name, value in arguments.items() if name.isidentifier() and not keyword.iskeyword(name)}
    others = {name: value for name, value in arguments.items() if name not in plain}
    written = [f"{name}={_write(value)}" for name, value in plain.items()]
    return ", ".join([*written, f"**{_write(others)}"] if others else written)


def _write(value: object) -> str:
    match value:
        case dict():
            return "{" + ", ".join(f"{_write(key)}: {_write(inner)}" for key, inner in value.items()) + "}"
        case list():
            return f"[{', '.join(_write(inner) for inner in value)}]"
        case str():
            return write_json(value)
        case _:
            return repr(value)


def _read(text: str, position: int, tools: Tools) -> Block | None:
    match = _BODY.match(text, position + len(_OPEN))  # the closing token may stand inside a quoted argument
    end = match.end() if match else position
    is_closed = text.startswith(_CLOSE, end)
    if match is None or not (is_closed or end == len(text)):
        return None
    calls = _read_list(match.group())
    return Block(calls, end + len(_CLOSE) if is_closed else end) if calls else None


def _read_list(source: str) -> tuple[ToolCall, ...]:
    """The calls in the source of a Python list; none where it is anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown escapes in strings
            body = ast.parse(source.strip(), mode="eval").body
        listed = body.elts if isinstance(body, ast.List) else [body]
        return tuple(_call(node) for node in listed)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return ()


def _call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with keyword arguments")
    arguments: dict[str, object] = {}
    for given in node.keywords:
        value = _literal(given.value)
        if given.arg is not None:
            arguments[given.arg] = value
        elif isinstance(value, dict):
            arguments |= value
        else:
            raise ValueError("** before a value that is no dictionary")
    call = make_call(ast.unparse(node.func) if _is_dotted_name(node.func) else None, arguments)
    if call is None:
        raise ValueError("not a call by name")
    return call


def _is_dotted_name(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _literal(node: ast.expr) -> object:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str()):
            return node.value
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.List() | ast.Tuple():
            return [_literal(inner) for inner in node.elts]
        case ast.Dict():
            return {_key(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case _:
            raise ValueError("not a literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("a key that is no text")


_START, _PARTIAL = fixed(_OPEN)
SYNTAX = Syntax(start=_START, partial=_PARTIAL, end=_CLOSE, read=_read)
