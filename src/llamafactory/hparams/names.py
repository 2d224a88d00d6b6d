"""What the flat names can mean in a run, and the sorting of raw values by it.

A name is a field of a section in use, a field of a stage or an adapter that is not in use, another name of a field, a
key without effect, a key of a later version, or unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from llamafactory.extras.errors import Problem
from llamafactory.extras.suggest import did_you_mean, near_matches
from llamafactory.hparams.json_file import unique
from llamafactory.hparams.known_keys import KnownKeys, asks_for_nothing
from llamafactory.hparams.read import RawValue
from llamafactory.hparams.run_config import SECTIONS
from llamafactory.hparams.section import Kind, Section, choices_of, kinds_of
from llamafactory.hparams.type_problems import shown

_LATER = "known, but not implemented in this version"


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """What the flat names can mean in this run.

    Attributes:
        sections: name -> class of every section in use, those of the stage and the adapter included.
        spare: `finetuning_type: lora` -> its options, for stages and adapters that are there but not in use.
        known: other names, and keys that no section has.
        allow_unknown: unknown keys give a note, not a problem.
    """

    sections: Mapping[str, type[Section]]
    known: KnownKeys
    spare: Mapping[str, type[Section]] = field(default_factory=dict[str, "type[Section]"])
    allow_unknown: bool = False


def namespace_for(known: KnownKeys, stage: type[Section], adapter: type[Section]) -> Namespace:
    """The namespace of a run with the options of this stage and this adapter."""
    return Namespace(sections={**SECTIONS, "stage_options": stage, "adapter_options": adapter}, known=known)


def merge_dotted(raw: Sequence[RawValue], names: Namespace) -> tuple[list[RawValue], list[Problem]]:
    """Later values replace earlier ones; `a.b=c` sets an entry of the mapping `a`, which may stand there as JSON text.

    Returns:
        The values, and a problem where `a` is the path of a file, whose entries would all be lost.
    """
    problems: list[Problem] = []
    merged: dict[str, RawValue] = {}
    for item in raw:
        root, _, path = item.key.partition(".")
        field_kinds = _kinds_by_key(names).get(root, frozenset())
        if path and "dict" in field_kinds:
            before = _mapping_of(merged[root].value if root in merged else None)
            if isinstance(before, str):
                message = f"sets an entry of {root}, and {root} is the file {before}"
                fix = f"write the entry into a copy of the file, or its content into the YAML, as a mapping {root}"
                problems.append(Problem(key=item.key, origin=item.origin, message=message, fix=fix))
                continue
            merged[root] = replace(item, key=root, value=_set_path(before, path.split("."), item.value), text=None)
        else:
            merged.pop(item.key, None)
            merged[item.key] = item
    return list(merged.values()), problems


def _mapping_of(value: Any) -> Any:
    """The mapping that a JSON text holds; other text as it is, None for nothing."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return value.strip() or None
    return found if isinstance(found, dict) else None


def _set_path(before: Any, path: list[str], value: Any) -> dict[str, Any]:
    """A copy of a mapping with one entry set; anything that is no mapping counts as an empty one."""
    mapping: Mapping[str, Any] = cast("Mapping[str, Any]", before) if isinstance(before, Mapping) else dict[str, Any]()
    head, rest = path[0], path[1:]
    return {**mapping, head: _set_path(mapping.get(head), rest, value) if rest else value}


def _kinds_by_key(names: Namespace) -> dict[str, frozenset[Kind]]:
    return {
        key: kinds_of(info.annotation)
        for section in names.sections.values()
        for key, info in section.model_fields.items()
    }


def _listed(owners: Sequence[str]) -> str:
    """`stage: dpo`, `stage: kto` -> `stage: dpo or kto`."""
    names: dict[str, list[str]] = {}
    for owner in owners:
        kind, _, name = owner.partition(": ")
        names.setdefault(kind, []).append(name)
    return ", or with ".join(f"{kind}: {' or '.join(found)}" for kind, found in names.items())


