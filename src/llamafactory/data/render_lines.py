"""Conversations in OpenAI form, one a line, as a template writes them. Pure text; needs no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeAlias, cast

from llamafactory.data.formats import openai
from llamafactory.data.render import render_turns
from llamafactory.data.row_error import RowError, describe
from llamafactory.data.types import Conversation, DatasetSpec, MaskOptions, Segment, Template, Turn

TextPart: TypeAlias = tuple[str, bool]
"""Text, and whether it is trainable."""
_KEYS = ("messages", "tools", "enable_thinking")
_SPEC = DatasetSpec(
    name="render",
    source="file",
    location="",
    formatting="openai",
    columns=openai.DEFAULT_COLUMNS,
    tags=openai.DEFAULT_TAGS,
)


def read_line(line: str, origin: str, *, default_thinking: bool | None = True) -> tuple[Conversation, bool | None]:
    """The conversation in a line, and its `enable_thinking`, or the default of that where the line does not say.

    Raises:
        RowError: not JSON, an unknown key, or a rule of the OpenAI form is broken.
    """
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        found = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else "too deep"
        raise RowError("the line is not JSON", field="line", found=found, expected="one JSON object a line") from error
    if not isinstance(row, dict):
        expected = '{"messages": [...], ...}'
        raise RowError("the line is not an object", field="line", found=describe(row), expected=expected)
    if unknown := [key for key in row if key not in _KEYS]:
        raise RowError("unknown key", field=unknown[0], found=describe(row), expected=", ".join(_KEYS))
    thinking = row.get("enable_thinking", default_thinking)
    if thinking is not None and not isinstance(thinking, bool):
        raise RowError(
            "not a boolean", field="enable_thinking", found=describe(thinking), expected="true, false or null"
        )
    return cast(Conversation, openai.read_row(row, _SPEC, origin)), thinking


def render_line(
    line: str,
    origin: str,
    find_template: Callable[[bool | None], Template],
    *,
    default_thinking: bool | None = True,
) -> list[list[TextPart]]:
    """The training sequences of a line's conversation: usually one; one an answer where history is rewritten.

    Args:
        line: JSON.
        origin: where the line came from.
        find_template: the template for a value of `enable_thinking`.
        default_thinking: that value where the line has none.

    Raises:
        RowError: see `read_line`, or the template refuses the conversation.
    """
    conversation, thinking = read_line(line, origin, default_thinking=default_thinking)
    sequences = render_turns(conversation, find_template(thinking), MaskOptions())
    if not sequences:
        raise RowError("no answer carries loss", field="messages", found="train or weight marks", expected="an answer")
    return [joined_parts(turns) for turns in sequences]


def joined_parts(turns: Sequence[Turn]) -> list[TextPart]:
    """The text of a sequence, neighbours that are trainable alike joined."""
    segments: list[Segment] = [segment for turn in turns for segment in (*turn.prompt, *turn.answer)]
    groups = groupby((segment for segment in segments if segment.text), key=lambda segment: segment.trainable)
    return [("".join(segment.text for segment in group), trainable) for trainable, group in groups]
