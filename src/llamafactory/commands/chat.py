"""`chat`: talk to a model in the terminal."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Read the configuration, load the model, answer until the user ends.

    Raises:
        LlamaFactoryError: the configuration or the model cannot be used.
    """
    from llamafactory.compose import load_config

    config = load_config(argv, command="chat")
    from llamafactory.chat import repl

    return repl.run(config)
