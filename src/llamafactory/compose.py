"""Command line, YAML, JSON or dict -> RunConfig.

Joins what `hparams` must not know: stages, adapters, templates, data sets. The options of a stage and of
an adapter live in that stage's or adapter's file, which is found by name.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from llamafactory.extras.errors import ConfigError, DataError, Problem
from llamafactory.extras.log import note, warn
from llamafactory.extras.network import go_offline, send_no_telemetry
from llamafactory.extras.suggest import did_you_mean
from llamafactory.hparams.checks import CHECKS
from llamafactory.hparams.known_keys import load_known_keys
from llamafactory.hparams.names import Namespace, namespace_for
from llamafactory.hparams.offline_checks import OFFLINE_CHECKS
from llamafactory.hparams.path_checks import PATH_CHECKS
from llamafactory.hparams.predict_checks import PREDICT_CHECKS
from llamafactory.hparams.read import RawValue, Source, read_source
from llamafactory.hparams.reference_checks import REFERENCE_CHECKS
from llamafactory.hparams.resolve import Resolution, resolve
from llamafactory.hparams.run_config import SECTIONS, RunConfig
from llamafactory.hparams.section import Section
from llamafactory.hparams.sharding import check_sharding

__all__ = ["all_sections", "load_config", "plugin_names", "resolve_config"]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A kind of file that brings options: which key names it, and in which package it is."""

    key: str
    package: str
    default: str
    title: str


_STAGE = _Kind(key="stage", package="llamafactory.train.stages", default="sft", title="stage")
_ADAPTER = _Kind(
    key="finetuning_type", package="llamafactory.model.adapters", default="lora", title="fine-tuning method"
)


def load_config(source: Source, *, command: str = "train") -> RunConfig:
    """The configuration of a run; what the user should know about it is said on stderr.

    One with `offline: true` takes this process off the network, before any library is imported that could use it.

    Args:
        source: words of a command line, path of a YAML or JSON file, or a mapping.
        command: `train`, `chat`, `score`, `export` or `data`; decides which keys must be there.

    Raises:
        ConfigError: with all problems.
    """
    send_no_telemetry()
    resolution = resolve_config(source, command=command)
    for text in resolution.notes:
        if text.startswith("warning: "):
            warn(text.removeprefix("warning: "), once=True)
        else:
            note(text, once=True)
    config = resolution.require()
    if config.model.offline:
        go_offline()
    return config


def resolve_config(source: Source, *, command: str = "train") -> Resolution:
    """Like `load_config`, but problems are returned, with the origin of every value. Never raises `ConfigError`."""
    try:
        raw = read_source(source)
    except ConfigError as error:
        return Resolution(config=None, problems=error.problems)
    problems = list(_environment_problems())
    stage = _chosen_options(_STAGE, raw, problems)
    adapter = _chosen_options(_ADAPTER, raw, problems)
    names = namespace_for(load_known_keys(), stage or Section, adapter or Section)
    if _has_foreign_key(raw, names):
        names = replace(names, spare=_spare_options(stage, adapter), allow_unknown=_is_on("ALLOW_EXTRA_ARGS"))
    broken = {problem.key for problem in problems}
    usable = [item for item in raw if item.key not in broken]
    checks = (
        *CHECKS,
        *PREDICT_CHECKS,
        *REFERENCE_CHECKS,
        *OFFLINE_CHECKS,
        *PATH_CHECKS,
        check_sharding,
        _check_model_hub,
        _check_template,
        _check_datasets,
    )
    resolution = resolve(usable, names, command=command, checks=checks)
    if not problems:
        return resolution
    return replace(resolution, config=None, problems=(*problems, *resolution.problems))


def all_sections() -> dict[str, type[Section]]:
    """Every section there is: those of each run, then the options of each stage and each adapter."""
    found = dict(SECTIONS)
    for kind in (_STAGE, _ADAPTER):
        for name in plugin_names(kind.package):
            options = _load_options(kind, name)
            if isinstance(options, type) and options.model_fields:
                found[f"{kind.key}: {name}"] = options
    return found


