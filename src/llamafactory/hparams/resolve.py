"""Raw values + section classes -> one frozen configuration, or every problem at once. Reads no file itself.

The order: names (aliases, keys without effect, unknown keys), then types and bounds, then rules across fields.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from pydantic import ValidationError

from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.extras.secrets import is_secret_key, mask_text
from llamafactory.hparams.effects import keys_without_effect
from llamafactory.hparams.names import Namespace, SortedKeys, merge_dotted
from llamafactory.hparams.read import COMMAND_LINE, RawValue
from llamafactory.hparams.run_config import RunConfig, mask_value
from llamafactory.hparams.section import Section, kinds_of
from llamafactory.hparams.type_problems import shown, type_problem

_PATH_KEYS = frozenset(
    {
        "model_name_or_path",
        "adapter_name_or_path",
        "cache_dir",
        "dataset_dir",
        "output_dir",
        "export_dir",
        "tokenized_path",
    }
    | {"resume_from_checkpoint"}
)

Check: TypeAlias = Callable[[RunConfig], "Problem | Iterable[Problem] | None"]


@dataclass(frozen=True, kw_only=True)
class ResolvedValue:
    """One option of the run: its value, where it came from (`default` where nobody set it), its section."""

    key: str
    value: Any
    origin: str
    section: str


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """What became of a configuration; `config` is None where there are problems."""

    config: RunConfig | None
    values: tuple[ResolvedValue, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def require(self) -> RunConfig:
        """The configuration.

        Raises:
            ConfigError: with all problems.
        """
        if self.config is None:
            raise ConfigError(self.problems)
        return self.config


def resolve(raw: Sequence[RawValue], names: Namespace, *, command: str, checks: Sequence[Check] = ()) -> Resolution:
    """Make a configuration of raw values, or say everything that is wrong with them."""
    sorted_keys = SortedKeys(names)
    merged, lost = merge_dotted(raw, names)
    for item in merged:
        sorted_keys.add(item)
    sections, type_problems = _build_sections(sorted_keys.given, names)
    config = RunConfig(command=command, **sections)
    problems = [*lost, *sorted_keys.problems, *type_problems]
    silent = {problem.key for problem in problems} | sorted_keys.probably_meant
    for problem in _run_checks(config, checks):
        if problem.key not in silent:
            problems.append(_with_origin(problem, sorted_keys.given))
    notes = [*sorted_keys.notes(), *_effect_notes(config, sorted_keys), *_secret_notes(sorted_keys.given)]
    return Resolution(
        config=None if problems else config,
        values=tuple(_values(config, sorted_keys.given)),
        notes=tuple(notes),
        problems=tuple(problems),
    )


def _build_sections(given: Mapping[str, RawValue], names: Namespace) -> tuple[dict[str, Any], list[Problem]]:
    sections: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, section in names.sections.items():
        values = {key: _written(given[key], section) for key in section.model_fields if key in given}
        try:
            sections[name] = section(**values)
        except ValidationError as error:
            bad = {str(detail["loc"][0]): detail for detail in reversed(error.errors(include_url=False))}
            for key in section.model_fields:
                if key in bad:
                    problems.append(type_problem(given[key], bad[key], section.model_fields[key]))
            sections[name] = section(**{key: value for key, value in values.items() if key not in bad})
    return sections, problems


def _written(item: RawValue, section: type[Section]) -> Any:
    """The value as the field shall read it.

    Where a field takes text only, that is the unquoted characters of a YAML scalar (`no`, `007`, `1e5`); in
    paths, `~/` is the home folder.
    """
    kinds = kinds_of(section.model_fields[item.key].annotation)
    wants_text = bool(kinds & {"str", "choice", "list"}) and not kinds & {"bool", "int", "float"}
    value = item.text if wants_text and item.text is not None and item.value is not None else item.value
    if isinstance(value, str) and item.key in _PATH_KEYS and "~/" in value:
        return ",".join(os.path.expanduser(part.strip()) for part in value.split(","))
    return value


def _run_checks(config: RunConfig, checks: Sequence[Check]) -> Iterable[Problem]:
    for check in checks:
        found = check(config)
        if isinstance(found, Problem):
            yield found
        elif found is not None:
            yield from found


def _with_origin(problem: Problem, given: Mapping[str, RawValue]) -> Problem:
    """Fill in where the key of a problem was set, and what was given there."""
    item = given.get(problem.key or "")
    if item is None:
        return problem
    message = mask_text(problem.message)  # a rule may quote the value
    return replace(problem, origin=problem.origin or item.origin, given=problem.given or shown(item), message=message)


def _effect_notes(config: RunConfig, keys: SortedKeys) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for key, why in {**keys.inactive, **keys_without_effect(config, keys.given)}.items():
        reasons.setdefault(why, []).append(key)
    if not reasons:
        return []
    return ["no effect in this run:\n" + "\n".join(f"  {', '.join(found)}: {why}" for why, found in reasons.items())]


def _secret_notes(given: Mapping[str, RawValue]) -> list[str]:
    from_words = [key for key, item in given.items() if item.origin == COMMAND_LINE and item.value]
    secrets = [key for key in from_words if is_secret_key(key)]
    if not secrets:
        return []
    return [
        f"warning: {', '.join(secrets)} on the command line can be read by every user of this machine; "
        "set HF_TOKEN in the environment, or run `hf auth login`"
    ]


def _values(config: RunConfig, given: Mapping[str, RawValue]) -> Iterable[ResolvedValue]:
    for name, section in config.sections():
        for key, value in section.model_dump(mode="json").items():
            origin = given[key].origin if key in given else "default"
            yield ResolvedValue(key=key, value=mask_value(key, value), origin=origin, section=name)
