"""The page that compares named templates with published ones is current, and says what is so."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from llamafactory.data.chat_template import template_names
from llamafactory.data.types import Conversation, Message


@pytest.fixture
def script(repo_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(repo_dir / "scripts")
    path = repo_dir / "scripts" / "list_published_differences.py"
    spec = importlib.util.spec_from_file_location("list_published_differences", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.folder() is None:
        pytest.skip("needs the chat templates in package trl")
    return module


def test_the_page_is_current(script: Any) -> None:
    assert script.main(["--check"]) == 0, "run python scripts/list_published_differences.py"


def test_every_name_and_file_exists(script: Any) -> None:
    assert set(script.PUBLISHED) <= set(template_names())
    assert all((script.folder() / f"{file}.jinja").is_file() for file in script.PUBLISHED.values())


def test_texts_are_compared(script: Any) -> None:
    talk = Conversation(messages=(Message(role="user", content="a"),))
    ours, theirs = script.texts("gemma", "gemma", talk)
    assert ours == theirs == "<BOS><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n"
    _, other = script.texts("gemma", "llama3", talk)
    assert other != ours
    refused = Conversation(messages=(Message(role="system", content="s"), *talk.messages))
    assert script.texts("gemma", "gemma", refused)[1] is None
