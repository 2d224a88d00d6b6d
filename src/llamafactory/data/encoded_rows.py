"""Rows -> examples: read, render, tokenise, cut. One way for training and for the commands that show rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamafactory.data.encode import EncodedTurn, Encoder, assemble_kept
from llamafactory.data.formats import Record
from llamafactory.data.records import RecordReader, chunked
from llamafactory.data.render import mask_options
from llamafactory.data.row_error import RowError
from llamafactory.data.table import NO_FLAG
from llamafactory.data.types import DatasetSpec, Example, Template, Turn, ViewName
from llamafactory.data.views import Cut, Reading, View, find_view, refuse_other_data
from llamafactory.extras import failpoints
from llamafactory.extras.errors import DataError
from llamafactory.hparams.data import DataConfig

_CHUNK_ROWS = 512
NO_TARGET = "no supervised token"
TOO_LONG = "longer than cutoff_len"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRow:
    """One row: what is kept of its sequences, and the examples made of them.

    Both are empty where no answer of the row carries loss.
    """

    origin: str
    flag: int = NO_FLAG
    counts: Counter[str] = field(default_factory=Counter[str])
    cuts: list[Cut] = field(default_factory=list[Cut])
    examples: list[Example] = field(default_factory=list[Example])


@dataclass(frozen=True, kw_only=True, slots=True)
class RowEncoder:
    """Everything that makes examples of a record.

    Attributes:
        view: how rows are read.
        reading: the template, masks and lengths.
        encoder: text -> ids.
        overlong: what happens to an example that was cut.
    """

    view: View
    reading: Reading
    encoder: Encoder
    overlong: str = "truncate"

    @classmethod
    def from_config(cls, data: DataConfig, view: ViewName, template: Template, tokenizer: Any) -> RowEncoder:
        """As a configuration asks for.

        Args:
            data: masks and lengths.
            view: how the stage reads rows.
            template: writes conversations.
            tokenizer: a transformers tokenizer with a Rust backend.
        """
        reading = Reading(
            template=template,
            mask=mask_options(data),
            cutoff_len=data.cutoff_len,
            end_token=getattr(tokenizer, "eos_token", None) or "",
            joins_text=data.packing is not False,
        )
        encoder = Encoder(tokenizer, is_whole=template.is_tokenized_whole)
        return cls(view=find_view(view), reading=reading, encoder=encoder, overlong=data.overlong)

    def encode(
        self, records: Sequence[tuple[str, Record]], lose: Callable[[str, RowError], None]
    ) -> Iterator[EncodedRow]:
        """The records as examples, in their order; those that break a rule are handed to `lose`."""
        failpoints.visit("data")
        sequences: list[Sequence[Turn]] = []
        rows: list[tuple[EncodedRow, int]] = []
        for origin, record in records:
            counts: Counter[str] = Counter()
            try:
                turns = self.view.render(record, self.reading, counts)
            except RowError as error:
                lose(origin, error)
                continue
            sequences += turns
            rows.append((EncodedRow(origin=origin, flag=self.view.flag(record), counts=counts), len(turns)))
        encoded: Iterator[list[EncodedTurn]] = iter(self.encoder.encode(sequences))
        for row, count in rows:
            row.cuts.extend(self.view.cut([next(encoded) for _ in range(count)], self.reading))
            row.examples.extend(assemble_kept(cut.turns, cut.kept) for cut in row.cuts)
            yield row

    def keep(self, examples: Sequence[Example], origin: str) -> tuple[list[Example], str]:
        """The examples of a row that are used, and why none is.

        Raises:
            DataError: an example is too long, and the config wants that to stop the run.
        """
        cut = next((example for example in examples if example.num_cut), None)
        if cut is not None and self.overlong == "error":
            cutoff_len = self.reading.cutoff_len
            raise DataError(
                "an example is longer than cutoff_len",
                where=origin,
                found=f"{len(cut) + cut.num_cut:,} tokens",
                expected=f"at most {cutoff_len:,} tokens (overlong: error)",
                fix="raise cutoff_len, or set overlong: truncate or drop",
            )
        fitting = [example for example in examples if not example.num_cut or self.overlong == "truncate"]
        kept = [example for example in fitting if example.num_supervised or not self.view.is_supervised]
        reason = NO_TARGET if fitting or not examples else TOO_LONG
        if self.view.is_whole and len(kept) < len(examples):
            return [], reason if len(fitting) == len(examples) else TOO_LONG
        return kept, reason


def open_reader(
    spec: DatasetSpec, data: DataConfig, view: View, *, seed: int, allows_media: bool = True
) -> RecordReader:
    """A reader of the rows that the config asks for; training does not allow rows with media.

    Raises:
        DataError: data that only another stage can learn from.
    """
    refuse_other_data(spec, view)
    return RecordReader(
        spec=spec,
        max_samples=data.max_samples,
        seed=seed,
        variables=data.data_variables,
        allows_media=allows_media,
    )


def encode_rows(reader: RecordReader, rows: RowEncoder) -> Iterator[EncodedRow]:
    """The rows of one data set as ids and labels, in their order; rows that break a rule go to `reader.lost`.

    Raises:
        DataError: unreadable data.
    """
    for chunk in chunked(iter(reader), _CHUNK_ROWS):
        yield from rows.encode(chunk, reader.lose)
