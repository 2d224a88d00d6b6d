"""Where an answer begins and ends in what a chat template writes.

The rule: training text is the prompt that generation starts from, then what the model must write from there on.
Usually the rendering with the answer starts with that prompt. Where it does not, because the prompt opens or closes a
thought that the rendering leaves out, the answer is put behind the prompt; the prompt itself is never changed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llamafactory.data.types import Message

_OPEN, _CLOSE = "<think>", "</think>"
_ENDS_OPEN = re.compile(r"<think>\s*$")
_ENDS_CLOSED = re.compile(r"<think>\s*</think>\s*$")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A rendering, and the character spans in it that are row text (only where that matters)."""

    text: str
    literals: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSpan:
    """An answer behind its prompt: `full.text[start:stop]` is the answer with its stop, the rest is white space."""

    prompt: Rendered
    full: Rendered
    start: int
    stop: int


def find_answer(prompt: Rendered, full: Rendered, message: Message) -> AnswerSpan | None:
    """The span of `message`, the last one in `full`; None where it cannot be told.

    Args:
        prompt: the history with the generation prompt.
        full: the history with the message.
        message: the answer.
    """
    if not full.text.startswith(prompt.text):
        moved = _behind_prompt(prompt, full, message)
        if moved is None:
            return None
        full = moved
    start = len(prompt.text)
    answer = full.text[start:]
    if _spoken(message) not in answer:
        return None
    ends_bare = answer == message.content  # a template without a stop: white space at the end is the row's own
    return AnswerSpan(
        prompt=prompt, full=full, start=start, stop=start + len(answer if ends_bare else answer.rstrip())
    )


def _behind_prompt(prompt: Rendered, full: Rendered, message: Message) -> Rendered | None:
    """The prompt, followed by what must be generated from it to get the message."""
    if match := _ENDS_CLOSED.search(prompt.text):  # no thought is wanted: the row's own is left out
        if not full.text.startswith(prompt.text[: match.start()]):
            return None
        close = full.text.find(_CLOSE, match.start())
        start = close + len(_CLOSE) if close >= 0 else match.start()
        start += len(full.text[start:]) - len(full.text[start:].lstrip())
        return _joined(prompt, "", full, start)
    common = _common_length(prompt.text, full.text)
    if prompt.text[common:].isspace():
        return _joined(prompt, "", full, common)
    if match := _ENDS_OPEN.search(prompt.text):  # the rendering has no thought, but one has been opened
        if not full.text.startswith(prompt.text[: match.start()]):
            return None
        thought = _THOUGHT.match(message.content)
        opened = f"{thought[1].lstrip()}{_CLOSE}" if thought else f"{_CLOSE}\n\n"
        return _joined(prompt, opened, full, match.start())
    content = message.content.strip()
    if content and not message.tool_calls and full.text.count(content, common) == 1:
        return _joined(prompt, "", full, full.text.index(content, common))
    return None


def _joined(prompt: Rendered, between: str, full: Rendered, start: int) -> Rendered:
    """`prompt + between + full[start:]`, with the literal spans of all three."""
    begin = len(prompt.text)
    shift = begin + len(between) - start
    literals = list(prompt.literals)
    if between and full.literals:
        literals.append((begin, begin + len(between) - len(_CLOSE)))
    literals += [(max(first, start) + shift, last + shift) for first, last in full.literals if last > start]
    return Rendered(text=prompt.text + between + full.text[start:], literals=literals)


def _spoken(message: Message) -> str:
    """What of the answer must show in any rendering: its text without the thought."""
    return message.content.split(_CLOSE)[-1].strip()


def _common_length(left: str, right: str) -> int:
    shorter = min(len(left), len(right))
    return next((place for place in range(shorter) if left[place] != right[place]), shorter)
