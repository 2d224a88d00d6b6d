"""`train`: fine-tune a model."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Read the configuration, then train in this process or through torchrun.

    Raises:
        LlamaFactoryError: the configuration, the data, the model or the output folder cannot be used.
    """
    from llamafactory.launcher import launch_train
    from llamafactory.python_api import load_config

    return launch_train(argv, load_config(argv, command="train"))
