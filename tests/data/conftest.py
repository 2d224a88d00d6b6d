"""The embedded model's tokenizer, canonical conversations, and data folders written on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llamafactory.data.types import Conversation, Message, ToolCall
from llamafactory.extras import log
from llamafactory.hparams.data import DataConfig


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes that are said once are said once a test."""
    monkeypatch.setattr(log, "_said_once", set())


@pytest.fixture(scope="session")
def tokenizer(embedded_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model_dir)


@pytest.fixture(scope="session")
def reference_tokenizer(embedded_model_dir: Path) -> Any:
    """The tokenizer that made the reference ids: transformers' reading of the GGUF, which does not split digits."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.fixture
def data_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """Makes a config whose only data set `rows` is what is given: rows, or the raw content of a file."""

    def make(
        rows: Sequence[object] | str | bytes,
        file_name: str = "rows.json",
        entry: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> DataConfig:
        content = rows if isinstance(rows, str | bytes) else json.dumps(rows)
        (tmp_path / file_name).write_bytes(content.encode() if isinstance(content, str) else content)
        info = {"rows": {"file_name": file_name, **(entry or {})}}
        (tmp_path / "dataset_info.json").write_text(json.dumps(info))
        return DataConfig(dataset=("rows",), dataset_dir=str(tmp_path), **options)

    return make


def dialogue(*texts: str, system: str | None = None) -> Conversation:
    """A conversation of texts by turns user and assistant."""
    messages = [Message(role="system", content=system)] if system else []
    messages += [Message(role="assistant" if place % 2 else "user", content=text) for place, text in enumerate(texts)]
    return Conversation(messages=tuple(messages))


WEATHER: Mapping[str, object] = {
    "name": "get_weather",
    "description": "Current weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "City name"}},
        "required": ["city"],
    },
}
TOOL_DIALOGUE = Conversation(
    messages=(
        Message(role="user", content="Weather in Paris?"),
        Message(
            role="assistant", content="", tool_calls=(ToolCall(name="get_weather", arguments='{"city": "Paris"}'),)
        ),
        Message(role="tool", content='{"temp": 21}'),
        Message(role="assistant", content="It is 21 degrees."),
    ),
    tools=(WEATHER,),
)
