"""What is known about names that no section has: other names, keys without effect, keys of later versions."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, cast


@dataclass(frozen=True, kw_only=True)
class Alias:
    """Another name of a key, and how its values translate."""

    to: str
    invert: bool = False
    values: Mapping[str, Any] | None = None
    unset: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NotImplementedKey:
    """A key that would change the run if it could.

    Attributes:
        defaults: values that ask for nothing.
        instead: what to do now.
        only_with: the setting beside which the key matters, or None where it matters alone.
    """

    defaults: tuple[Any, ...]
    instead: str
    only_with: str | None = None


@dataclass(frozen=True, kw_only=True)
class KnownKeys:
    """The content of `known_keys.toml`, by key."""

    aliases: Mapping[str, Alias]
    no_effect: Mapping[str, str]
    not_implemented: Mapping[str, NotImplementedKey]
    not_implemented_values: Mapping[tuple[str, str], str]
    environment: Mapping[str, str]

    def names(self) -> frozenset[str]:
        """All keys that are known here."""
        return frozenset({*self.aliases, *self.no_effect, *self.not_implemented})


@functools.cache
def load_known_keys() -> KnownKeys:
    """Read `known_keys.toml`, which is part of the package."""
    text = resources.files("llamafactory.hparams").joinpath("known_keys.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    not_implemented: dict[str, NotImplementedKey] = {}
    for group in table["not_implemented"]:
        defaults = {key: "null" for key in group.get("unset", [])} | group.get("defaults", {})
        for key, default in defaults.items():
            values = tuple(None if value == "null" else value for value in _as_list(default))
            not_implemented[key] = NotImplementedKey(
                defaults=values, instead=group["instead"], only_with=group.get("only_with")
            )
    return KnownKeys(
        aliases={
            old: Alias(**(entry | {"unset": tuple(entry.get("unset", ()))})) for old, entry in table["alias"].items()
        },
        no_effect={key: group["why"] for group in table["no_effect"] for key in group["keys"]},
        not_implemented=not_implemented,
        not_implemented_values={
            (group["key"], value): group["instead"]
            for group in table["not_implemented_values"]
            for value in group["values"]
        },
        environment=table["environment"],
    )


def asks_for_nothing(value: Any, defaults: tuple[Any, ...]) -> bool:
    """Whether a value means the same as leaving the key out; `0.10`, `"false"` and `null` count as their values."""
    return value is None or value in ("", [], {}) or any(_plain(value) == _plain(default) for default in defaults)


def _plain(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value.strip().lower()
    return value


def _as_list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else [value]
