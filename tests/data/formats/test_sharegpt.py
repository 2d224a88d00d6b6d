from __future__ import annotations

from typing import Any

import pytest

from llamafactory.data.formats.sharegpt import DEFAULT_TAGS, read_row
from llamafactory.data.row_error import RowError
from llamafactory.data.types import Conversation, DatasetSpec, Feedback, Preference, ToolCall


def spec(ranking: bool = False, **columns: str) -> DatasetSpec:
    return DatasetSpec(
        name="x",
        source="file",
        location="x",
        is_ranking=ranking,
        columns={"messages": "conversations", **columns},
        tags=DEFAULT_TAGS,
    )


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in pairs]


def test_roles_become_canonical() -> None:
    call = '<think>\nneeded\n</think>\n\n{"name": "f", "arguments": {"ä": [1, {"b": null}]}}'
    rows = turns(("system", "s"), ("human", "a"), ("function_call", call), ("observation", ""), ("gpt", "b"))
    record = read_row({"conversations": rows, "system": "other"}, spec(system="system"), "f#1")
    assert isinstance(record, Conversation)
    assert [message.role for message in record.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert record.messages[0].content == "s"
    assert record.messages[2].content == "<think>\nneeded\n</think>\n\n"
    assert record.messages[2].tool_calls == (ToolCall(name="f", arguments='{"ä": [1, {"b": null}]}'),)


def test_parallel_calls_and_a_system_column() -> None:
    calls = '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{\\"x\\": 1}"}]'
    record = read_row(
        {"conversations": turns(("human", "a"), ("function_call", calls)), "system": "s"}, spec(system="system"), ""
    )
    assert isinstance(record, Conversation)
    assert record.messages[0].content == "s"
    assert [(call.name, call.arguments) for call in record.messages[2].tool_calls] == [("f", "{}"), ("g", '{"x": 1}')]


def test_tools_that_are_listed_as_none_differ_from_no_word_of_tools() -> None:
    row = {"conversations": turns(("human", "a"), ("gpt", "b")), "tools": "[]"}
    listed, silent = read_row(row, spec(tools="tools"), ""), read_row({**row, "tools": ""}, spec(tools="tools"), "")
    assert isinstance(listed, Conversation)
    assert isinstance(silent, Conversation)
    assert (listed.tools, silent.tools) == ((), None)


def test_preferences_and_feedback() -> None:
    row = {
        "conversations": turns(("human", "a")),
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    pair = read_row(row, spec(ranking=True, chosen="chosen", rejected="rejected"), "")
    assert isinstance(pair, Preference)
    assert (pair.chosen.content, pair.rejected.content) == ("good", "bad")
    judged = read_row({"conversations": turns(("human", "a"), ("gpt", "b")), "kto": True}, spec(kto_tag="kto"), "")
    assert isinstance(judged, Feedback)
    assert judged.is_desirable


def test_answers_may_carry_marks_of_their_own() -> None:
    listed: list[dict[str, Any]] = [
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b", "train": False},
        {"from": "human", "value": "c"},
        {"from": "gpt", "value": "d", "weight": 0.5},
    ]
    record = read_row({"conversations": listed}, spec(), "f#1")
    assert isinstance(record, Conversation)
    assert [message.train for message in record.messages] == [None, False, None, None]
    assert [message.weight for message in record.messages] == [1.0, 1.0, 1.0, 0.5]
    listed[1]["train"] = "no"
    with pytest.raises(RowError, match=r"conversations\[1\]\.train"):
        read_row({"conversations": listed}, spec(), "f#1")
