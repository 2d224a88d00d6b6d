"""`export`: merge an adapter into its model, and prove the result."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Read the configuration, then export.

    Raises:
        LlamaFactoryError: the configuration is wrong, or the exported model is not the trained one.
    """
    from llamafactory.compose import load_config

    config = load_config(argv, command="export")
    from llamafactory import export

    return export.run(config)
