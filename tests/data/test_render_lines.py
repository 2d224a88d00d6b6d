"""Conversations a line: parts join to the rendered text, and a bad line says what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llamafactory.data.chat_template import NamedTemplate, find_record
from llamafactory.data.render_lines import read_line, render_line
from llamafactory.data.row_error import RowError

ASK, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def chatml(_: bool | None) -> NamedTemplate:
    return NamedTemplate(record=find_record("chatml"), bos="<BOS>", eos="<EOS>")


def test_neighbours_are_joined() -> None:
    line = json.dumps({"messages": [ASK, REPLY, ASK, REPLY | {"train": False}]})
    (parts,) = render_line(line, "f:1", chatml)
    assert [trainable for _, trainable in parts] == [False, True, False]
    assert parts[1] == ("Hello<|im_end|>\n", True)
    assert parts[2][0].endswith("<|im_start|>assistant\nHello<|im_end|>\n")


@pytest.mark.parametrize(("given", "expected"), [({}, True), ({"enable_thinking": None}, None)])
def test_enable_thinking(given: dict[str, Any], expected: bool | None) -> None:
    assert read_line(json.dumps({"messages": [ASK, REPLY]} | given), "f:1")[1] is expected


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("{bad", "the line is not JSON"),
        ("[1]", "the line is not an object"),
        (json.dumps({"messages": [ASK, REPLY], "tool": []}), "tool: unknown key"),
        (json.dumps({"messages": [ASK, REPLY], "enable_thinking": "no"}), "enable_thinking: not a boolean"),
        (json.dumps({"messages": [ASK]}), "wrong last message"),
        (json.dumps({"messages": [ASK, REPLY | {"train": False}]}), "no answer carries loss"),
        (json.dumps({"messages": [{"role": "usr", "content": "a"}]}), "did you mean 'user'?"),
    ],
)
def test_bad_lines(line: str, fragment: str) -> None:
    with pytest.raises(RowError) as caught:
        render_line(line, "f:1", chatml)
    assert fragment in str(caught.value)
