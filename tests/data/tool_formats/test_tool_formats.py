from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llamafactory.data.tool_formats import CallStream, find_tool_format, tool_format_names
from llamafactory.data.types import Piece, ToolCall
from llamafactory.extras.errors import DataError

FORMATS = tool_format_names()
UNTYPED = ("glm4_moe", "minimax2", "qwen3_5", "seed_oss")
TEMPLATES: Mapping[str, Sequence[str]] = {
    "gemma4": ("gemma4", "gemma4n"),
    "glm4": ("chatglm3", "glm4", "glm4v", "glm_ocr", "glmz1"),
    "glm4_moe": ("glm4_moe", "glm4_5v", "glm4_7", "aeva"),
    "lfm2": ("lfm2", "lfm2_vl"),
    "ling": ("bailing_v2",),
    "llama3": ("llama3", "llama4", "mllama", "llava_next_llama3"),
    "minimax1": ("minimax1",),
    "minimax2": ("minimax2",),
    "mistral": tuple(
        "llava_next_mistral llava_next_video_mistral ministral mistral mistral_small ministral3 pixtral".split()
    ),
    "qwen": tuple(
        "keye_vl llava_next_qwen mimo mimo_v2 mimo_vl qwen qwen3 qwen3_nothink qwen2_omni qwen3_omni "
        "qwen3_omni_nothink qwen2_vl qwen3_vl qwen3_vl_nothink".split()
    ),
    "qwen3_5": ("qwen3_5", "qwen3_5_nothink", "qwen3_6"),
    "seed_oss": ("seed_oss",),
}
WEATHER: Mapping[str, object] = {
    "name": "get_weather",
    "description": "Current weather of a city",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "City name"},
            "unit": {"type": "string", "enum": ["c", "f"]},
        },
        "required": ["city"],
    },
}
CALL = ToolCall(name="get_weather", arguments='{"city": "Paris", "unit": "c"}')

# What no syntax carries inside a value, a key or a name: its own marks. Each format's docstring names them.
MARKS = ("</parameter>", "</arg_value>", '<|"|>')
TEXTS = st.text(st.characters(exclude_categories=("Cs",))) | st.sampled_from(
    [
        "",
        "12",
        "true",
        "null",
        '"quoted"',
        "{'a': \"b\"}",
        "C:\\d\\n",
        "a\nb\n",
        "\n",
        "</tool_call>",
        "<tool_call>",
        "<|tool_call_end|>",
        "}",
        "]",
        "Action: f\nAction Input: {",
        "</function>",
        "</invoke>",
        "</tool_calls>",
        '{"name": "f"',
        "<tool_call|>",
    ]
)
KEYS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,12}", fullmatch=True)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | KEYS, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True).filter(lambda name: name not in KEYWORDS)
KEYWORDS = frozenset(
    "False None True and as assert async await break class continue def del elif else except".split()
) | (
    frozenset(
        "finally for from global if import in is lambda nonlocal not or pass raise return try while with".split()
    )
    | frozenset(("yield",))
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(KEYS, VALUES, max_size=4)), min_size=1, max_size=3)
BEFORE = st.sampled_from(["", "I look it up.\n", "<think>\nhm\n</think>\n\n", 'Say {"a": 1}, or <b>.\n'])


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def kind_of(value: object) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def schema_of(calls: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Mapping[str, object]]:
    """Tools whose schemas tell the types of these arguments."""
    return [
        {"name": name, "parameters": {"properties": {key: {"type": kind_of(value)} for key, value in given.items()}}}
        for name, given in calls
    ]


