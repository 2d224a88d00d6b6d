"""`check`: every value of a configuration with its origin, and everything that is wrong with it. Loads no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from llamafactory.compose import all_sections, resolve_config
from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.extras.suggest import did_you_mean
from llamafactory.hparams.data import DataConfig
from llamafactory.hparams.effects import CHAT_KEYS, SCORE_KEYS
from llamafactory.hparams.read import read_source
from llamafactory.hparams.resolve import Resolution, ResolvedValue
from llamafactory.hparams.train import TrainConfig

_SHARED_KEYS = {"finetuning_type", "seed", "use_cpu", "bf16", "fp16", "pure_bf16", "per_device_eval_batch_size"}
_COMMANDS = ("train", "chat", "score", "export")


def main(argv: list[str]) -> int:
    """Check a configuration; the words `--command NAME`, `--json` and `--schema` are this command's own.

    Without `--command` it is judged for the command that its keys are for.

    Returns:
        0 where the configuration can be run, 2 where it cannot.

    Raises:
        ConfigError: `--command` names no command.
    """
    words, own = split_words(argv)
    if "schema" in own:
        from llamafactory.hparams.known_keys import load_known_keys
        from llamafactory.hparams.schema import json_schema

        _print_json(json_schema(all_sections(), load_known_keys()))
        return 0
    command = own.get("command") or _command_for(words)
    if command not in _COMMANDS:
        raise ConfigError(
            Problem(
                key="--command",
                given=command,
                message="unknown command",
                allowed="one of " + ", ".join(_COMMANDS),
                fix=did_you_mean(command, _COMMANDS),
            )
        )
    resolution = resolve_config(words, command=command)
    if "json" in own:
        _print_json(_as_dict(resolution, command))
    else:
        print("\n".join(render(resolution, command)))
        if "command" not in own and command != "train":
            print(f"note: the keys look like those of the command {command}; --command NAME judges them for another")
    return 0 if resolution.config is not None else 2


def _command_for(words: Sequence[str]) -> str:
    """What the keys are for: a data set is trained on where any key is one that only training reads."""
    try:
        given = {item.key for item in read_source(words) if item.value is not None}
    except ConfigError:
        return "train"
    if not given or given & (set(TrainConfig.model_fields) - _SHARED_KEYS):
        return "train"
    if "export_dir" in given:
        return "export"
    if "dataset" in given:
        return "train" if given & _only_trained_with() else "score"
    return "train" if "eval_dataset" in given else "chat"


def _only_trained_with() -> set[str]:
    """Keys of the data, of stages and of adapters that `score` does not read."""
    options = {key for name, section in all_sections().items() if ": " in name for key in section.model_fields}
    return options | set(DataConfig.model_fields) - CHAT_KEYS - set(SCORE_KEYS)


def split_words(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words of the configuration, and this command's own flags."""
    words: list[str] = []
    own: dict[str, str] = {}
    rest = iter(argv)
    for word in rest:
        if word in {"--json", "--schema"}:
            own[word.removeprefix("--")] = "true"
        elif word == "--command":
            own["command"] = next(rest, "")
        elif word.startswith("--command="):
            own["command"] = word.removeprefix("--command=")
        else:
            words.append(word)
    return words, own


def render(resolution: Resolution, command: str) -> Iterator[str]:
    """The report for people: values that were set, defaults, notes, problems, and one line that sums up."""
    chosen = [value for value in resolution.values if value.origin != "default"]
    defaults = [value for value in resolution.values if value.origin == "default"]
    if chosen:
        yield f"set ({len(chosen)}):"
        yield from _table(chosen)
    if defaults:
        yield f"defaults ({len(defaults)}):"
        yield from _table(defaults)
    for note in resolution.notes:
        yield note if note.startswith("warning: ") else f"note: {note}"
    if resolution.config is None:
        yield str(ConfigError(resolution.problems))
    else:
        yield f"no problems: the command {command} can run this configuration"


def _table(values: Sequence[ResolvedValue]) -> Iterator[str]:
    key_width = max(len(value.key) for value in values)
    texts = [_shown(value.value) for value in values]
    text_width = min(40, max(len(text) for text in texts))
    section = ""
    for value, text in zip(values, texts, strict=True):
        if value.section != section:
            section = value.section
            yield f"  [{section.replace('_', ' ')}]"
        yield f"  {value.key:<{key_width}}  {text:<{text_width}}  {value.origin}"


def _shown(value: Any) -> str:
    if isinstance(value, str):
        is_plain = bool(value) and value == value.strip() and value.isprintable()
        return value if is_plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return ", ".join(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, ensure_ascii=False)


def _as_dict(resolution: Resolution, command: str) -> dict[str, Any]:
    return {
        "ok": resolution.config is not None,
        "command": command,
        "values": [asdict(value) for value in resolution.values],
        "notes": list(resolution.notes),
        "problems": [asdict(problem) for problem in resolution.problems],
    }


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, ensure_ascii=False, indent=2)
    print()
