from __future__ import annotations

import pytest

from llamafactory.data.answer_span import Rendered, find_answer
from llamafactory.data.types import Message


@pytest.mark.parametrize(
    ("prompt", "full", "content", "answer"),
    [
        ("Q: a\nA:", "Q: a\nA: b</s>\n", "b", " b</s>"),
        ("Q: a\nA:", "Q: a\nA:b  ", "b", "b"),
        ("Q: a\nA:", "Q: a\nA:b\n", "b\n", "b\n"),  # no stop: the white space is the row's
        ("a[x]<think>\n", "a[x]<think></think>b</s>", "b", "</think>b</s>"),
        ("a[x]<think>\n\n</think>\n\n", "a[x]<think>\nwhy\n</think>\n\nb</s>", "<think>\nwhy\n</think>\n\nb", "b</s>"),
        ("a[x]<think>\n", "a[x]b</s>", "b", "</think>\n\nb</s>"),
        ("a[generate]", "a[x]b</s>", "b", "b</s>"),
    ],
)
def test_where_the_answer_is(prompt: str, full: str, content: str, answer: str) -> None:
    span = find_answer(Rendered(text=prompt), Rendered(text=full), Message(role="assistant", content=content))
    assert span is not None
    assert span.full.text[span.start : span.stop] == answer
    assert span.full.text[: span.start] == prompt


@pytest.mark.parametrize(("prompt", "full"), [("a[y]", "a[x]b b"), ("a[y]", "a[x]c"), ("a[x]", "a[x]c")])
def test_where_it_cannot_be_told(prompt: str, full: str) -> None:
    assert find_answer(Rendered(text=prompt), Rendered(text=full), Message(role="assistant", content="b")) is None


def test_literal_spans_move_with_the_answer() -> None:
    full = Rendered(text="a[x]b</s>", literals=[(0, 1), (4, 5)])
    prompt = Rendered(text="a[generate]", literals=[(0, 1)])
    span = find_answer(prompt, full, Message(role="assistant", content="b"))
    assert span is not None
    assert span.full.text == "a[generate]b</s>"
    assert list(span.full.literals) == [(0, 1), (11, 12)]
