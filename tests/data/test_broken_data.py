"""Broken data sets: each stops before training with a message that says what, where, what was found and expected."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory.data.data_report import LostRow
from llamafactory.data.formats import find_format
from llamafactory.data.pipeline import prepare_data
from llamafactory.data.records import read_record
from llamafactory.data.row_error import RowError
from llamafactory.data.sources import SourceRow
from llamafactory.data.template_choice import build_template
from llamafactory.data.types import DatasetSpec
from llamafactory.extras.errors import DataError
from llamafactory.hparams.data import DataConfig

GOOD = {"instruction": "Say hello.", "input": "", "output": "Hello."}
SHAREGPT = {"formatting": "sharegpt"}
OPENAI = {"formatting": "openai"}
IMAGES = {"columns": {"prompt": "instruction", "response": "output", "images": "images"}}
MESSAGES = Path(__file__).with_name("broken_data_messages.json")
"""The whole message of each case; `WRITE_BROKEN_DATA=1` writes it anew, to be read before it is committed."""
SECRET = "my private diary entry " * 20


def alpaca(**changes: Any) -> list[dict[str, Any]]:
    return [{**GOOD, **changes}]


def sharegpt(*turns: tuple[str, Any], **columns: Any) -> list[dict[str, Any]]:
    return [{"conversations": [{"from": role, "value": text} for role, text in turns], **columns}]


def openai(*messages: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"messages": list(messages)}]


ASK, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
PAIR = (("human", "Hi"), ("gpt", "Hello"))
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "empty file": ({"rows": ""}, ["rows.json: the file is empty", "found:    0 bytes", "at least one row"]),
    "only white space": ({"rows": " \r\n\t\n"}, ["the file is empty", "found:    5 bytes"]),
    "empty list": ({"rows": "[]"}, ["no rows", "no row in the file"]),
    "json cut off": (
        {"rows": '[\n{"instruction": "a", "output": "b"},\n{"instruction": "c", "outp'},
        ["rows.json:3: the file is not valid JSON", "line 3, column 22", "cut off"],
    ),
    "json with a trailing comma": (
        {"rows": '[\n{"instruction": "a"},\n]'},
        ["rows.json:", "the file is not valid JSON"],
    ),
    "object at the top level": (
        {"rows": json.dumps({"data": alpaca()})},
        ["does not hold a list of rows", "an object with the keys data at the top level", "a list of rows"],
    ),
    "number at the top level": ({"rows": "3"}, ["does not hold a list of rows", "the number 3"]),
    "row that is a text": (
        {"rows": ["hello"]},
        ["rows.json#1: row: the row is not an object", 'found the text "hello"'],
    ),
    "jsonl with a broken line": (
        {"rows": json.dumps(GOOD) + "\n{broken\n" + json.dumps(GOOD), "file_name": "rows.jsonl"},
        ["1 of 3 rows cannot be used", "rows.jsonl:2: column 2: the line is not JSON", "one JSON object a line"],
    ),
    "jsonl cut off in its last line": (
        {"rows": json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:-9], "file_name": "rows.jsonl"},
        ["rows.jsonl:2", "the line is not JSON"],
    ),
    "utf-16": (
        {"rows": json.dumps([GOOD]).encode("utf-16")},
        ["not UTF-8", "UTF-16 byte order mark", "save the file"],
    ),
    "latin-1": ({"rows": b'[\n{"instruction": "caf\xe9"}]'}, ["the file is not UTF-8", "byte 0xe9 in line 2"]),
    "unknown ending": ({"rows": "x", "file_name": "rows.xlsx"}, ["this file type is not read", "'.xlsx'", ".jsonl"]),
    "broken parquet": (
        {"rows": b"PAR1....", "file_name": "rows.parquet"},
        ["the file is not valid Parquet", "rows.parquet"],
    ),
    "empty arrow": ({"rows": b"", "file_name": "rows.arrow"}, ["rows.arrow: the file is empty"]),
    "csv with a short line": (
        {"rows": "instruction,output\r\na,b\r\nc\r\n", "file_name": "rows.csv"},
        ["rows.csv:3: row: wrong number of columns; found 1 values; expected 2"],
    ),
    "repeated key": ({"rows": '[{"instruction": "a", "output": "b", "output": "c"}]'}, ["a repeated key", "'output'"]),
    "missing column": (
        {"rows": [{"question": "a", "answer": "b"}]},
        [
            "rows.json#1: instruction: column 'instruction' is missing",
            "the keys question, answer",
            "dataset_info.json",
        ],
    ),
    "column named wrongly in the entry": (
        {"rows": alpaca(), "entry": {"columns": {"prompt": "instruction", "response": "reply"}}},
        ["column 'reply' is missing", "the keys instruction, input, output"],
    ),
    "number as answer": (
        {"rows": alpaca(output=42)},
        ["output: not a text", "found the number 42", "put it in quotes"],
    ),
    "list as instruction": ({"rows": alpaca(instruction=["a", "b"])}, ["instruction: not a text", "a list of 2"]),
    "null answer": ({"rows": alpaca(output=None)}, ["output: the answer is empty", "found null"]),
    "empty answer": ({"rows": alpaca(output="")}, ["output: the answer is empty", "found an empty text"]),
    "blank answer": ({"rows": alpaca(output=" \n")}, ["the answer is empty", "only white space"]),
    "empty prompt": ({"rows": alpaca(instruction="")}, ["instruction: the prompt is empty"]),
    "NUL": ({"rows": alpaca(output="a\0b")}, ["output: a NUL character", "NUL at character 2"]),
    "half of a surrogate pair": (
        {"rows": alpaca(output="a\ud83d")},
        ["half of a surrogate pair", "\\ud83d at character 2"],
    ),
    "history that is no list": (
        {
            "rows": alpaca(history="x"),
            "entry": {"columns": {"prompt": "instruction", "response": "output", "history": "history"}},
        },
        ["history: the history is not a list"],
    ),
    "history of triples": (
        {
            "rows": alpaca(history=[["a", "b", "c"]]),
            "entry": {"columns": {"prompt": "instruction", "response": "output", "history": "history"}},
        },
        ["history[0]: not a pair", "[user text, assistant text]"],
    ),
    "messages that are no list": (
        {"rows": [{"conversations": "x"}], "entry": SHAREGPT},
        ["the messages are not a list"],
    ),
    "no messages": (
        {"rows": [{"conversations": []}], "entry": SHAREGPT},
        ["conversations: no messages", "an empty list"],
    ),
    "odd number of turns": (
        {"rows": sharegpt(*PAIR, ("human", "Bye")), "entry": SHAREGPT},
        ["conversations: wrong number of messages", "3 messages", "an even number"],
    ),
    "even number of turns in ranking data": (
        {"rows": sharegpt(*PAIR), "entry": {**SHAREGPT, "ranking": True}},
        ["does not fit the stage", "preference pairs (ranking: true)", "rm, dpo"],
    ),
    "answer first": (
        {"rows": sharegpt(("gpt", "Hi"), ("human", "Hello")), "entry": SHAREGPT},
        [
            "conversations[0].from: wrong order of roles",
            'the text "gpt" as message 1',
            "expected human or observation",
        ],
    ),
    "two questions in a row": (
        {"rows": sharegpt(("human", "a"), ("human", "b")), "entry": SHAREGPT},
        ["conversations[1].from: wrong order of roles", "expected gpt or function_call"],
    ),
    "unknown role": (
        {"rows": sharegpt(("human", "Hi"), ("gtp", "Hello")), "entry": SHAREGPT},
        ["conversations[1].from: unknown role", 'found the text "gtp"', "did you mean 'gpt'?"],
    ),
    "system message in the middle": (
        {"rows": sharegpt(("human", "Hi"), ("system", "Be kind"), ("human", "a"), ("gpt", "b")), "entry": SHAREGPT},
        ["conversations[1].from: unknown role", "move it to the front"],
    ),
    "openai rows under sharegpt": (
        {"rows": [{"conversations": [ASK, REPLY]}], "entry": SHAREGPT},
        ["a message without 'from'", "the keys role, content", "role_tag"],
    ),
    "message without its text": (
        {"rows": [{"conversations": [{"from": "human"}]}], "entry": SHAREGPT},
        ["conversations[0]: a message without 'value'"],
    ),
    "function call that is no JSON": (
        {"rows": sharegpt(("human", "Hi"), ("function_call", "get_weather(Paris)")), "entry": SHAREGPT},
        ["conversations[1].value: the tool call is not JSON", '{"name": ..., "arguments": {...}}'],
    ),
    "function call without arguments": (
        {"rows": sharegpt(("human", "Hi"), ("function_call", '{"name": "f"}')), "entry": SHAREGPT},
        ["conversations[1].value: a tool call without arguments"],
    ),
    "tools that are no JSON": (
        {
            "rows": sharegpt(*PAIR, tools="[{'name': 'f'}]"),
            "entry": {**SHAREGPT, "columns": {"messages": "conversations", "tools": "tools"}},
        },
        ["tools: the tools text is not JSON", "expected JSON text"],
    ),
    "tool without a name": (
        {
            "rows": sharegpt(*PAIR, tools='[{"description": "x"}]'),
            "entry": {**SHAREGPT, "columns": {"messages": "conversations", "tools": "tools"}},
        },
        ["tools[0]: a tool without a name"],
    ),
    "openai: question last": (
        {"rows": openai(ASK, REPLY, ASK), "entry": OPENAI},
        ["messages: wrong last message", "user at the end", "expected assistant"],
    ),
    "openai: answer twice": ({"rows": openai(ASK, REPLY, REPLY), "entry": OPENAI}, ["assistant behind assistant"]),
    "openai: image part": (
        {"rows": openai({"role": "user", "content": [{"type": "image_url"}]}, REPLY), "entry": OPENAI},
        ["messages[0].content[0].image_url: a content part without its file", "columns: {images: ...}"],
    ),
    "openai: unknown role": (
        {"rows": openai({"role": "human", "content": "Hi"}, REPLY), "entry": OPENAI},
        ["messages[0].role: unknown role", "system or developer or user or assistant or tool"],
    ),
    "openai: bad weight": ({"rows": openai(ASK, {**REPLY, "weight": -1}), "entry": OPENAI}, ["weight: not a weight"]),
    "openai: broken call arguments": (
        {
            "rows": openai(ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}),
            "entry": OPENAI,
        },
        ["messages[1].tool_calls[0].arguments: the arguments text is not JSON"],
    ),
    "no answer within cutoff_len": (
        {"rows": alpaca(instruction="a b c d e f g h " * 40), "cutoff_len": 8},
        ["no row has a supervised token", "no supervised token: 1 rows", "raise cutoff_len (now 8)"],
    ),
    "every answer marked untrained": (
        {"rows": openai(ASK, {**REPLY, "train": False}), "entry": OPENAI},
        ["no row has a supervised token", "train and weight marks"],
    ),
    "overlong: error": (
        {"rows": alpaca(output="word " * 99), "cutoff_len": 16, "overlong": "error"},
        ["rows.json#1: an example is longer than cutoff_len", "at most 16 tokens (overlong: error)"],
    ),
    "overlong: drop": (
        {"rows": alpaca(output="word " * 99), "cutoff_len": 16, "overlong": "drop"},
        ["no row has a supervised token", "longer than cutoff_len: 1 rows"],
    ),
    "plain text rows": (
        {"rows": [{"text": "once upon a time"}], "entry": {"columns": {"prompt": "text"}}},
        ["does not fit the stage", "plain text", "name the column of answers"],
    ),
    "judged answers": (
        {
            "rows": alpaca(label=True),
            "entry": {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"}},
        },
        ["does not fit the stage", "kto"],
    ),
    "unknown key in the entry": (
        {"rows": alpaca(), "entry": {"formating": "alpaca"}},
        ["dataset_info.json: rows: unknown key 'formating'", "did you mean 'formatting'?"],
    ),
    "unknown column in the entry": (
        {"rows": alpaca(), "entry": {"columns": {"promt": "instruction"}}},
        ["dataset_info.json: rows: columns: unknown key 'promt'", "did you mean 'prompt'?"],
    ),
    "unknown formatting": (
        {"rows": alpaca(), "entry": {"formatting": "sharegtp"}},
        ["unknown formatting 'sharegtp'", "alpaca, openai, sharegpt", "did you mean 'sharegpt'?"],
    ),
    "text as ranking flag": (
        {"rows": alpaca(), "entry": {"ranking": "yes"}},
        ["'ranking' has the wrong type", "true or false"],
    ),
    "cloud file": (
        {"rows": alpaca(), "entry": {"cloud_file_name": "ftp://host/rows.json"}},
        ["cloud_file_name: not an address in the cloud", "found:    ftp://host/rows.json", "s3://BUCKET/FILE"],
    ),
    "BOM, CRLF and a broken line": (
        {"rows": b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b'\r\n{"a": \r\n', "file_name": "rows.jsonl"},
        ["rows.jsonl:2: column 6: the line is not JSON", "the line may be cut off"],
    ),
    "jsonl row that is a list": (
        {"rows": "[1]\n", "file_name": "rows.jsonl"},
        ["rows.jsonl#1: row: the row is not an object", "found the number 1"],
    ),
    "text behind the list": (
        {"rows": json.dumps([GOOD]) + "\nmore"},
        ["rows.json:2: the file is not valid JSON", "Extra data (line 2, column 1)"],
    ),
    "csv with an open quote": (
        {"rows": 'instruction,output\na,"b\n', "file_name": "rows.csv"},
        ["rows.csv:1: the file is not valid CSV", "unexpected end of data"],
    ),
    "split that files do not have": (
        {"rows": alpaca(), "entry": {"split": "validation"}},
        ["dataset_info.json: rows: files have no such split", "found:    validation", "train[:100]"],
    ),
    "script": (
        {"rows": alpaca(), "entry": {"script_url": "my_script"}},
        ["'script_url' is not used: a loading script is foreign code", "give their file_name"],
    ),
    "num_samples of zero": (
        {"rows": alpaca(), "entry": {"num_samples": 0}},
        ["'num_samples' is too small", "found:    0", "a number from 1 up"],
    ),
    "missing image": (
        {"rows": [{**alpaca(instruction="<image>Who?")[0], "images": ["gone.png"]}], "entry": IMAGES},
        ["rows.json#1: images[0]: the file is missing", "gone.png", "set media_dir"],
    ),
    "placeholder without image": (
        {"rows": [{**alpaca(instruction="<image>Who?")[0], "images": []}], "entry": IMAGES},
        ["images: the placeholders <image> and the files do not match", "1 <image> in the texts, and 0 files"],
    ),
    "openai: content part of an unknown type": (
        {"rows": openai({"role": "user", "content": [{"type": "file"}]}, REPLY), "entry": OPENAI},
        ["messages[0].content[0]: an unknown content part", 'found the text "file"', "text, image"],
    ),
    "openai: calls that are no list": (
        {"rows": openai(ASK, {"role": "assistant", "tool_calls": "f()"}), "entry": OPENAI},
        ["messages[1].tool_calls: the tool calls are not a list", 'found the text "f()"'],
    ),
    "openai: tool result first": (
        {"rows": openai({"role": "tool", "content": "x"}, REPLY), "entry": OPENAI},
        ["messages[0].role: wrong order of roles", "tool at the start", "expected user"],
    ),
    "openai: answer without text and calls": (
        {"rows": openai(ASK, {"role": "assistant", "content": None}), "entry": OPENAI},
        ["messages[1].content: the answer is empty", "found an empty text"],
    ),
    "val_size takes all rows": (
        {"rows": alpaca() * 3, "val_size": 3},
        ["val_size leaves no rows for training", "3 of 3 rows"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_broken_data_set_is_explained(
    data_config: Callable[..., DataConfig], tokenizer: Any, tmp_path: Path, name: str
) -> None:
    options, fragments = CASES[name]
    data = data_config(**options)
    with pytest.raises(DataError) as caught:
        prepare_data(data, build_template("chatml", tokenizer), tokenizer, seed=0)
    message = str(caught.value).replace(str(tmp_path), "DIR")
    for fragment in fragments:
        assert fragment in message
    if os.environ.get("WRITE_BROKEN_DATA"):
        written = json.loads(MESSAGES.read_text(encoding="utf-8")) if MESSAGES.exists() else {}
        written = {case: written[case] for case in CASES if case in written} | {name: message.splitlines()}
        MESSAGES.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert message.splitlines() == json.loads(MESSAGES.read_text(encoding="utf-8"))[name]


def test_the_kept_messages_are_those_of_the_cases() -> None:
    """Each names a place, what was found and what is expected; a row's fault names file, number and field."""
    kept = json.loads(MESSAGES.read_text(encoding="utf-8"))
    assert set(kept) == set(CASES)
    for name, lines in kept.items():
        text = "\n".join(lines)
        assert re.search(r"^(DIR|dataset_info\.json: rows|rows|formatting|cloud_file_name|val_size)\b", text), name
        assert "found" in text or "unknown" in lines[0], name
        assert "expected" in text or "fix" in text, name
    in_rows = [lines for lines in kept.values() if re.search(r"rows\.\w+[:#]\d+: [\w\[\]. ]+: ", "\n".join(lines))]
    assert len(in_rows) >= 40


