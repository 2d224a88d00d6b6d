"""Calls from an answer that arrives in pieces."""

from __future__ import annotations

from typing import NamedTuple

from llamafactory.data.tool_formats.parts.syntax import Syntax, Tools
from llamafactory.data.types import ToolCall

_WORK = 16


class Streamed(NamedTuple):
    """What a piece of an answer brought: text that may be shown, and calls that are now whole."""

    text: str
    calls: tuple[ToolCall, ...]


class CallStream:
    """Splits one answer into text and calls while it arrives.

    All texts together are the text before the first call, all calls together are the calls: what the format's
    `parse_calls` gives for the whole answer. Text that may be the start of a call is held back until it is known to be
    none. What looked like a call to the end of the answer and cannot be read (it was cut off, say) comes with `close`.
    """

    def __init__(self, syntax: Syntax, tools: Tools = ()) -> None:
        """A stream of one answer; `tools` tell arguments that are text from numbers, where the syntax does not."""
        self._syntax, self._tools = syntax, tools
        self._held: list[str] = []
        self._length = 0
        self._start = 0  # what of the held text is still to be read: one character before it stays, for "line starts"
        self._tail = ""
        self._work = 0  # characters that may be read again: keeps the whole linear
        self._is_opened = self._has_calls = False

    def feed(self, text: str) -> Streamed:
        """Takes the next piece of the answer."""
        self._held.append(text)
        self._length += len(text)
        self._work += _WORK * len(text)
        shown = "" if self._is_opened else self._show()
        if not self._is_opened:
            return Streamed(shown, ())
        end = self._syntax.end
        fresh = self._tail + text
        self._tail = fresh[1 - len(end) :] if len(end) > 1 else ""
        if end not in fresh:
            return Streamed(shown, ())
        before, calls = self._read(is_last=False)
        return Streamed(shown + before, calls)

    def close(self) -> Streamed:
        """Ends the answer: what was held back, and calls that only the end of the answer completes."""
        before, calls = self._read(is_last=True)
        self._held, self._length, self._start = [], 0, 0
        return Streamed(before, calls)

    def _show(self) -> str:
        """The text that cannot belong to a call; notes where one may start."""
        text = "".join(self._held)
        opening = (self._syntax.opening or self._syntax.start).search(text, self._start)
        self._is_opened = opening is not None
        partial = None if opening else self._syntax.partial.search(text, self._start)
        stop = opening.start() if opening else partial.start() if partial else len(text)
        shown = text[self._start : stop]
        self._keep(text, stop)
        return shown

    def _read(self, *, is_last: bool) -> Streamed:
        if not is_last and self._length > self._work:
            return Streamed("", ())
        text = "".join(self._held)
        self._held, self._work = [text], self._work - self._length
        stop = len(text) if is_last else text.rfind(self._syntax.end, self._start) + len(self._syntax.end)
        found = self._syntax.find(text[:stop], self._start, self._tools)
        if not found.calls and not is_last:
            return Streamed("", ())
        before = "" if self._has_calls else text[self._start : found.start if found.calls else len(text)]
        self._has_calls = self._has_calls or bool(found.calls)
        if found.calls:
            self._keep(text, found.end)
        return Streamed(before, found.calls)

    def _keep(self, text: str, position: int) -> None:
        kept = max(0, position - 1)
        self._held, self._length, self._start = [text[kept:]], len(text) - kept, position - kept
