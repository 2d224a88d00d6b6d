from __future__ import annotations

import pytest

from llamafactory.data.formats.alpaca import DEFAULT_COLUMNS, detect, read_row
from llamafactory.data.row_error import RowError
from llamafactory.data.types import Conversation, DatasetSpec, Feedback, Preference


def spec(ranking: bool = False, **columns: str) -> DatasetSpec:
    return DatasetSpec(
        name="x", source="file", location="x", is_ranking=ranking, columns={**DEFAULT_COLUMNS, **columns}
    )


def test_prompt_and_input_are_joined_and_empty_parts_are_left_out() -> None:
    record = read_row({"instruction": "Add.", "input": "1 2", "output": "3"}, spec(), "f#1")
    assert isinstance(record, Conversation)
    assert [(message.role, message.content) for message in record.messages] == [
        ("user", "Add.\n1 2"),
        ("assistant", "3"),
    ]
    assert record.origin == "f#1"
    for empty in ({"input": ""}, {"input": None}, {}):
        record = read_row({"instruction": "Add.", "output": "3", **empty}, spec(), "")
        assert isinstance(record, Conversation)
        assert record.messages[0].content == "Add."


def test_system_history_and_tools() -> None:
    row = {
        "instruction": "c",
        "output": "d",
        "system": "s",
        "history": [["a", "b"]],
        "tools": '[{"type": "function", "function": {"name": "f"}}]',
    }
    record = read_row(row, spec(system="system", history="history", tools="tools"), "")
    assert isinstance(record, Conversation)
    assert [message.role for message in record.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message.content for message in record.messages] == ["s", "a", "b", "c", "d"]
    assert record.tools == ({"name": "f"},)


def test_preferences_and_feedback() -> None:
    row = {"instruction": "a", "chosen": "good", "rejected": "bad", "output": "x", "label": False}
    pair = read_row(row, spec(ranking=True, chosen="chosen", rejected="rejected"), "")
    assert isinstance(pair, Preference)
    assert (pair.chosen.content, pair.rejected.content, len(pair.prompt.messages)) == ("good", "bad", 1)
    judged = read_row(row, spec(kto_tag="label"), "")
    assert isinstance(judged, Feedback)
    assert judged.is_desirable is False
    with pytest.raises(RowError, match="label: not a boolean"):
        read_row({**row, "label": "yes"}, spec(kto_tag="label"), "")


def test_plain_text_has_only_a_user_message() -> None:
    plain = DatasetSpec(name="x", source="file", location="x", columns={"prompt": "text"})
    record = read_row({"text": "once"}, plain, "")
    assert isinstance(record, Conversation)
    assert [message.role for message in record.messages] == ["user"]


def test_other_rows_are_not_recognised() -> None:
    assert detect({"foo": "bar"}) is None
