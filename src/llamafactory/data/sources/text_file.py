"""Text files line by line, in memory of one line: the lines themselves, `.txt` and `.csv`."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from llamafactory.data.row_error import RowError
from llamafactory.data.sources.row import SourceFile, SourceRow
from llamafactory.extras.errors import DataError


def read_lines(file: SourceFile) -> Iterator[str]:
    r"""The lines of a UTF-8 file with their `\n` (CRLF is kept); a byte order mark is taken off.

    Raises:
        DataError: not UTF-8, or nothing but white space; the latter comes after the last line.
    """
    has_text = False
    num_bytes = 0
    with file.open() as stream:
        for number, raw in enumerate(stream, start=1):
            num_bytes += len(raw)
            has_text = has_text or bool(raw.strip())
            yield decode(raw, file, line=number)
    if not has_text:
        raise empty_file(file, num_bytes)


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


def read_txt(file: SourceFile) -> Iterator[SourceRow]:
    """Each line with text is a row with the column `text`."""
    for number, line in enumerate(read_lines(file), start=1):
        if line.strip():
            yield SourceRow(origin=f"{file.name}:{number}", values={"text": line.rstrip("\r\n")})


def read_csv(file: SourceFile) -> Iterator[SourceRow]:
    """Rows under a header line. A value may hold line breaks; the origin is the line where the row ends."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(read_lines(file), strict=True)
    try:
        for row in reader:
            origin = f"{file.name}:{reader.line_num}"
            fault = None
            if None in row or any(value is None for value in row.values()):
                extra = row.get(None)
                count = sum(value is not None for name, value in row.items() if name is not None) + len(extra or ())
                names = len(reader.fieldnames or ())
                fault = RowError(
                    "wrong number of columns",
                    field="row",
                    found=f"{count} values",
                    expected=f"{names}, as in the first line",
                )
            yield SourceRow(origin=origin, values=row, fault=fault)
    except csv.Error as error:
        where = f"{file.where}:{reader.line_num}"
        raise DataError(
            "the file is not valid CSV", where=where, found=str(error), expected="CSV with a header"
        ) from error
