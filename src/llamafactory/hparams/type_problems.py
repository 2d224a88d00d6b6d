"""pydantic's complaints in our words: what was given, what is allowed, the nearest name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic.fields import FieldInfo

from llamafactory.extras.errors import Problem
from llamafactory.extras.suggest import did_you_mean
from llamafactory.hparams.read import RawValue
from llamafactory.hparams.run_config import mask_value
from llamafactory.hparams.section import allowed_text, choices_of, kinds_of

_MAX_SHOWN = 80


def type_problem(item: RawValue, detail: Mapping[str, Any], field: FieldInfo) -> Problem:
    """The problem behind one entry of `ValidationError.errors()`."""
    choices = choices_of(field.annotation)
    fix = did_you_mean(str(item.text or item.value), choices) if choices else ""
    return Problem(
        key=item.key,
        origin=item.origin,
        given=shown(item),
        message=_message(item, detail, field),
        allowed=allowed_text(field),
        fix=fix or _fix(item, field),
    )


def shown(item: RawValue) -> str:
    """A raw value as it may be printed: short, without secrets."""
    value = mask_value(item.key, item.value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _message(item: RawValue, detail: Mapping[str, Any], field: FieldInfo) -> str:
    kind = str(detail["type"])
    if item.value is None:
        return "null is not allowed here"
    if kind == "literal_error":
        return "unknown value"
    if kind.startswith(("greater_than", "less_than")):
        return "out of range"
    if kind == "finite_number":
        return "not a finite number"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    inside = ".".join(str(part) for part in detail["loc"][1:] if isinstance(part, int) or "[" not in str(part))
    where = f" at {inside}" if inside and kinds_of(field.annotation) <= {"list", "dict", "none"} else ""
    return f"wrong type{where}: {_name_of(item.value)}"


def _name_of(value: object) -> str:
    names: tuple[tuple[type[Any], str], ...] = (
        (bool, "true or false"),
        (int, "a number"),
        (float, "a number"),
        (str, "text"),
        (Mapping, "a mapping"),
        (list, "a list"),
        (tuple, "a list"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), "something else")


def _fix(item: RawValue, field: FieldInfo) -> str:
    kinds = kinds_of(field.annotation)
    if item.value is None:
        return "leave the key out to take its default"
    if "list" in kinds:
        return "write names with commas, or a YAML list"
    if isinstance(item.value, str) and "," in item.value and kinds & {"int", "float"}:
        return "write a point for decimals, and no comma"
    if isinstance(item.value, list | tuple) and kinds & {"str"}:
        return "write one value"
    return ""
