"""LLaMA Factory: fine-tune language models, with a proof that what was trained is what was meant.

Importing this package loads nothing; the names below are looked up when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamafactory.python_api import ChatModel, export_model, load_config, run_exp

__version__ = "0.1.0"
__all__ = ["ChatModel", "__version__", "export_model", "load_config", "run_exp"]


def __getattr__(name: str) -> Any:
    """Look a public name up on its first use."""
    if name in {"ChatModel", "export_model", "load_config", "run_exp"}:
        from importlib import import_module

        return getattr(import_module("llamafactory.python_api"), name)
    raise AttributeError(f"module 'llamafactory' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
