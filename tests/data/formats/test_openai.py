from __future__ import annotations

from typing import Any

from llamafactory.data.formats.openai import DEFAULT_COLUMNS, DEFAULT_TAGS, read_row
from llamafactory.data.types import Conversation, DatasetSpec, ToolCall

SPEC = DatasetSpec(name="x", source="file", location="x", columns=DEFAULT_COLUMNS, tags=DEFAULT_TAGS)


def read(*messages: dict[str, Any], **columns: Any) -> Conversation:
    record = read_row({"messages": list(messages), **columns}, SPEC, "f:1")
    assert isinstance(record, Conversation)
    return record


def test_calls_results_and_null_content() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "ü"}'}}
    record = read(
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "tool", "tool_call_id": "2", "content": "two"},
        {"role": "assistant", "content": "done"},
        tools=[{"type": "function", "function": {"name": "f"}}],
    )
    assert [message.role for message in record.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert record.messages[1].content == "ab"
    assert record.messages[2].tool_calls == (ToolCall(name="f", arguments='{"x": "ü"}'),) * 2
    assert record.tools == ({"name": "f"},)


def test_train_and_weight_marks() -> None:
    record = read(
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "train": False},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 0.5},
    )
    assert [(message.train, message.weight) for message in record.messages[1::2]] == [(False, 1.0), (None, 0.5)]
