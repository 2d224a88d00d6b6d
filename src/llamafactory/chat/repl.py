"""Talk to a model in the terminal: answers stream, the history is kept, `clear` and `exit` are special."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import TYPE_CHECKING, TextIO

from llamafactory.chat.model import ChatModel

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig

HELP = "Type a message. 'clear' forgets the dialogue, 'system TEXT' sets the system text, 'exit' or Ctrl+D ends."


def run(cfg: RunConfig) -> int:
    """Loads the model and talks until the user leaves.

    Returns:
        Exit code: 0, or 130 where Ctrl+C at the prompt ended it.
    """
    with contextlib.suppress(ImportError):  # line editing and history, where the platform has it
        importlib.import_module("readline")
    model = ChatModel(cfg)
    print(f"{cfg.model.model_name_or_path}, template {model.template.name}. {HELP}")
    return talk(model, sys.stdout)


def talk(model: ChatModel, out: TextIO) -> int:
    """Reads lines from standard input and writes answers to `out`; Ctrl+C during an answer ends only that answer."""
    history: list[dict[str, str]] = []
    system = model.cfg.data.default_system
    while True:
        try:
            text = input("\nUser: ").strip()
        except EOFError:
            print(file=out)
            return 0
        except KeyboardInterrupt:
            print(file=out)
            return 130
        if text == "exit":
            return 0
        if text == "clear":
            history.clear()
            print("The dialogue is forgotten.", file=out)
        elif text.startswith("system "):
            system = text.removeprefix("system ").strip()
            history.clear()
            print("The system text is set, and the dialogue forgotten.", file=out)
        elif text:
            history.append({"role": "user", "content": text})
            history.append({"role": "assistant", "content": _answer(model, history, system, out)})


def _answer(model: ChatModel, history: list[dict[str, str]], system: str | None, out: TextIO) -> str:
    print("Assistant: ", end="", file=out, flush=True)
    parts: list[str] = []
    stream = model.stream_chat(history, system)
    try:
        for text in stream:
            parts.append(text)
            print(text, end="", file=out, flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=out)
    finally:
        stream.close()  # type: ignore[attr-defined]
    print(file=out, flush=True)
    return "".join(parts)