def render(name: str, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    written = [ToolCall(name=called, arguments=json.dumps(given, ensure_ascii=False)) for called, given in calls]
    return text_of(find_tool_format(name).render_calls(written))


def plain(calls: Sequence[ToolCall]) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> Any:
    return json.loads((shared_dir / "golden" / "templates_compat.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "template"), [(name, one) for name in TEMPLATES for one in TEMPLATES[name]])
def test_the_known_rows_are_written_as_known(golden: Any, name: str, template: str) -> None:
    (prompt, answer), (observation, _) = golden["templates"][template]["tool"]
    today = date.today().strftime("%d %b %Y")
    tool_format = find_tool_format(name)
    assert text_of(tool_format.describe_tools([WEATHER])) in prompt.replace("{{TODAY}}", today)
    if name == "glm4_moe":  # the known rows leave the last call open, the published template does not
        answer += "\n</tool_call>"
    assert text_of(tool_format.render_calls([CALL])) in answer
    assert text_of(tool_format.join_results(['{"temp": 21}'])) in observation
    for stop in ("<|im_end|>\n", "<EOS>", "<|eot_id|>", "<|eot|>", "<|role_end|>", "<end_of_sentence>\n", "[e~[\n"):
        answer = answer.removesuffix(stop)
    before, calls = tool_format.parse_calls(answer)
    assert calls == (CALL,)
    assert "get_weather" not in before


@pytest.mark.parametrize("name", FORMATS)
@given(calls=CALLS, before=BEFORE, data=st.data())
@settings(max_examples=60)
def test_what_is_written_is_read_back(name: str, calls: Any, before: str, data: st.DataObject) -> None:
    assume(not any(mark in json.dumps(calls, ensure_ascii=False).replace("\\", "") for mark in MARKS))
    types: dict[tuple[str, str], str] = {}
    for called, arguments in calls:  # one schema tells one type for an argument
        for key, value in arguments.items():
            assume(types.setdefault((called, key), kind_of(value)) == kind_of(value))
    assume(len({called for called, _ in calls}) == len(calls))
    tools = schema_of(calls)
    text = before + render(name, calls)
    read_before, read = find_tool_format(name).parse_calls(text, tools)
    assert read_before == before
    assert plain(read) == [(called, arguments) for called, arguments in calls]
    assert stream(name, text, data, tools) == (before, read)


def stream(name: str, text: str, data: st.DataObject, tools: Any = ()) -> tuple[str, tuple[ToolCall, ...]]:
    """The same text in random pieces; nothing may be shown that belongs to a call."""
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    if data.draw(st.booleans()):
        pieces = list(text)
    reader = CallStream(find_tool_format(name).SYNTAX, tools)
    shown, calls = "", ()
    for piece in pieces:
        fed = reader.feed(piece)
        shown, calls = shown + fed.text, calls + fed.calls
    last = reader.close()
    return shown + last.text, calls + last.calls


HOSTILE = st.lists(
    st.sampled_from(
        [
            "<tool_call>", "</tool_call>", '{"name": "f", ', '"arguments": {', '"parameters": {}', "}", "]", "[", '"',
            "\n", "f", "Action: f", "Action Input: {}", "<function=f>", "</function>", "<parameter=a>", "</parameter>",
            "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<|tool_call>call:f{", "<tool_call|>", '<|"|>',
            "<|tool_call_start|>", "<|tool_call_end|>", "[f(a=1", ")", "'", "\\", "<seed:tool_call>", "<tool_calls>",
            "</tool_calls>", '<invoke name="f">', "</invoke>", '<parameter name="a">', "[TOOL_CALLS]", ":", ",", "\0",
            "{}", "<|python_tag|>", "a:", "\ud83d", '"\\ud83d"',
        ]
    )
    | st.text(max_size=5),
    max_size=30,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@given(text=HOSTILE, data=st.data())
@settings(max_examples=150)
def test_no_text_raises_and_a_stream_reads_what_the_whole_reads(name: str, text: str, data: st.DataObject) -> None:
    before, calls = find_tool_format(name).parse_calls(text)
    assert text.startswith(before)
    assert calls or before == text
    for call in calls:
        assert isinstance(json.loads(call.arguments), dict)
    assert stream(name, text, data) == (before, calls)


@pytest.mark.parametrize("name", FORMATS)
def test_calls_come_as_soon_as_they_are_whole(name: str) -> None:
    text = "Wait.\n" + render(name, [("first", {"a": "x"}), ("second", {"b": 2})])
    reader = CallStream(find_tool_format(name).SYNTAX)
    fed = [reader.feed(letter) for letter in text]
    assert "".join(piece.text for piece in fed) == "Wait.\n"
    early = [call.name for piece in fed for call in piece.calls]
    assert early == ["first", "second"]
    assert [*early, *(call.name for call in reader.close().calls)] == ["first", "second"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_that_is_cut_off_is_shown_only_at_the_end(name: str) -> None:
    whole = render(name, [("get_weather", {"city": "Paris and around it"})])
    text = "Wait.\n" + whole[: whole.index(" around")]
    reader = CallStream(find_tool_format(name).SYNTAX)
    assert "".join(reader.feed(letter).text for letter in text) == "Wait.\n"
    last = reader.close()
    assert (last.text, last.calls) == (text.removeprefix("Wait.\n"), ())


@pytest.mark.parametrize("name", FORMATS)
def test_text_is_shown_without_delay(name: str) -> None:
    reader = CallStream(find_tool_format(name).SYNTAX)
    assert reader.feed("It is 21 degrees. ").text == "It is 21 degrees. "
    assert reader.feed("a < b, {x: 1}").text == "a < b, {x: 1}"


@pytest.mark.parametrize("name", UNTYPED)
def test_the_schema_tells_text_from_numbers(name: str) -> None:
    text = render(name, [("f", {"zip": "01234", "code": "12", "count": 12, "note": "null"})])
    types = {"zip": {"type": "string"}, "code": {"type": "string"}, "count": {"type": ["integer", "null"]}}
    tools = [{"name": "f", "parameters": {"properties": types | {"note": {"anyOf": [{"type": "string"}]}}}}]
    parse = find_tool_format(name).parse_calls
    assert plain(parse(text, tools)[1]) == [("f", {"zip": "01234", "code": "12", "count": 12, "note": "null"})]
    assert plain(parse(text)[1]) == [("f", {"zip": "01234", "code": 12, "count": 12, "note": None})]


@pytest.mark.parametrize("name", [*UNTYPED, "gemma4", "lfm2"])
@pytest.mark.parametrize("arguments", ["[1]", "3", "{broken"])
def test_arguments_that_are_no_object_are_an_error(name: str, arguments: str) -> None:
    with pytest.raises(DataError, match=r"the arguments of a call of 'f' are no JSON object"):
        find_tool_format(name).render_calls([ToolCall(name="f", arguments=arguments)])


@pytest.mark.parametrize("name", FORMATS)
def test_row_text_is_literal_and_markup_is_not(name: str) -> None:
    evil = "<|im_end|>"
    tool_format = find_tool_format(name)
    call = ToolCall(name="f", arguments=json.dumps({"a": evil}))
    tool = {"name": "f", "description": evil, "parameters": {"type": "object", "properties": {}}}
    written = [tool_format.render_calls([call]), tool_format.describe_tools([tool]), tool_format.join_results([evil])]
    for pieces in written:
        assert any(evil in piece.text and piece.is_literal for piece in pieces)
        assert not any(evil in piece.text and not piece.is_literal for piece in pieces)


@pytest.mark.parametrize("name", FORMATS)
def test_both_results_are_in_one_observation(name: str) -> None:
    joined = text_of(find_tool_format(name).join_results(["one", "two"]))
    assert joined.startswith("one")
    assert joined.endswith("two")


@pytest.mark.parametrize("name", FORMATS)
def test_reading_is_linear(name: str) -> None:
    parse, syntax = find_tool_format(name).parse_calls, find_tool_format(name).SYNTAX
    marks = [
        "<tool_call>", "<tool_call>f\n<arg_key>", "</arg_key><arg_value>", "<arg_key>a</arg_key>", "<tool_calls>",
        '<tool_calls>{"name": "f", "arguments": {}}', '{"name": "f", "arguments": [', '{"name"', "[TOOL_CALLS]",
        "f\n{", "f\n", "Action: ", "Action: f\nAction Input: {", "<invoke name=\"f\"><parameter name=\"a\">",
        "<tool_call><function=f><parameter=a>", "<seed:tool_call><function=f><parameter=a>", "</parameter>",
        "<|tool_call>call:f{a:[", "<|tool_call>call:f{a:<|\"|>", "<|tool_call_start|>[f(a=", "<|tool_call_start|>[(",
        "<|tool_call_start|>'", "[", "(", "-", "1+", "a.", "\n", " ",
    ]  # fmt: skip
    openings = {"lfm2": "<|tool_call_start|>[f(a=", "gemma4": "<|tool_call>call:f{a:", "glm4_moe": "<tool_call>f"}
    start = time.process_time()
    for mark in marks:
        for opening in ("", openings.get(name, "")):
            text = opening + mark * (60_000 // len(mark))
            parse(text)
            reader = CallStream(syntax)
            for place in range(0, len(text), 50):
                reader.feed(text[place : place + 50])
            reader.close()
    assert time.process_time() - start < 20


def test_whole_calls_of_a_block_that_is_cut_off_count() -> None:
    text = render("minimax1", [("first", {"a": "</tool_calls>"}), ("second", {"b": 2})])
    parse = find_tool_format("minimax1").parse_calls
    assert [call.name for call in parse(text[: text.index(": 2")])[1]] == ["first"]


def test_names_of_files_only() -> None:
    assert len(FORMATS) == 13
    assert "parts" not in FORMATS


def test_python_calls_are_read_as_literals() -> None:
    source = "f(a=[1, -2.5, True, None, {'k': 'it\\'s'}], b=false)"
    parse = find_tool_format("lfm2").parse_calls
    [call] = parse(f"<|tool_call_start|>[{source}]<|tool_call_end|>")[1]
    assert json.loads(call.arguments) == {"a": [1, -2.5, True, None, {"k": "it's"}], "b": False}


@pytest.mark.parametrize(
    "source", ["f(1)", "f(a=g())", "f(a=x)", "f(**x)", "(lambda: 1)()", "f(a=b'x')", "f(a={1: 2})"]
)
def test_python_that_is_no_literal_is_text(source: str) -> None:
    text = f"<|tool_call_start|>[{source}]<|tool_call_end|>"
    assert find_tool_format("lfm2").parse_calls(text) == (text, ())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("glm4_moe", "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x</arg_value>\n</tool_call>"),
        ("seed_oss", "<seed:tool_call>\n<function=f>\n<parameter=a>x</parameter>\n</function>\n</seed:tool_call>"),
        (
            "minimax2",
            '<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">x</parameter>\n</invoke>\n'
            "</minimax:tool_call>",
        ),
        ("gemma4", '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {"a": "x"}}'),
        ("qwen", '<tool_call>\n{"name": "f", "arguments": "{\\"a\\": \\"x\\"}"}\n</tool_call>'),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "x"}}]'),
        ("lfm2", "<|tool_call_start|>[f(a='x')]<|tool_call_end|>"),
    ],
)
def test_what_published_templates_write_is_read(name: str, text: str) -> None:
    assert find_tool_format(name).parse_calls("Wait.\n" + text) == (
        "Wait.\n",
        (ToolCall(name="f", arguments='{"a": "x"}'),),
    )
