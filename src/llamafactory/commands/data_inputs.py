"""What the sub-commands of `data` share: their words, the configuration with its tokenizer, and how they print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llamafactory.commands.data_help import SUB_COMMANDS
from llamafactory.extras.errors import ConfigError, Problem

if TYPE_CHECKING:
    from llamafactory.data.types import DatasetSpec, Template, ViewName
    from llamafactory.hparams.data import DataConfig


class UsedDataset(NamedTuple):
    """A data set, and what the configuration uses it for: `train` or `eval`."""

    use: str
    spec: DatasetSpec


class Inputs(NamedTuple):
    """What a sub-command works on; tokenizer, template, seed and the view of rows are those of training."""

    data: DataConfig
    tokenizer: Any
    template: Template
    seed: int
    datasets: list[UsedDataset]
    view: ViewName


def split_words(name: str, argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words that are not this sub-command's own, and its own: `--rows 3`, `--rows=3`, `--ids`.

    Raises:
        ConfigError: a word that wants a value has none.
    """
    own_words = {word.split()[0]: " " in word for word, _ in SUB_COMMANDS[name].own_words}
    words: list[str] = []
    own: dict[str, str] = {}
    rest = iter(argv)
    for word in rest:
        key, has_value, value = word.partition("=")
        if key not in own_words or (has_value and not own_words[key]):
            words.append(word)
        elif own_words[key]:
            own[key.removeprefix("--")] = value if has_value else next(rest, "")
            if not own[key.removeprefix("--")]:
                raise ConfigError(Problem(key=key, message="has no value", fix=f"{key} VALUE"))
        else:
            own[key.removeprefix("--")] = "true"
    return words, own


def load_inputs(words: list[str]) -> Inputs:
    """Read the configuration; load tokenizer and template as training does.

    Raises:
        LlamaFactoryError: the configuration, the tokenizer or the template cannot be used.
    """
    from llamafactory.compose import load_config

    config = load_config(words, command="data")
    from llamafactory.data.registry import find_specs
    from llamafactory.data.sources.access import access_of
    from llamafactory.train.stage import load_stage
    from llamafactory.train.text import data_seed, load_text

    uses = (("train", config.data.dataset), ("eval", config.data.eval_dataset))
    access = access_of(config.data, config.model)
    specs = [(use, find_specs(names, config.data.dataset_dir, access)) for use, names in uses]
    datasets = [UsedDataset(use, spec) for use, found in specs for spec in found]
    tokenizer, template = load_text(config)
    view = load_stage(config.train.stage).view
    return Inputs(config.data, tokenizer, template, data_seed(config), datasets, view)


def has_colour() -> bool:
    """Whether standard output gets ANSI colours: on a terminal, or where FORCE_COLOR asks for them."""
    if os.environ.get("FORCE_COLOR", "") not in ("", "0"):
        return True
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def print_json(value: object) -> None:
    """Print one JSON object."""
    json.dump(value, sys.stdout, ensure_ascii=False, indent=2)
    print()
