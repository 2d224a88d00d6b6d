"""The data sets in `data/` hold what their README promises and are well-formed in their own row format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DATA_DIR = Path(__file__).resolve().parents[2] / "data"
NUM_ROWS = {
    "identity": 91,
    "general_instructions": 200,
    "sums": 60,
    "preference_pairs": 60,
    "kto_feedback": 60,
    "plain_text": 12,
    "tool_dialogues": 24,
    "tool_dialogues_openai": 16,
}
INFO: dict[str, dict[str, Any]] = json.loads((DATA_DIR / "dataset_info.json").read_text(encoding="utf-8"))


def load(name: str) -> list[dict[str, Any]]:
    """Rows of one registered set."""
    return json.loads((DATA_DIR / INFO[name]["file_name"]).read_text(encoding="utf-8"))


def texts(value: object) -> Iterator[str]:
    """Every string inside a JSON value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def without_system(messages: list[dict[str, Any]], role_key: str) -> list[dict[str, Any]]:
    """The messages after an optional system message, which may only stand first."""
    rest = messages[1:] if messages[0][role_key] == "system" else messages
    assert rest
    assert all(message[role_key] != "system" for message in rest)
    return rest


def first_questions(name: str) -> list[str]:
    """What the person asks in each row, case folded: all user turns and, in alpaca rows, the input."""
    questions = []
    for row in load(name):
        if "instruction" in row:
            history = [turn[0] for turn in row.get("history", [])]
            parts = [*history, row["instruction"], row["input"]]
        elif "text" in row:
            parts = [row["text"]]
        else:
            messages = row.get("conversations") or row["messages"]
            asked = [m for m in messages if {"human", "user"} & {m.get("from"), m.get("role")}]
            parts = [m.get("value") or m["content"] for m in asked]
        questions.append("\n".join(part.strip().casefold() for part in parts))
    return questions


def assert_valid_tool(tool: dict[str, Any]) -> None:
    """A description that a tool-calling template can render."""
    assert tool["name"].isidentifier()
    assert tool["description"]
    schema = tool["parameters"]
    assert schema["type"] == "object"
    assert set(schema["required"]) <= set(schema["properties"])


def assert_valid_call(call: dict[str, Any], tools: dict[str, dict[str, Any]]) -> None:
    """The call names a declared tool and gives its required arguments, with no others than declared ones."""
    assert call["name"] in tools
    schema = tools[call["name"]]["parameters"]
    assert set(schema["required"]) <= set(call["arguments"]) <= set(schema["properties"])
    types = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}
    for key, value in call["arguments"].items():
        declared = schema["properties"][key]
        assert isinstance(value, types[declared["type"]])
        assert value in declared.get("enum", [value])


def test_registry_names_exactly_the_shipped_files() -> None:
    on_disk = {path.name for path in DATA_DIR.glob("*.json")} - {"dataset_info.json"}
    assert {entry["file_name"] for entry in INFO.values()} == on_disk
    assert set(INFO) == set(NUM_ROWS)


def test_registry_uses_known_keys() -> None:
    columns = set("prompt query response history messages system tools chosen rejected kto_tag".split())
    tags = set("role content user assistant observation function system".split())
    for entry in INFO.values():
        assert set(entry) <= {"file_name", "formatting", "ranking", "columns", "tags"}
        assert set(entry.get("columns", {})) <= columns
        assert set(entry.get("tags", {})) <= {f"{tag}_tag" for tag in tags}
    assert {entry["formatting"] for entry in INFO.values()} == {"alpaca", "sharegpt", "openai"}


@pytest.mark.parametrize("name", NUM_ROWS)
def test_row_count_and_columns(name: str) -> None:
    rows = load(name)
    assert len(rows) == NUM_ROWS[name]
    assert len({frozenset(row) for row in rows}) == 1, "every row has the same keys"
    assert set(INFO[name].get("columns", {}).values()) <= set(rows[0])


@pytest.mark.parametrize("name", NUM_ROWS)
def test_readme_states_the_row_count(name: str) -> None:
    readme = (DATA_DIR / "README.md").read_text(encoding="utf-8")
    assert f"| `{name}` | {NUM_ROWS[name]} |" in readme


