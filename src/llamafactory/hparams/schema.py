"""The JSON Schema of the flat namespace, for editors: all options, and the other names that are understood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamafactory.hparams.known_keys import KnownKeys
from llamafactory.hparams.section import Section, kinds_of

_TEXT = {"type": "string"}


def json_schema(sections: Mapping[str, type[Section]], known: KnownKeys) -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of a configuration file.

    Args:
        sections: name -> class; names that are not a plain section say beside which setting their options count.
        known: other names and keys without effect; they are marked as deprecated.
    """
    properties: dict[str, Any] = {}
    for name, section in sections.items():
        for key, schema in section.model_json_schema().get("properties", {}).items():
            properties[key] = _as_written(schema, section, key, f" Only with {name}." if ": " in name else "")
    for key, alias in known.aliases.items():
        properties.setdefault(key, {"deprecated": True, "description": f"Another name of {alias.to}."})
    for key, why in known.no_effect.items():
        properties.setdefault(key, {"deprecated": True, "description": f"No effect: {why}."})
    for key, entry in known.not_implemented.items():
        text = f"Known, but not implemented in this version; alternative: {entry.instead}."
        properties.setdefault(key, {"deprecated": True, "description": text})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "LLaMA Factory configuration",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _as_written(schema: dict[str, Any], section: type[Section], key: str, suffix: str) -> dict[str, Any]:
    """The schema of one option, with the other forms that a file may hold: comma or JSON text."""
    plain = {name: part for name, part in schema.items() if name not in {"title", "group", "secret"}}
    kinds = kinds_of(section.model_fields[key].annotation)
    types = [part for part in ("type", "anyOf", "items", "additionalProperties", "enum", "const") if part in plain]
    if kinds & {"list", "dict"} and "str" not in kinds:
        given = {part: plain.pop(part) for part in types}
        null = [{"type": "null"}] if "list" in kinds else []
        plain["anyOf"] = [*given.pop("anyOf", [given] if given else []), _TEXT, *null]
    plain["description"] = plain.get("description", "") + suffix
    return plain