def test_a_missing_file_and_a_missing_folder(tokenizer: Any, tmp_path: Path) -> None:
    template = build_template("chatml", tokenizer)
    info = {"rows": {"file_name": "gone.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"gone\.json: no such file or folder"):
        prepare_data(DataConfig(dataset=("rows",), dataset_dir=str(tmp_path)), template, tokenizer, seed=0)
    with pytest.raises(DataError, match=r"nowhere: no dataset_info\.json"):
        prepare_data(DataConfig(dataset=("rows",), dataset_dir=str(tmp_path / "nowhere")), template, tokenizer, seed=0)


def test_row_contents_are_never_shown_whole(
    data_config: Callable[..., DataConfig], tokenizer: Any, tmp_path: Path
) -> None:
    rows = [
        *alpaca(output=SECRET + "\0"),
        *alpaca(instruction=[SECRET]),
        *sharegpt(("human", SECRET), ("function_call", SECRET)),
    ]
    data = data_config(rows)
    out = tmp_path / "out"
    with pytest.raises(DataError) as caught:
        prepare_data(data, build_template("chatml", tokenizer), tokenizer, seed=0, output_dir=out)
    assert SECRET.strip() not in str(caught.value)
    written = (out / "bad_rows.jsonl").read_text()
    assert len(written.splitlines()) == 3
    assert SECRET.strip() not in written


def test_there_are_sixty_cases() -> None:
    assert len(CASES) >= 60
    assert all(fragments for _, fragments in CASES.values())


@settings(max_examples=60)
@given(
    row=st.dictionaries(
        st.sampled_from(["messages", "tools", "images"]) | st.text(max_size=5),
        st.recursive(
            st.text('abcdefgh \0<>{}[]":,', min_size=200, max_size=400) | st.none() | st.integers(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type"]), inner, max_size=3)
            ),
            max_leaves=8,
        ),
        max_size=3,
    ),
    formatting=st.sampled_from(["alpaca", "sharegpt", "openai"]),
)
def test_no_message_shows_more_than_the_beginning_of_a_text(row: dict[str, Any], formatting: str) -> None:
    row_format = find_format(formatting)
    columns = {**row_format.DEFAULT_COLUMNS, "tools": "tools", "images": "images"}
    spec = DatasetSpec(
        name="x", source="file", location="x", formatting=formatting, columns=columns, tags=row_format.DEFAULT_TAGS
    )
    try:
        read_record(SourceRow(origin="x:1", values=row), row_format, spec)
    except RowError as error:
        shown = LostRow.from_error("x", "x:1", error).render()
        for text in texts_of(row):
            assert not any(json.dumps(text[start : start + 30])[1:-1] in shown for start in range(len(text) - 30))


def texts_of(value: object) -> list[str]:
    if isinstance(value, str):
        return [value] if len(value) > 60 else []
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for one in inner for text in texts_of(one)]