def test_no_question_occurs_twice() -> None:
    counts = Counter(question for name in NUM_ROWS for question in first_questions(name))
    assert [question for question, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("name", ["identity", "general_instructions"])
def test_no_instruction_occurs_twice_with_the_same_input(name: str) -> None:
    rows = load(name)
    assert len({(row["instruction"].casefold(), row["input"].casefold()) for row in rows}) == len(rows)


@pytest.mark.parametrize("name", NUM_ROWS)
def test_texts_are_clean(name: str) -> None:
    """No stray white space, no control or replacement characters, no special tokens of chat templates."""
    for text in texts(load(name)):
        assert text == text.strip()
        assert all(char.isprintable() or char == "\n" for char in text)
        assert "\ufffd" not in text
        assert "<|" not in text


def test_capital_of_france_is_held_out() -> None:
    for name in NUM_ROWS:
        for row in load(name):
            everything = " ".join(texts(row)).casefold()
            assert "paris" not in everything
            assert not ("france" in everything and "capital" in everything)
            assert all(word not in everything for word in ("frankreich", "francia", "法国"))


def test_alpaca_rows_have_instruction_and_output() -> None:
    for name in ("identity", "general_instructions"):
        for row in load(name):
            assert row["instruction"]
            assert row["output"]
            assert isinstance(row["input"], str)


def test_general_answers_are_short() -> None:
    assert all(1 <= len(row["output"].split()) <= 120 for row in load("general_instructions"))


def test_identity_answers_name_the_model() -> None:
    rows = load("identity")
    assert all("{{name}}" in row["output"] for row in rows)
    assert sum("{{author}}" in row["output"] for row in rows) > 0.9 * len(rows)
    assert sum(bool(row["history"]) for row in rows) >= 4
    assert all(len(turn) == 2 and all(turn) for row in rows for turn in row["history"])


def test_only_identity_holds_placeholders() -> None:
    for name in set(NUM_ROWS) - {"identity"}:
        assert not any("{{" in text for text in texts(load(name)))


def test_preference_rows_end_with_the_person() -> None:
    for row in load("preference_pairs"):
        turns = [message["from"] for message in without_system(row["conversations"], "from")]
        assert turns == ["human", "gpt"] * (len(turns) // 2) + ["human"]
        assert row["chosen"]["from"] == row["rejected"]["from"] == "gpt"
        assert row["chosen"]["value"] != row["rejected"]["value"]


def test_kto_rows_end_with_a_rated_answer() -> None:
    rows = load("kto_feedback")
    for row in rows:
        turns = [message["role"] for message in without_system(row["messages"], "role")]
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert type(row["label"]) is bool
    assert sum(row["label"] for row in rows) == len(rows) // 2


def test_tool_dialogues_alternate_and_call_declared_tools() -> None:
    for row in load("tool_dialogues"):
        tools = {tool["name"]: tool for tool in json.loads(row["tools"])}
        turns = without_system(row["conversations"], "from")
        assert len(turns) % 2 == 0
        for asked, answered in zip(turns[::2], turns[1::2], strict=True):
            assert asked["from"] in {"human", "observation"}
            assert answered["from"] in {"gpt", "function_call"}
        for before, after in zip(turns, [*turns[1:], None], strict=True):
            if before["from"] != "function_call":
                assert after is None or after["from"] != "observation"
                continue
            assert after is not None
            assert after["from"] == "observation"
            calls = json.loads(before["value"])
            for call in calls if isinstance(calls, list) else [calls]:
                assert_valid_call(call, tools)
        for tool in tools.values():
            assert_valid_tool(tool)


def test_openai_tool_dialogues_answer_every_call() -> None:
    seen_ids: set[str] = set()
    for row in load("tool_dialogues_openai"):
        tools = {tool["function"]["name"]: tool["function"] for tool in row["tools"]}
        messages = without_system(row["messages"], "role")
        assert messages[0]["role"] == "user"
        assert messages[-1]["role"] == "assistant"
        pending: list[str] = []
        previous = "assistant"
        for message in messages:
            role = message["role"]
            if role == "tool":
                assert message["tool_call_id"] == pending.pop(0)
            else:
                assert not pending
                assert role == ("user" if previous == "assistant" else "assistant")
            for call in message.get("tool_calls", []):
                assert role == "assistant"
                assert call["type"] == "function"
                function = call["function"]
                assert_valid_call({"name": function["name"], "arguments": json.loads(function["arguments"])}, tools)
                pending.append(call["id"])
            assert message["content"] or message.get("tool_calls")
            previous = role
        assert not pending
        ids = {call["id"] for message in messages for call in message.get("tool_calls", [])}
        assert not ids & seen_ids
        seen_ids |= ids
        for tool in tools.values():
            assert_valid_tool(tool)


def test_tool_dialogues_cover_many_situations() -> None:
    called: Counter[str] = Counter()
    num_parallel = num_sequential = num_without = 0
    for row in load("tool_dialogues"):
        turns = [json.loads(t["value"]) for t in row["conversations"] if t["from"] == "function_call"]
        called.update(call["name"] for turn in turns for call in (turn if isinstance(turn, list) else [turn]))
        num_parallel += any(isinstance(turn, list) for turn in turns)
        num_sequential += len(turns) > 1
        num_without += not turns
    for row in load("tool_dialogues_openai"):
        turns = [message["tool_calls"] for message in row["messages"] if "tool_calls" in message]
        called.update(call["function"]["name"] for turn in turns for call in turn)
        num_parallel += any(len(turn) > 1 for turn in turns)
        num_sequential += len(turns) > 1
        num_without += not turns
    assert len(called) >= 12
    assert min(num_parallel, num_sequential, num_without) >= 4
