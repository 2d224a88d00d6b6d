"""`data`: the table of its sub-commands. Each one is a file beside this one, imported only when it runs."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from llamafactory.commands.data_help import SUB_COMMANDS
from llamafactory.extras.errors import ConfigError, Problem
from llamafactory.extras.suggest import did_you_mean


def main(argv: list[str]) -> int:
    """Run one sub-command.

    Returns:
        0 done, 1 the data has problems.

    Raises:
        ConfigError: no such sub-command, or words that it does not know.
        LlamaFactoryError: the configuration, the tokenizer or the data cannot be used.
    """
    name = argv[0] if argv else ""
    if name not in SUB_COMMANDS:
        raise ConfigError(
            Problem(
                key=f"data {name}".strip(),
                message="unknown sub-command" if name else "a sub-command is missing",
                allowed=", ".join(SUB_COMMANDS),
                fix=did_you_mean(name, SUB_COMMANDS) or "llamafactory-cli data --help",
            )
        )
    run: Callable[[list[str]], int] = import_module(f"llamafactory.commands.data_{name}").main
    return run(argv[1:])
