"""The command `llamafactory-cli`: a table of sub-commands. A command's module is imported only when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llamafactory import __version__

if TYPE_CHECKING:
    from types import ModuleType

PROGRAM = "llamafactory-cli"

COMMANDS: dict[str, tuple[str, str, str]] = {
    "train": ("llamafactory.commands.train", "main", "fine-tune a model"),
    "chat": ("llamafactory.commands.chat", "main", "talk to a model in the terminal"),
    "score": ("llamafactory.commands.score", "main", "score answers with a reward model, one JSON line a row"),
    "export": ("llamafactory.commands.export", "main", "merge an adapter into its model, and prove the result"),
    "check": ("llamafactory.commands.check", "main", "show what a configuration means, and everything wrong with it"),
    "plan": ("llamafactory.commands.plan", "main", "forecast memory, disk and time of a run, from config.json alone"),
    "data": ("llamafactory.commands.data", "main", "look at rows as they will be trained, check them, count them"),
    "runs": ("llamafactory.commands.runs", "main", "list runs, show and verify their checkpoints, remove old ones"),
    "env": ("llamafactory.commands.env", "main", "show versions and hardware, for a bug report"),
}
"""Name -> module, function, one line of help."""

LATER: dict[str, str] = {
    "api": "export the model, then serve its folder with vLLM or another server",
    "webchat": f"{PROGRAM} chat",
    "webui": f"{PROGRAM} train CONFIG",
    "eval": "export the model, then evaluate its folder with lm-evaluation-harness",
}
"""Commands that are known but not implemented in this version -> what to do instead."""

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; None takes those of this process.

    Returns:
        The exit code: 0 done, 1 failed, 2 the configuration or the command line is wrong, 3 the data is wrong,
        130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "help"
    try:
        code = _run(name, words[1:])
        sys.stdout.flush()
        if argv is None and name == "train":
            from llamafactory.train.signals import ignore_signals

            ignore_signals()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return code


def _run(name: str, words: list[str]) -> int:
    if name in {"help", "-h", "--help"}:
        print(usage())
        return 0
    if name in {"version", "-v", "--version"}:
        print(f"LLaMA Factory {__version__}")
        return 0
    if name not in COMMANDS:
        return _unknown(name)
    if any(word in {"-h", "--help"} for word in words):
        from llamafactory.commands.option_help import render_help

        print(render_help(name, COMMANDS[name][2], words))
        return 0
    return _run_module(name, words)


def _run_module(name: str, words: list[str]) -> int:
    from llamafactory.extras.errors import LlamaFactoryError

    module, function, _ = COMMANDS[name]
    try:
        return int(getattr(_import_quickly(module), function)(words))
    except LlamaFactoryError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _import_quickly(module: str) -> ModuleType:
    """Import a module without garbage collection, which only costs time here: what an import makes stays."""
    import gc
    from importlib import import_module

    gc.disable()
    try:
        return import_module(module)
    finally:
        gc.enable()


def _unknown(name: str) -> int:
    from llamafactory.extras.suggest import did_you_mean

    if name in LATER:
        text = f"the command '{name}' is known, but not implemented in this version; alternative: {LATER[name]}"
    elif name.lower().endswith((".yaml", ".yml", ".json")):
        text = f"'{name}' is not a command; did you mean '{PROGRAM} train {name}'?"
    else:
        text = f"unknown command '{name}'"
        hint = did_you_mean(name, [*COMMANDS, "version", "help"])
        text += f"; {hint}" if hint else ""
    print(f"error: {text}\n\n{usage()}", file=sys.stderr)
    return EXIT_USAGE


def usage() -> str:
    """The text of `help`."""
    rows = {name: text for name, (_, _, text) in COMMANDS.items()}
    rows |= {"version": "show the version", "help": "show this text"}
    commands = "\n".join(f"  {name:<9}{text}" for name, text in rows.items())
    return f"""LLaMA Factory {__version__}

usage: {PROGRAM} COMMAND [CONFIG] [OPTIONS]      (or: lmf COMMAND ...)

commands:
{commands}

  CONFIG     a .yaml or .json file with `key: value` lines
  OPTIONS    key=value, --key value, --key=value or --flag; they win over CONFIG

  {PROGRAM} COMMAND --help      shows the options of a command"""


if __name__ == "__main__":
    sys.exit(main())
