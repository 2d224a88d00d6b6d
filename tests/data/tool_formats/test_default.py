from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data.tool_formats import find_tool_format
from llamafactory.data.tool_formats.default import parse_calls, render_calls
from llamafactory.data.types import ToolCall
from llamafactory.extras.errors import DataError

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
ARGUMENTS = st.dictionaries(st.text(max_size=8), JSON, max_size=3).map(
    lambda value: json.dumps(value, ensure_ascii=False)
)
CALLS = st.lists(
    st.builds(lambda name, arguments: ToolCall(name=name, arguments=arguments), NAMES, ARGUMENTS),
    min_size=1,
    max_size=4,
)


@given(CALLS, st.sampled_from(["", "I look it up.\n", "Action: none\n"]))
def test_what_is_written_is_read_back(calls: list[ToolCall], before: str) -> None:
    text = before + "".join(piece.text for piece in render_calls(calls))
    assert parse_calls(text) == (before, tuple(calls))


@pytest.mark.parametrize(
    "text", ["", "Hello.", "Action: f\nAction Input: {broken", "Action: f\nAction Input: 3", "Action Input: {}"]
)
def test_text_without_calls_stays_text(text: str) -> None:
    assert parse_calls(text) == (text, ())


def test_reading_is_linear() -> None:
    import time

    start = time.process_time()
    for hostile in (
        "Action: " * 120_000,
        "Action: f\nAction Input: [" * 40_000,
        "Action: f\nAction Input: {" * 40_000,
    ):
        parse_calls(hostile)
    assert time.process_time() - start < 5


def test_an_unknown_format_gets_near_matches() -> None:
    with pytest.raises(DataError, match=r"unknown tool format 'defualt'(?s:.*)did you mean 'default'"):
        find_tool_format("defualt")
