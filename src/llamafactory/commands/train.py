"""`train`: fine-tune a model."""

from __future__ import annotations

import sys


def main(argv: list[str]) -> int:
    """Read the configuration, then train in this process or through torchrun.

    Raises:
        LlamaFactoryError: the configuration, the data, the model or the output folder cannot be used.
    """
    from llamafactory.commands.rerun import expand_rerun
    from llamafactory.launcher import launch_train
    from llamafactory.python_api import load_config
    from llamafactory.train.signals import StopRequest, StopSignal

    try:
        with StopRequest():
            words = expand_rerun(argv)
            return launch_train(words, load_config(words, command="train"))
    except StopSignal as stopped:
        print(f"{stopped} before the first step, nothing to save; the same command starts again", file=sys.stderr)
        return stopped.exit_code
