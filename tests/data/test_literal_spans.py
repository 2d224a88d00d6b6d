from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data.literal_spans import find_literal_spans, mark_content
from llamafactory.data.types import Message


@given(st.lists(st.text(st.characters(exclude_categories=("Cs", "Co"))), max_size=4))
def test_the_marked_text_is_found_again(contents: list[str]) -> None:
    messages = [Message(role="user", content=content) for content in contents]
    text = "".join(f"[{message.content}]" for message in messages)
    marked = "".join(f"[{message.content}]" for message in mark_content(messages))
    spans = find_literal_spans(text, marked)
    assert spans is not None
    assert [text[first:last] for first, last in spans] == [content.strip() for content in contents if content.strip()]


def test_a_text_that_changed_more_than_its_marks_is_not_trusted() -> None:
    assert find_literal_spans("3abc", "5\ue0f0abc\ue0f1") is None
    assert find_literal_spans("abc", "\ue0f0abc") is None
    assert find_literal_spans("a\ue0f0", "a\ue0f0") is None
