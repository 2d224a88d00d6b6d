"""Tools and tool calls as rows carry them -> the canonical form. Shared by the row formats."""

from __future__ import annotations

import json
from collections.abc import Mapping

from llamafactory.data.row_error import RowError, describe, read_json, read_text
from llamafactory.data.types import ToolCall

_EXPECTED_CALL = '{"name": ..., "arguments": {...}} or a list of such objects'


def read_tools(value: object, field: str) -> tuple[Mapping[str, object], ...] | None:
    """Function descriptions, from JSON text or from a list, without OpenAI's wrapper; None where there is no value.

    Raises:
        RowError: not a list of objects with a `name`.
    """
    if isinstance(value, str):
        value = read_json(read_text(value, field), field, "the tools text") if value.strip() else None
    if value is None:
        return None
    listed = [value] if isinstance(value, Mapping) else value
    if not isinstance(listed, list):
        raise RowError("the tools are not a list", field=field, found=describe(value), expected="a list of tools")
    return tuple(_read_tool(tool, f"{field}[{place}]") for place, tool in enumerate(listed))


def _read_tool(tool: object, field: str) -> Mapping[str, object]:
    inner = tool.get("function") if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping) else tool
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise RowError(
            "a tool without a name", field=field, found=describe(tool), expected='{"name": ..., "parameters": {...}}'
        )
    return inner


def read_call(value: object, field: str) -> ToolCall:
    """One call `{name, arguments}`; the arguments become JSON text.

    Raises:
        RowError: another shape, or arguments that are not JSON.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"]:
        raise RowError("a tool call without a name", field=field, found=describe(value), expected=_EXPECTED_CALL)
    if "arguments" not in value:
        raise RowError("a tool call without arguments", field=field, found=describe(value), expected=_EXPECTED_CALL)
    arguments = value["arguments"]
    if isinstance(arguments, str):
        text = read_text(arguments, f"{field}.arguments").strip() or "{}"
        read_json(text, f"{field}.arguments", "the arguments text")
    else:
        text = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(name=read_text(value["name"], f"{field}.name"), arguments=read_text(text, f"{field}.arguments"))


def split_calls(text: str, field: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Text before the JSON (a thought, say), and the calls in the JSON that ends the text.

    Raises:
        RowError: the text does not end with JSON, or the JSON is not a call.
    """
    value, start = _trailing_json(text, field)
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise RowError("no tool call", field=field, found="an empty list", expected=_EXPECTED_CALL)
    return text[:start], tuple(read_call(call, field) for call in listed)


def _trailing_json(text: str, field: str) -> tuple[object, int]:
    decoder = json.JSONDecoder()
    end = len(text.rstrip())
    start = 0
    while True:
        places = [place for place in (text.find("{", start), text.find("[", start)) if place >= 0]
        if not places:
            break
        start = min(places)
        try:
            value, stop = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            stop = -1
            value = None
        if stop == end:
            return value, start
        start = start + 1 if stop < 0 else stop
    raise RowError(
        "the tool call is not JSON",
        field=field,
        found=describe(text),
        expected=_EXPECTED_CALL,
        fix="check quotes and brackets; text may stand before the JSON, not behind it",
    )


def read_train(message: Mapping[str, object], field: str) -> bool | None:
    """The mark `train` of a message: whether it carries loss, None where it does not say.

    Raises:
        RowError: not a boolean.
    """
    value = message.get("train")
    if value is not None and not isinstance(value, bool):
        raise RowError("not a boolean", field=f"{field}.train", found=describe(value), expected="true or false")
    return value


def read_weight(message: Mapping[str, object], field: str) -> float:
    """The mark `weight` of a message: how much its tokens count in the loss.

    Raises:
        RowError: not a number from 0 up.
    """
    value = message.get("weight")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise RowError("not a weight", field=f"{field}.weight", found=describe(value), expected="a number from 0 up")
    return float(value)