class SortedKeys:
    """Sorts raw values by what their names mean."""

    def __init__(self, names: Namespace) -> None:
        self._names = names
        self._fields = {key for section in names.sections.values() for key in section.model_fields}
        self._renamed: list[str] = []
        self._no_effect: dict[str, list[str]] = {}
        self._unknown: list[str] = []
        self.given: dict[str, RawValue] = {}
        self.inactive: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.probably_meant: set[str] = set()

    def add(self, item: RawValue) -> None:
        """Sort one raw value in."""
        known = self._names.known
        if item.key in self._fields:
            self._add_field(item)
        elif owners := [owner for owner, options in self._names.spare.items() if item.key in options.model_fields]:
            self.inactive[item.key] = f"only with {_listed(owners)}"
        elif item.key in known.aliases:
            self._add_alias(item)
        elif item.key in known.no_effect:
            self._no_effect.setdefault(known.no_effect[item.key], []).append(item.key)
        elif item.key in known.not_implemented:
            self._add_not_implemented(item)
        else:
            self._add_unknown(item)

    def notes(self) -> list[str]:
        """What happened to keys that are not used under the name that was given."""
        notes: list[str] = []
        if self._renamed:
            notes.append("other names: " + "; ".join(self._renamed))
        if self._no_effect:
            lines = [f"  {', '.join(keys)}: {why}" for why, keys in self._no_effect.items()]
            notes.append("accepted, without effect:\n" + "\n".join(lines))
        if self._unknown:
            notes.append("unknown keys are ignored because ALLOW_EXTRA_ARGS is on: " + ", ".join(self._unknown))
        return notes

    def _add_field(self, item: RawValue) -> None:
        before = self.given.get(item.key)
        if before is not None and before.value != item.value:
            self.problems.append(
                _problem(
                    item, "given twice with different values, under two names", fix=f"keep one; see {before.origin}"
                )
            )
            return
        instead = self._names.known.not_implemented_values.get((item.key, str(item.text or item.value)))
        if instead and not self._is_choice(item):
            self.problems.append(_problem(item, _LATER, fix=instead))
            return
        self.given[item.key] = item

    def _is_choice(self, item: RawValue) -> bool:
        section = next(s for s in self._names.sections.values() if item.key in s.model_fields)
        choices = choices_of(section.model_fields[item.key].annotation)
        return not choices or str(item.text or item.value) in choices

    def _add_alias(self, item: RawValue) -> None:
        alias = self._names.known.aliases[item.key]
        value, text = item.value, item.text
        if asks_for_nothing(value, alias.unset):
            return
        if alias.invert:
            value, text = _inverted(value), None
        if alias.values is not None:
            word = str(value).lower()
            if word not in alias.values:
                message = "known, but not implemented with this value"
                self.problems.append(_problem(item, message, allowed="one of " + ", ".join(alias.values)))
                return
            value, text = alias.values[word], None
        self._renamed.append(f"{item.key} is {'not ' if alias.invert else ''}{alias.to}")
        self.add(replace(item, key=alias.to, value=value, text=text))

    def _add_not_implemented(self, item: RawValue) -> None:
        entry = self._names.known.not_implemented[item.key]
        if asks_for_nothing(item.value, entry.defaults):
            return
        if entry.only_with is not None:
            self.inactive[item.key] = f"only with {entry.only_with}"
            return
        self.problems.append(_problem(item, _LATER, fix=f"alternative: {entry.instead}"))

    def _add_unknown(self, item: RawValue) -> None:
        if self._names.allow_unknown:
            self._unknown.append(item.key)
            return
        candidates = self._fields | self._names.known.names()
        for section in self._names.spare.values():
            candidates = candidates | set(section.model_fields)
        self.probably_meant.update(near_matches(item.key, sorted(candidates)))
        hint = did_you_mean(item.key, sorted(candidates))
        fix = hint or "see the list of keys: llamafactory-cli train --help"
        self.problems.append(_problem(item, "unknown key", fix=fix))


def _inverted(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    word = str(value).strip().lower()
    if word in {"true", "yes", "on", "1"}:
        return False
    return True if word in {"false", "no", "off", "0"} else value


def _problem(item: RawValue, message: str, *, allowed: str | None = None, fix: str | None = None) -> Problem:
    return Problem(key=item.key, origin=item.origin, given=shown(item), message=message, allowed=allowed, fix=fix)
