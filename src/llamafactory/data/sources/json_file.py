"""`.jsonl` line by line and `.json` lists row by row: memory of a row and a buffer, whatever the file's size."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

from llamafactory.data.row_error import RowError, describe
from llamafactory.data.sources.row import Place, SourceFile, SourceRow, checked_row, json_object
from llamafactory.data.sources.text_file import empty_file, not_utf8, placed_lines, read_lines
from llamafactory.extras.errors import DataError

_LIST = 'a list of rows: [{"instruction": ..., "output": ...}, ...]'
_CHUNK_BYTES = 1 << 20
_FIRST_BYTES = 1 << 14
"""What is read first where reading begins inside a file: perhaps one row alone is wanted."""
_ESCAPE = 16
"""Characters before the end of a buffer in which an error may only mean that the value goes on."""
_decoder = json.JSONDecoder(object_pairs_hook=json_object)


def read_jsonl(file: SourceFile, start: Place | None = None) -> Iterator[SourceRow]:
    """One object a line; blank lines are passed over. A list of rows under this ending is read as such."""
    if _first_character(file) == "[":
        yield from _read_list(file, start)
        return
    for place, line in placed_lines(file, start):
        if line.strip():
            yield _read_line(line, f"{file.name}:{place.number}", place)


def read_json(file: SourceFile, start: Place | None = None) -> Iterator[SourceRow]:
    """A list of rows. One object a line, as in a `.jsonl` file, is read too."""
    first = _first_character(file)
    if first == "[":
        yield from _read_list(file, start)
    elif first == "{" and _has_object_lines(file):
        yield from read_jsonl(file, start)
    else:
        raise _not_a_list(file)


def _first_character(file: SourceFile) -> str:
    """The first character that is no white space; empty where there is none."""
    return next((line.lstrip()[0] for line in read_lines(file) if line.strip()), "")


def _has_object_lines(file: SourceFile) -> bool:
    """Whether the first line is a whole object and another line follows."""
    lines = (line for line in read_lines(file) if line.strip())
    try:
        json.loads(next(lines))
    except (json.JSONDecodeError, RecursionError):
        return False
    return next(lines, None) is not None


def _read_line(line: str, origin: str, place: Place) -> SourceRow:
    try:
        return checked_row(_decoder.decode(line.rstrip()), origin, place)
    except json.JSONDecodeError as error:
        fault = RowError(
            "the line is not JSON",
            field=f"column {error.colno}",
            found=error.msg,
            expected="one JSON object a line",
            fix="" if line.rstrip().endswith("}") else "the line may be cut off",
        )
    except RecursionError:
        fault = RowError("the line is nested too deep", field="row", found="deep nesting", expected="a flat row")
    return SourceRow(origin=origin, values={}, fault=fault, place=place)


def _read_list(file: SourceFile, start: Place | None) -> Iterator[SourceRow]:
    with file.open() as stream:
        text = _Window(file, stream, 0 if start is None else start.offset)
        if start is None:
            text.expect("[")
        first = 1 if start is None else start.number
        number = first - 1
        while text.peek() != "]":
            if number >= first:
                text.expect(",")
                text.peek()
            number += 1
            place = file.place(number, text.offset)
            yield checked_row(text.value(), f"{file.name}#{number}", place)
        text.expect("]")
        if text.peek():
            raise text.fault("Extra data")


class _Window:
    """The part of a JSON text around the place that is read."""

    def __init__(self, file: SourceFile, stream: BinaryIO, start: int = 0) -> None:
        """`start` is the first byte that is read; there a character must begin."""
        self._file, self._stream, self._start = file, stream, start
        if start or stream.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            stream.seek(start)
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._chunk = _FIRST_BYTES if start else _CHUNK_BYTES
        self._text, self._place = "", 0
        self._counted, self._bytes = 0, stream.tell()  # a place in `_text`, and the offset of its byte in the file
        self._line, self._column = 1, 0  # of the first character of `_text`; the line from 1, the column from 0
        self._read_line = 1  # of the next byte of the stream
        self._is_at_end = False

    @property
    def offset(self) -> int:
        """Where in the file the next character begins, in bytes."""
        self._count_bytes()
        return self._bytes

    def _count_bytes(self) -> None:
        self._bytes += len(self._text[self._counted : self._place].encode())
        self._counted = self._place

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            text, place = self._text, self._place
            while place < len(text) and text[place] in " \t\r\n":
                place += 1
            self._place = place
            if place < len(text):
                return text[place]
            if self._is_at_end:
                return ""
            self._read_more()

    def expect(self, character: str) -> None:
        """Pass over this character."""
        if self.peek() != character:
            raise self.fault(f"Expecting '{character}'" + (" or ']'" if character == "," else ""))
        self._place += 1

    def value(self) -> object:
        """The next JSON value."""
        self.peek()
        while True:
            try:
                value, stop = _decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                may_go_on = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _ESCAPE
                if self._is_at_end or not may_go_on:
                    raise self.fault(error.msg, error.pos) from error
            except RecursionError as error:
                raise DataError("the JSON is nested too deep", where=self._file.where, expected=_LIST) from error
            else:
                if stop < len(self._text) or self._is_at_end:  # else a number may go on
                    self._place = stop
                    return value
            self._read_more()

    def _read_more(self) -> None:
        """Drop what was read, and at least double what is left."""
        self._count_bytes()
        passed = self._text[: self._place]
        lines = passed.count("\n")
        self._column = len(passed) - passed.rfind("\n") - 1 if lines else self._column + len(passed)
        self._line += lines
        rest = self._text[self._place :]
        raw = self._stream.read(max(self._chunk, len(rest)))
        self._chunk = _CHUNK_BYTES
        self._is_at_end = not raw
        try:
            self._text = rest + self._decode.decode(raw, final=self._is_at_end)
        except UnicodeDecodeError as error:
            line = self._read_line + self._before()[0]
            raise not_utf8(raw or error.object, error.start, self._file, line=line) from error
        self._place = self._counted = 0
        self._read_line += raw.count(b"\n")

    def _before(self) -> tuple[int, int]:
        """Lines before the first byte that was read, and characters before it in its own line."""
        if not self._start:
            return 0, 0
        with self._file.open() as stream:
            raw = stream.read(self._start)
        last = raw[raw.rfind(b"\n") + 1 :]
        return raw.count(b"\n"), len(last.decode("utf-8-sig", errors="replace"))

    def fault(self, message: str, place: int | None = None) -> DataError:
        """The error for a place in the text."""
        passed = self._text[: self._place if place is None else place]
        lines = passed.count("\n")
        lines_before, columns_before = self._before()
        line = lines_before + self._line + lines
        column = len(passed) - passed.rfind("\n") if lines else self._column + len(passed) + 1
        if self._line + lines == 1:
            column += columns_before
        is_cut = self._is_at_end and not self._text.rstrip().endswith(("]", "}"))
        return DataError(
            "the file is not valid JSON",
            where=f"{self._file.where}:{line}",
            found=f"{message} (line {line}, column {column})",
            expected="JSON",
            fix="the file may be cut off at its end" if is_cut else None,
        )


def _not_a_list(file: SourceFile) -> DataError:
    """The error for a file whose text does not begin as a list; such a file is read whole to say what it holds."""
    with file.open() as stream:
        raw = stream.read()
    if not raw.strip():
        return empty_file(file, len(raw))
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return DataError(
            "the file is not valid JSON",
            where=f"{file.where}:{error.lineno}",
            found=f"{error.msg} (line {error.lineno}, column {error.colno})",
            expected="JSON",
            fix="the file may be cut off at its end" if not raw.rstrip().endswith((b"]", b"}")) else None,
        )
    except UnicodeDecodeError as error:
        return not_utf8(raw, error.start, file, line=1)
    except RecursionError:
        return DataError("the JSON is nested too deep", where=file.where, expected=_LIST)
    return DataError(
        "the file does not hold a list of rows",
        where=file.where,
        found=f"{describe(value)} at the top level",
        expected=_LIST,
        fix="put the rows into a list, or write one row a line into a .jsonl file",
    )