def plugin_names(package: str) -> list[str]:
    """The names of the files in a package's folder, `__init__` and private files left out."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return sorted(file.stem for folder in folders for file in Path(folder).glob("[!_]*.py"))


def _chosen_options(kind: _Kind, raw: Sequence[RawValue], problems: list[Problem]) -> type[Section] | None:
    """The options of the stage or adapter that was asked for; a problem is appended where there are none."""
    item = next((item for item in reversed(raw) if item.key == kind.key and item.value is not None), None)
    if item is not None and not isinstance(item.value, str):
        return None
    name = item.value if item else kind.default
    found = _load_options(kind, name)
    if isinstance(found, type):
        return found
    problems.append(
        Problem(
            key=kind.key,
            origin=item.origin if item else "default",
            given=name,
            message=found.message,
            allowed=found.allowed,
            fix=found.fix,
        )
    )
    return None


def _load_options(kind: _Kind, name: str) -> type[Section] | Problem:
    """The class `Options` of a file, or what is wrong with that file or name."""
    module_name = name if "." in name else f"{kind.package}.{name}"
    try:
        is_there = bool(name) and not name.startswith("_") and find_spec(module_name) is not None
    except (ImportError, ValueError, AttributeError):
        is_there = False
    if not is_there:
        return _unknown_name(kind, name)
    try:
        options = importlib.import_module(module_name).Options
    except Exception as error:  # noqa: BLE001  a broken file is reported as itself, whatever its fault is
        return Problem(
            message=f"{kind.title} '{name}' is there, but cannot be loaded: {type(error).__name__}: {error}",
            fix=f"repair the module {module_name}",
        )
    if not (isinstance(options, type) and issubclass(options, Section)):
        return Problem(message=f"Options of {module_name} is not a Section", fix="see CONTRIBUTING")
    return options


def _unknown_name(kind: _Kind, name: str) -> Problem:
    choices = plugin_names(kind.package)
    instead = load_known_keys().not_implemented_values.get((kind.key, name))
    return Problem(
        message="known, but not implemented in this version" if instead else f"unknown {kind.title}",
        allowed=f"{', '.join(choices)}, or the dotted path of a module",
        fix=instead or did_you_mean(name, choices) or None,
    )


def _has_foreign_key(raw: Iterable[RawValue], names: Namespace) -> bool:
    """Whether a key is no field of the sections in use, so that other stages and adapters are worth a look."""
    fields = {key for section in names.sections.values() for key in section.model_fields}
    return any(item.key not in fields for item in raw)


def _spare_options(*in_use: type[Section] | None) -> dict[str, type[Section]]:
    return {name: options for name, options in all_sections().items() if ": " in name and options not in in_use}


def _environment_problems() -> Iterable[Problem]:
    for name, fix in load_known_keys().environment.items():
        if _is_on(name):
            yield Problem(
                key=name,
                origin="environment",
                given=os.environ[name],
                message="known, but not implemented in this version",
                fix=fix,
            )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() in {"true", "y", "1"}


def _check_model_hub(config: RunConfig) -> Problem | None:
    """The switches for other hubs choose where data sets come from; models come from folders or Hugging Face."""
    name = config.model.model_name_or_path
    switch = next((name for name in ("USE_MODELSCOPE_HUB", "USE_OPENMIND_HUB") if _is_on(name)), None)
    if switch is None or not name or "/" not in name or Path(name).exists():
        return None
    return Problem(
        key="model_name_or_path",
        given=name,
        message=f"{switch} is on, and models are only loaded from folders or from Hugging Face",
        fix="download the model and give its folder, or unset the switch",
    )


def _check_template(config: RunConfig) -> Problem | None:
    if config.data.template in (None, "auto"):
        return None
    from llamafactory.data.chat_template import find_record

    try:
        find_record(config.data.template)
    except DataError as error:
        return Problem(key="template", message=error.what, allowed=error.expected, fix=error.fix)
    return None


def _check_datasets(config: RunConfig) -> Iterable[Problem]:
    if config.command not in ("train", "data", "score") or not (config.data.dataset or config.data.eval_dataset):
        return ()
    if config.model.offline:
        go_offline()  # the list of data sets may lie on a hub
    from llamafactory.data.registry import check_datasets
    from llamafactory.data.sources.access import access_of

    return check_datasets(config.data, access_of(config.data, config.model))
