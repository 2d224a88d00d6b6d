"""Sources of a configuration -> raw values, each with where it came from. Nothing is judged here but the form.

Sources: a YAML or JSON file; command-line words (`file.yaml key=value`, `--key value`, `--key=value`, `--flag`); a
mapping.
Later values win over earlier ones, so the command line wins over the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.extras.secrets import mask_text
from llamafactory.extras.suggest import near_matches

COMMAND_LINE = "command line"
Source: TypeAlias = Sequence[str] | str | Path | Mapping[str, Any]

_MAX_FILE_BYTES = 1_000_000
_YAML, _JSON = {".yaml", ".yml"}, {".json"}
_ASSIGNMENT = re.compile(r"(?:--)?([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
_FLAG = re.compile(r"--([A-Za-z_][\w.-]*)")


@dataclass(frozen=True, kw_only=True)
class RawValue:
    """One key as the user wrote it.

    Attributes:
        key: flat name of the option; `a.b` sets one entry of the mapping `a`.
        value: as the file format understands it; text from a command line stays text.
        origin: `train.yaml:12`, `command line` or `dict`.
        text: the characters of an unquoted YAML scalar, so that `no` or `007` can still be text where text is wanted.
    """

    key: str
    value: Any
    origin: str
    text: str | None = None


def read_source(source: Source) -> list[RawValue]:
    """Read a source of any kind.

    Raises:
        ConfigError: where the form is wrong: no such file, broken YAML, a word that is no option.
    """
    if isinstance(source, Mapping):
        return _read_mapping(source)
    if isinstance(source, str | Path):
        return _read_file(Path(source))
    return _read_words(list(source))


def _read_mapping(source: Mapping[str, Any]) -> list[RawValue]:
    keys: list[object] = list(source)
    wrong = [key for key in keys if not isinstance(key, str)]
    if wrong:
        raise ConfigError(
            Problem(message=f"key {key!r} is not text", origin="dict", fix="write the name of an option")
            for key in wrong
        )
    return [RawValue(key=key, value=value, origin="dict") for key, value in source.items()]


def _read_words(words: list[str]) -> list[RawValue]:
    """The words of a command line, without the program and the command."""
    found: list[RawValue] = []
    problems: list[Problem] = []
    if words and _looks_like_file(words[0]):
        try:
            found += _read_file(Path(words[0]))
        except ConfigError as error:
            problems += error.problems
        words = words[1:]
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        flag = _FLAG.fullmatch(word)
        assignment = _ASSIGNMENT.fullmatch(word)
        if flag:
            values = _values_of_flag(words, position)
            position += len(values)
            value: Any = "true" if not values else values[0] if len(values) == 1 else values
            found.append(_word_value(flag.group(1), value))
        elif assignment:
            found.append(_word_value(assignment.group(1), assignment.group(2)))
        else:
            problems.append(_bad_word(word))
    if problems:
        raise ConfigError(problems)
    return found


def _word_value(key: str, value: Any) -> RawValue:
    is_null = isinstance(value, str) and value in {"null", "Null", "NULL", "None"}
    return RawValue(key=key.replace("-", "_"), value=None if is_null else value, origin=COMMAND_LINE)


def _values_of_flag(words: Sequence[str], start: int) -> list[str]:
    """The words after `--key` that belong to it: up to the next `--...`, and no `key=value` after the first."""
    values: list[str] = []
    for word in words[start:]:
        if word.startswith("--") or (values and _ASSIGNMENT.fullmatch(word)):
            break
        values.append(word)
    return values


def _looks_like_file(word: str) -> bool:
    if word.startswith("-"):
        return False
    suffix = Path(word).suffix.lower()
    return suffix in _YAML | _JSON and not _ASSIGNMENT.fullmatch(word) or (Path(word).is_file() and "=" not in word)


def _bad_word(word: str) -> Problem:
    return Problem(
        message=f"cannot understand {mask_text(word)!r}",
        origin=COMMAND_LINE,
        allowed="config.yaml or config.json as the first word, then key=value, --key value, --key=value or --flag",
        fix="put values with spaces in quotes",
    )


def _read_file(path: Path) -> list[RawValue]:
    suffix = path.suffix.lower()
    if suffix not in _YAML | _JSON:
        raise ConfigError(
            Problem(
                message="not a configuration file",
                origin=str(path),
                allowed="a name that ends in .yaml, .yml or .json",
                fix="rename the file",
            )
        )
    text = _read_text(path)
    if suffix in _JSON:
        from llamafactory.hparams.json_file import parse_json

        return [
            RawValue(key=key, value=value, origin=f"{path}:{line}") for key, value, line in parse_json(text, str(path))
        ]
    from llamafactory.hparams.yaml_file import parse_yaml

    return [
        RawValue(key=entry.key, value=entry.value, origin=f"{path}:{entry.line}", text=entry.text)
        for entry in parse_yaml(text, str(path))
    ]


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise ConfigError(
                Problem(message="is a folder, not a configuration file", origin=str(path), fix="give the file in it")
            )
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(
                Problem(
                    message="larger than 1 MB, which no configuration is",
                    origin=str(path),
                    fix="data sets go into `dataset`, with an entry in dataset_info.json",
                )
            )
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        files = _config_files_beside(path)
        stems = near_matches(path.stem, {file.stem for file in files})
        near = sorted(file.name for file in files if file.stem in stems)
        fix = "did you mean " + " or ".join(f"'{path.parent / name}'" for name in near) + "?" if near else None
        raise ConfigError(Problem(message="no such file", origin=str(path), fix=fix or "check the path")) from None
    except UnicodeDecodeError as error:
        message = f"not UTF-8 text (byte {error.start})"
        raise ConfigError(Problem(message=message, origin=str(path), fix="save it as UTF-8")) from None
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise ConfigError(
            Problem(message=message, origin=str(path), fix="check the path and its permissions")
        ) from None


def _config_files_beside(path: Path) -> list[Path]:
    try:
        return [entry for entry in path.parent.iterdir() if entry.suffix.lower() in _YAML | _JSON]
    except OSError:
        return []
