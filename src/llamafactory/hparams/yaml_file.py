"""A YAML file -> its entries, with line numbers.

Plain data only: no tags, no duplicate keys, aliases and depth are bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from llamafactory.extras.errors import ConfigError, Problem

_MAX_DEPTH = 32
_MAX_NODES = 20_000
_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
_SCALARS = yaml.constructor.SafeConstructor()


@dataclass(frozen=True, kw_only=True)
class YamlEntry:
    """One key at the top of a file. `text` holds the characters of an unquoted scalar; `line` counts from 1."""

    key: str
    value: Any
    line: int
    text: str | None


class _Loader(yaml.SafeLoader):
    """A composer that refuses depth before it recurses into it."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one node; called once for every node of the file."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            mark = self.get_mark()
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {_MAX_DEPTH}", problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def parse_yaml(text: str, name: str) -> list[YamlEntry]:
    """The entries of a configuration file.

    Args:
        text: content of the file.
        name: path for messages.

    Raises:
        ConfigError: with line and column, where the text is not a plain YAML mapping.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_problem(error, name)) from None
    except yaml.YAMLError as error:
        reason = str(getattr(error, "reason", "") or "not YAML")
        raise ConfigError(
            Problem(message=f"not valid YAML: {reason}", origin=name, fix="save it as plain text")
        ) from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise ConfigError(
            Problem(message=f"holds {kind}", origin=name, allowed="`key: value` lines", fix="write one option a line")
        )
    return list(_Reader(name).entries(root))


def _syntax_problem(error: yaml.MarkedYAMLError, name: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    parts = [part for part in (error.context, error.problem) if part]
    message = "not valid YAML: " + ", ".join(parts)
    if error.problem and "cannot start any token" in error.problem:
        fix = "use spaces, not tabs, and put values with special characters in quotes"
    else:
        fix = "check this line and the one before; put values with `: `, `#`, `{` or `[` in quotes"
    return Problem(message=message, origin=place, fix=fix)


class _Reader:
    """Turns nodes into plain values and counts them, aliases expanded."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._num_nodes = 0

    def entries(self, root: yaml.MappingNode) -> Iterator[YamlEntry]:
        """The entries at the top; duplicate keys are an error."""
        for key, value_node in self._pairs(root):
            plain = isinstance(value_node, yaml.ScalarNode) and value_node.style is None
            yield YamlEntry(
                key=key.value,
                value=self._value(value_node, 1),
                line=key.start_mark.line + 1,
                text=value_node.value if plain else None,
            )

    def _pairs(self, node: yaml.MappingNode) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
        """Key and value nodes of a mapping; `<<: *name` entries come first, so that own keys win."""
        merged: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
        own: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
        for key, value in node.value:
            self._count(key)
            if key.tag == _MERGE:
                parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for part in parts:
                    if not isinstance(part, yaml.MappingNode) or part is node:
                        raise self._error(key, "`<<` needs a mapping")
                    for pair in self._pairs(part):
                        merged.setdefault(pair[0].value, pair)
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a key must be a name")
            if key.value in own:
                first = own[key.value][0].start_mark.line + 1
                raise self._error(key, f"'{key.value}' is given twice; first in line {first}", "remove one of the two")
            own[key.value] = (key, value)
        return list((merged | own).values())

    def _value(self, node: yaml.Node, depth: int) -> Any:
        self._count(node)
        if depth > _MAX_DEPTH:
            raise self._error(node, f"nested deeper than {_MAX_DEPTH}, or refers to itself")
        if not node.tag.startswith(_TAG):
            raise self._error(node, f"tag {node.tag!r} is not allowed", "write a plain value")
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return {key.value: self._value(value, depth + 1) for key, value in self._pairs(node)}
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._value(part, depth + 1) for part in node.value]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        raise self._error(node, f"tag {_short_tag(node)!r} is not allowed", "write a plain value")

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind in {"str", "timestamp", "value"}:
            return node.value
        if kind not in {"null", "bool", "int", "float"}:
            raise self._error(node, f"tag {_short_tag(node)!r} is not allowed", "write a plain value")
        try:
            return yaml.SafeLoader.yaml_constructors[node.tag](_SCALARS, node)
        except (ValueError, KeyError, OverflowError):
            raise self._error(node, f"{node.value!r} is not a valid {kind}") from None

    def _count(self, node: yaml.Node) -> None:
        self._num_nodes += 1
        if self._num_nodes > _MAX_NODES:
            raise self._error(
                node, f"more than {_MAX_NODES} values once aliases are expanded", "write less, or no aliases"
            )

    def _error(self, node: yaml.Node, message: str, fix: str | None = None) -> ConfigError:
        mark = node.start_mark
        return ConfigError(
            Problem(
                message=message, origin=f"{self._name}:{mark.line + 1}:{mark.column + 1}", fix=fix or "check this line"
            )
        )


def _short_tag(node: yaml.Node) -> str:
    return node.tag.replace(_TAG, "!!")
