"""Finds row text inside a rendering, so that special-token strings in it can be kept plain.

The conversation is rendered a second time with each text wrapped in private-use characters. Only if that rendering
without the wrappers is the first one, character by character, do the wrappers tell where row text is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llamafactory.data.types import Message

_OPEN, _CLOSE = "\ue0f0", "\ue0f1"


def mark_content(messages: Sequence[Message]) -> list[Message]:
    """The messages with each text wrapped, surrounding white space outside (templates like to strip it)."""
    return [replace(message, content=_wrap(message.content)) for message in messages]


def find_literal_spans(text: str, marked: str) -> list[tuple[int, int]] | None:
    """Spans of `text` that are wrapped in `marked`; None if the wrappers changed more than themselves."""
    if _OPEN in text or _CLOSE in text:
        return None
    spans: list[tuple[int, int]] = []
    bare: list[str] = []
    position, start = 0, -1
    for character in marked:
        if character == _OPEN and start < 0:
            start = position
        elif character == _CLOSE and start >= 0:
            spans.append((start, position))
            start = -1
        elif character in (_OPEN, _CLOSE):
            return None
        else:
            bare.append(character)
            position += 1
    return spans if start < 0 and "".join(bare) == text else None


def _wrap(text: str) -> str:
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    return f"{text[:start]}{_OPEN}{core}{_CLOSE}{text[start + len(core) :]}"
