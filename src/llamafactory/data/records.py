"""One data set -> canonical records, with what was wrong in the other rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from llamafactory.data.data_report import LostRow
from llamafactory.data.formats import Record, RowFormat, find_format
from llamafactory.data.order import sample_order
from llamafactory.data.row_error import RowError
from llamafactory.data.row_media import conversation_of, with_media
from llamafactory.data.row_numbers import with_numbers
from llamafactory.data.sources import SourceRow, read_source
from llamafactory.data.types import Conversation, DatasetSpec, Feedback, Message, Preference, Scored
from llamafactory.extras.errors import DataError
from llamafactory.extras.log import warn

_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_MEANT_AS_VARIABLES = frozenset({"name", "author"})


@dataclass(kw_only=True)
class RecordReader:
    """Reads one data set; after the last record, the other attributes hold what was seen on the way.

    Attributes:
        spec: the data set.
        max_samples: rows to read at most, None: all.
        seed: decides which rows `num_samples` takes.
        variables: values for `{{key}}` placeholders in texts.
        allows_media: False stops at the first row with images, videos or audios: this version trains on text alone.
        num_rows: rows read so far.
        lost: rows that broke a rule.
    """

    spec: DatasetSpec
    max_samples: int | None = None
    seed: int = 0
    variables: Mapping[str, str] = field(default_factory=dict)
    allows_media: bool = True
    num_rows: int = 0
    lost: list[LostRow] = field(default_factory=list)

    @property
    def has_numbers(self) -> bool:
        """Whether every row has a score or a margin."""
        return bool(self.spec.columns.get("score") or self.spec.columns.get("margin"))

    def lose(self, origin: str, error: RowError) -> None:
        """Note a row that cannot be used."""
        self.lost.append(LostRow.from_error(self.spec.name, origin, error))

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        """Origin and record of each row that keeps the rules."""
        for row in self.rows():
            self.num_rows += 1
            try:
                record = self.read(row)
            except RowError as error:
                self.lose(row.origin, error)
                continue
            yield row.origin, record

    def rows(self) -> Iterator[SourceRow]:
        """The rows that are asked for, not yet read as records."""
        if (wanted := self.spec.num_samples) is None:
            return islice(read_source(self.spec), self.max_samples)
        total = sum(1 for _ in read_source(self.spec))  # a second pass needs less memory than all rows
        numbers = sample_order(total, wanted, self.seed)[: self.max_samples].tolist()
        needed = set(numbers)
        kept = {number: row for number, row in enumerate(read_source(self.spec)) if number in needed}
        return (kept[number] for number in numbers)

    def read(self, row: SourceRow) -> Record:
        """The row as a record.

        Raises:
            RowError: the row breaks a rule.
            DataError: it brings media that are not allowed.
        """
        record = read_record(row, find_format(self.spec.formatting), self.spec)
        if not self.allows_media:
            require_text_alone(record, row.origin)
        return fill_variables(record, self.variables, self.spec.name)


def read_record(row: SourceRow, row_format: RowFormat, spec: DatasetSpec) -> Record:
    """The row in canonical form, with its media and the numbers that judge its answers.

    Raises:
        RowError: the row breaks a rule.
    """
    if row.fault is not None:
        raise row.fault
    record = with_numbers(row_format.read_row(row.values, spec, row.origin), row.values, spec)
    return with_media(record, row.values, spec)


def hashable(row: SourceRow) -> bytes:
    """The content of a row as bytes that two rows share only if they are alike."""
    return json.dumps(row.values, default=str, sort_keys=True).encode()


def require_text_alone(record: Record, origin: str) -> None:
    """Raises: DataError for a record with images, videos or audios, which this version cannot train on."""
    if media := conversation_of(record).media:
        raise DataError(
            f"{media[0].kind}s are not trained in this version",
            where=origin,
            found=f"{len(media)} files, the first in {media[0].column}",
            expected="rows of text alone",
            fix="data check, data preview and data stats read such rows; leave the data set out of training",
        )


def fill_variables(record: Record, variables: Mapping[str, str], dataset: str) -> Record:
    """The record with `{{key}}` replaced in its texts for each key of `variables`; other braces stay.

    `{{name}}` and `{{author}}` are known from identity data; left unfilled they bring one warning.
    """

    def fill(message: Message) -> Message:
        if "{{" not in message.content:
            return message
        content = _PLACEHOLDER.sub(lambda match: variables.get(match[1], match[0]), message.content)
        for word in sorted(_MEANT_AS_VARIABLES.intersection(_PLACEHOLDER.findall(content)) - variables.keys()):
            warn(
                f"rows of '{dataset}' hold the placeholder {{{{{word}}}}}, and it is trained as written; "
                f"set data_variables: {{{word}: ...}} to fill it",
                once=True,
            )
        return replace(message, content=content)

    match record:
        case Preference():
            prompt = _with_messages(record.prompt, fill)
            return replace(record, prompt=prompt, chosen=fill(record.chosen), rejected=fill(record.rejected))
        case Feedback() | Scored():
            return replace(record, conversation=_with_messages(record.conversation, fill))
        case _:
            return _with_messages(record, fill)


def _with_messages(conversation: Conversation, fill: Callable[[Message], Message]) -> Conversation:
    for message in conversation.messages:
        if "{{" in message.content:
            break
    else:
        return conversation
    return replace(conversation, messages=tuple(fill(message) for message in conversation.messages))


def chunked(records: Iterator[tuple[str, Record]], size: int) -> Iterator[Sequence[tuple[str, Record]]]:
    """Lists of up to `size` records."""
    while chunk := list(islice(records, size)):
        yield chunk
