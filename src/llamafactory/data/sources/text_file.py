"""Text files line by line, in memory of one line: the lines themselves, `.txt` and `.csv`."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from llamafactory.data.row_error import RowError
from llamafactory.data.sources.row import Place, SourceFile, SourceRow
from llamafactory.extras.errors import DataError


def read_lines(file: SourceFile) -> Iterator[str]:
    r"""The lines of a UTF-8 file with their `\n` (CRLF is kept); a byte order mark is taken off.

    Raises:
        DataError: not UTF-8, or nothing but white space; the latter comes after the last line.
    """
    return (text for _, text in placed_lines(file))


def placed_lines(file: SourceFile, start: Place | None = None) -> Iterator[tuple[Place, str]]:
    """The lines of a file, each with its place, as `read_lines`.

    Args:
        file: of text.
        start: the place of the first line to read; None: the first of the file.

    Raises:
        DataError: as `read_lines`.
    """
    has_text = start is not None
    first, offset = (1, 0) if start is None else (start.number, start.offset)
    with file.open() as stream:
        stream.seek(offset)
        for number, raw in enumerate(stream, start=first):
            has_text = has_text or bool(raw.strip())
            yield file.place(number, offset), decode(raw, file, line=number)
            offset += len(raw)
    if not has_text:
        raise empty_file(file, offset)


def decode(raw: bytes, file: SourceFile, *, line: int) -> str:
    """Bytes of the file that begin at `line`, as text.

    Raises:
        DataError: not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(raw, error.start, file, line=line) from error


def not_utf8(raw: bytes, place: int, file: SourceFile, *, line: int) -> DataError:
    """The error for a wrong byte at `place` of bytes that begin at `line`."""
    is_wide = line == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    at = line + raw.count(b"\n", 0, place)
    byte = f"byte 0x{raw[place]:02x} in line {at}"
    return DataError(
        "the file is not UTF-8",
        where=file.where,
        found="a UTF-16 byte order mark" if is_wide else byte,
        expected="UTF-8 text",
        fix="save the file as UTF-8",
    )


def empty_file(file: SourceFile, num_bytes: int) -> DataError:
    """The error for a file without any text."""
    return DataError("the file is empty", where=file.where, found=f"{num_bytes} bytes", expected="at least one row")


def read_txt(file: SourceFile, start: Place | None = None) -> Iterator[SourceRow]:
    """Each line with text is a row with the column `text`."""
    for place, line in placed_lines(file, start):
        if line.strip():
            values = {"text": line.rstrip("\r\n")}
            yield SourceRow(origin=f"{file.name}:{place.number}", values=values, place=place)


def read_csv(file: SourceFile, start: Place | None = None) -> Iterator[SourceRow]:
    """Rows under a header line. A value may hold line breaks; the origin is the line where the row ends."""
    csv.field_size_limit(2**31 - 1)
    names = None if start is None else csv.DictReader(read_lines(file), strict=True).fieldnames
    places: list[Place] = []  # of the lines since the row before

    def lines() -> Iterator[str]:
        for place, text in placed_lines(file, start):
            places.append(place)
            yield text

    reader = csv.DictReader(lines(), names, strict=True)
    before = 0 if start is None else start.number - 1  # lines that this reader does not see
    try:
        if start is None:
            names = reader.fieldnames  # the header
            places.clear()
        for row in reader:
            line, place = before + reader.line_num, places[0]
            places.clear()
            origin = f"{file.name}:{line}"
            fault = None
            if None in row or any(value is None for value in row.values()):
                extra = row.get(None)
                count = sum(value is not None for name, value in row.items() if name is not None) + len(extra or ())
                wanted = len(reader.fieldnames or ())
                fault = RowError(
                    "wrong number of columns",
                    field="row",
                    found=f"{count} values",
                    expected=f"{wanted}, as in the first line",
                )
            yield SourceRow(origin=origin, values=row, fault=fault, place=place)
    except csv.Error as error:
        where = f"{file.where}:{before + reader.line_num}"
        raise DataError(
            "the file is not valid CSV", where=where, found=str(error), expected="CSV with a header"
        ) from error
