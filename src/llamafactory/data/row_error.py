"""What is wrong with one row, and the checks that every format shares. Row contents are never shown whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence


class RowError(Exception):
    """A row breaks a rule of its format.

    Attributes:
        reason: what is wrong, the same words for every row with this fault (rows are counted by it).
        field: where in the row, such as `conversations[2].value`.
        found: what is there, in short.
        expected: what should be there.
        fix: what to do, or an empty text.
    """

    def __init__(self, reason: str, *, field: str, found: str, expected: str, fix: str = "") -> None:
        """Keep the parts."""
        self.reason, self.field, self.found, self.expected, self.fix = reason, field, found, expected, fix
        super().__init__(reason)

    def __str__(self) -> str:
        """One line."""
        text = f"{self.field}: {self.reason} (found {self.found}; expected {self.expected})"
        return f"{text}; {self.fix}" if self.fix else text


def describe(value: object) -> str:
    """What a value is, without showing what may be private or long."""
    match value:
        case None:
            return "null"
        case bool():
            return f"the boolean {str(value).lower()}"
        case int() | float():
            return f"the number {value}"
        case str():
            short = json.dumps(value[:24], ensure_ascii=False)
            return (
                f"the text {short}" if len(value) <= 24 else f"a text of {len(value)} characters that starts {short}"
            )
        case Mapping():
            keys = ", ".join(str(key) for key in list(value)[:6])
            return f"an object with the keys {keys}" if value else "an empty object"
        case Sequence():
            return f"a list of {len(value)}"
        case _:
            return f"a {type(value).__name__}"


def read_text(value: object, field: str) -> str:
    """The text at `field`; null counts as empty.

    Raises:
        RowError: not a text, or a text that no tokenizer reads (NUL, half of a surrogate pair).
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError("not a text", field=field, found=describe(value), expected="a text", fix="put it in quotes")
    if "\x00" in value:
        place = value.index("\x00")
        raise RowError(
            "a NUL character",
            field=field,
            found=f"NUL at character {place + 1}",
            expected="text without NUL",
            fix="remove it; it often means that the file was not saved as UTF-8",
        )
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"\\u{ord(value[error.start]):04x} at character {error.start + 1}"
            raise RowError(
                "half of a surrogate pair", field=field, found=found, expected="valid Unicode text", fix="remove it"
            ) from error
    return value


def read_filled_text(value: object, field: str, what: str) -> str:
    """As `read_text`, but blank text is an error; `what` names it: `answer`, `user message`.

    Raises:
        RowError: as `read_text`, or blank.
    """
    text = read_text(value, field)
    if not text.strip():
        found = "null" if value is None else "an empty text" if not text else "only white space"
        raise RowError(f"the {what} is empty", field=field, found=found, expected=f"the text of the {what}")
    return text


def read_json(value: str, field: str, what: str) -> object:
    """The JSON value in a text.

    Raises:
        RowError: not JSON.
    """
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        detail = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else "too deep"
        raise RowError(
            f"{what} is not JSON", field=field, found=f"{describe(value)} ({detail})", expected="JSON text"
        ) from error
