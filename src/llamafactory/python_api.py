"""What Python programs call: `run_exp`, `export_model`, `ChatModel`, `load_config`.

Each takes what the command line takes.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from llamafactory.compose import load_config
from llamafactory.hparams.read import Source
from llamafactory.hparams.run_config import RunConfig

if TYPE_CHECKING:
    from llamafactory.chat.model import ChatModel
    from llamafactory.export import ExportProof
    from llamafactory.train.report import RunResult

__all__ = ["ChatModel", "export_model", "load_config", "run_exp"]


def run_exp(args: Source | RunConfig | None = None) -> RunResult:
    """Train, evaluate, or both, in this process.

    Args:
        args: mapping of options, path of a YAML or JSON file, words of a command line, a finished configuration,
            or None for the words of this process.

    Raises:
        LlamaFactoryError: the configuration, the data, the model or the output folder cannot be used.
    """
    config = _config_of(args, "train")
    from llamafactory.train import tuner

    return tuner.run_exp(config)


def export_model(args: Source | RunConfig | None = None) -> ExportProof:
    """Merge adapters into their model, write it, and prove that it computes the same.

    Args:
        args: as for `run_exp`.

    Raises:
        LlamaFactoryError: the configuration is wrong, or the exported model is not the trained one.
    """
    config = _config_of(args, "export")
    from llamafactory import export

    return export.export_and_verify(config)


def _config_of(args: Source | RunConfig | None, command: str) -> RunConfig:
    if isinstance(args, RunConfig):
        return args
    return load_config(sys.argv[1:] if args is None else args, command=command)


def _make_chat_model() -> type[Any]:
    """`ChatModel` for Python programs: like `chat.model.ChatModel`, but made of options."""
    from llamafactory.chat.model import ChatModel as LoadedChatModel

    class ChatModel(LoadedChatModel):
        """A model to talk to, made of options: `ChatModel({"model_name_or_path": ...}).chat([...])`."""

        def __init__(self, args: Source | RunConfig | None = None) -> None:
            """Load model, adapters, tokenizer and template; `args` as for `run_exp`."""
            super().__init__(_config_of(args, "chat"))

    return ChatModel


def __getattr__(name: str) -> Any:
    """`ChatModel` is made on first use, because its base needs torch."""
    if name == "ChatModel":
        globals()[name] = _make_chat_model()
        return globals()[name]
    raise AttributeError(f"module 'llamafactory.python_api' has no attribute {name!r}")
