"""The base of every group of options, and what can be said about an option from its field alone.

A section accepts what YAML, JSON, a command line or Python would reasonably give for a field (a comma list for a
list, a number as text, JSON text for a mapping), and refuses what is likely a mistake (true for a number, NaN). It
never reads files and never looks at another section.
"""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, Literal, TypeAlias, Union, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llamafactory.hparams.json_file import unique

Kind: TypeAlias = Literal["bool", "int", "float", "str", "list", "dict", "choice", "none"]

_PLAIN_KINDS: dict[object, Kind] = {bool: "bool", int: "int", float: "float", str: "str", type(None): "none"}
_KIND_TEXT: dict[Kind, str] = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": "a list, or text with commas",
    "dict": "a mapping, or JSON text",
    "none": "null",
}
_BOUND_TEXT = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
_BOOL_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def option(default: Any, help: str, *, group: str, secret: bool = False, **bounds: Any) -> Any:
    """A field of a section.

    Args:
        default: value when the user gives none.
        help: one sentence for `--help`, the docs and the web form.
        group: heading that the option stands under.
        secret: never printed or written down.
        **bounds: pydantic's `ge`, `gt`, `le`, `lt`.
    """
    extra: dict[str, Any] = {"group": group, "secret": True} if secret else {"group": group}
    return Field(default, description=help, json_schema_extra=extra, repr=not secret, **bounds)


class Section(BaseModel):
    """A frozen group of options. Unknown names and wrong values raise pydantic's `ValidationError`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _fit(cls, value: Any, info: ValidationInfo) -> Any:
        return fit_value(value, kinds_of(cls.model_fields[info.field_name or ""].annotation))


def fit_value(value: Any, kinds: frozenset[Kind]) -> Any:
    """Bring a value that people write for a field of these kinds into the form that pydantic takes.

    Raises:
        ValueError: where the value is likely a mistake that pydantic would let pass.
    """
    if value is None:
        return () if "list" in kinds else None
    if isinstance(value, bool):
        if "bool" not in kinds:
            raise ValueError("true and false are not allowed here")
        return value
    if isinstance(value, PurePath):
        return str(value)
    return _fit_text(value, kinds) if isinstance(value, str) else value


def _fit_text(text: str, kinds: frozenset[Kind]) -> Any:
    stripped = text.strip()
    if "list" in kinds:
        if stripped.startswith("["):
            return _from_json(stripped)
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if "dict" in kinds and stripped.startswith("{"):
        return _from_json(stripped)
    if "bool" in kinds and stripped.lower() in _BOOL_WORDS:
        return _BOOL_WORDS[stripped.lower()]
    if kinds & {"str", "choice"}:
        return text
    if "none" in kinds and stripped.lower() in {"null", "none"}:
        return None
    if "int" in kinds and "e" in stripped.lower():
        return float(stripped) if _is_number(stripped) else text
    return stripped


def _from_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at character {error.pos + 1}") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@functools.cache
def kinds_of(annotation: Any) -> frozenset[Kind]:
    """The plain kinds of value that a field's annotation allows."""
    if annotation in _PLAIN_KINDS:
        return frozenset({_PLAIN_KINDS[annotation]})
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return frozenset({"choice"})
    if origin in (Union, types.UnionType):
        return frozenset(kind for part in typing.get_args(annotation) for kind in kinds_of(part))
    if origin is tuple or annotation is tuple:
        return frozenset({"list"})
    if origin is dict or annotation is dict:
        return frozenset({"dict"})
    raise TypeError(f"no option can have the type {annotation!r}")


@functools.cache
def choices_of(annotation: Any) -> tuple[str, ...]:
    """The names that a field's annotation allows; empty where it is not a choice."""
    if typing.get_origin(annotation) is Literal:
        return tuple(str(choice) for choice in typing.get_args(annotation))
    return tuple(choice for part in typing.get_args(annotation) for choice in choices_of(part))


def allowed_text(field: FieldInfo) -> str:
    """What a field takes, in words: `a whole number >= 8`, `one of auto, sdpa`, `text or null`."""
    kinds = kinds_of(field.annotation)
    parts: list[str] = []
    if "choice" in kinds:
        parts.append("one of " + ", ".join(choices_of(field.annotation)))
    for kind in ("bool", "int", "float", "str", "list", "dict"):
        if kind in kinds:
            parts.append(_KIND_TEXT[kind] + (_bounds_text(field) if kind in {"int", "float"} else ""))
    if "none" in kinds:
        parts.append(_KIND_TEXT["none"])
    return " or ".join(parts)


def _bounds_text(field: FieldInfo) -> str:
    found = [
        f"{sign} {getattr(bound, name):g}"
        for name, sign in _BOUND_TEXT
        for bound in field.metadata
        if getattr(bound, name, None) is not None
    ]
    return " " + " and ".join(found) if found else ""


def group_of(field: FieldInfo) -> str:
    """The heading that an option stands under."""
    extra = field.json_schema_extra
    return str(cast("dict[str, Any]", extra).get("group", "")) if isinstance(extra, dict) else ""


def default_of(field: FieldInfo) -> Any:
    """The default of a field, with a factory called."""
    value = field.get_default(call_default_factory=True, validated_data={})
    return None if value is PydanticUndefined else value


def iter_fields(section: type[Section]) -> Iterator[tuple[str, FieldInfo]]:
    """Name and field of every option of a section, in the order of the source."""
    yield from section.model_fields.items()
