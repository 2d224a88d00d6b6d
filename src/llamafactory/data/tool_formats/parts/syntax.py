"""How calls of one syntax are found in a text; whole texts and streams go through the same two records."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from llamafactory.data.types import ToolCall

Tools: TypeAlias = Sequence[Mapping[str, object]]
_MAX_FAILED = 64


class Block(NamedTuple):
    """Calls that stand together, and where the text goes on behind them."""

    calls: tuple[ToolCall, ...]
    end: int


class Found(NamedTuple):
    """All calls of a text: where the first starts (the text's length without one) and where the last ends."""

    start: int
    calls: tuple[ToolCall, ...]
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Syntax:
    """What tells calls from text.

    Attributes:
        start: matches where a call may start; no longer than a name and some markup.
        partial: matches the end of a text that may yet grow into what `opening` or `start` matches.
        end: a text that stands at or inside the end of every call; a stream looks for calls when it has seen one.
        read: reads what starts at a position; None where that is no call, or not yet a whole one. What it reads from
            a text that is cut behind an `end` is what it reads from the whole text.
        opening: matches where a stream stops to show text, where that is earlier than `start`.
    """

    start: re.Pattern[str]
    partial: re.Pattern[str]
    end: str
    read: Callable[[str, int, Tools], Block | None]
    opening: re.Pattern[str] | None = None

    def find(self, text: str, position: int = 0, tools: Tools = ()) -> Found:
        """The calls from `position` on. Gives up after some blocks that it cannot read: time stays linear."""
        calls: list[ToolCall] = []
        first, end, num_failed = len(text), position, 0
        while num_failed < _MAX_FAILED and (match := self.start.search(text, position)):
            block = self.read(text, match.start(), tools)
            if block is None:
                num_failed += 1
                position = match.start() + 1
            else:
                first = first if calls else match.start()
                calls += block.calls
                position = end = block.end
        return Found(first, tuple(calls), end)

    def parse(self, text: str, tools: Tools = ()) -> tuple[str, tuple[ToolCall, ...]]:
        """The text before the first call, and all calls; text between or behind calls is left out."""
        found = self.find(text, 0, tools)
        return text[: found.start], found.calls


def fixed(*marks: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns `start` and `partial` of a syntax whose calls start with one of these texts."""
    longest_first = sorted(marks, key=len, reverse=True)
    beginnings = sorted({mark[:length] for mark in marks for length in range(1, len(mark))}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))), re.compile(
        f"(?:{'|'.join(map(re.escape, beginnings))})\\Z"
    )
