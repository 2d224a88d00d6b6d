"""Rows -> examples: read, render, tokenise, cut. One way for training and for the commands that show rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llamafactory.data.encode import Cut, Encoder, assemble_all
from llamafactory.data.formats import Record
from llamafactory.data.records import RecordReader, chunked
from llamafactory.data.render import mask_options
from llamafactory.data.row_error import RowError
from llamafactory.data.table import Shard
from llamafactory.data.types import DatasetSpec, Example, Template, Turn, ViewName
from llamafactory.data.views import Reading, View, find_view, fit_spec
from llamafactory.extras import failpoints
from llamafactory.extras.errors import DataError
from llamafactory.hparams.data import DataConfig

_CHUNK_ROWS = 512
NO_TARGET = "no supervised token"
TOO_LONG = "longer than cutoff_len"


class EncodedRow(NamedTuple):
    """One row: what is kept of its sequences, and the examples made of them; none where no answer carries loss.

    Attributes:
        origin: names the row.
        flag: what is said about its answer, see `View`.
        value: the number that it brings, see `View`.
        counts: what rendering counted.
        cuts: one an example.
        shard: where its examples lie, among those of other rows.
        places: the places of its examples there.
        num_supervised: of each example, the supervised tokens that can be predicted.
        num_cut: of each example, the tokens that were cut.
    """

    origin: str
    flag: int
    value: float
    counts: dict[str, int]
    cuts: Sequence[Cut]
    shard: Shard
    places: range
    num_supervised: Sequence[int]
    num_cut: Sequence[int]

    @property
    def examples(self) -> list[Example]:
        """The examples themselves."""
        return [self.shard.example(place) for place in self.places]


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

    def encode(self, records: Sequence[tuple[str, Record]], lose: Callable[[str, RowError], None]) -> list[EncodedRow]:
        """The records as examples, in their order; those that break a rule are handed to `lose`."""
        failpoints.visit("data")
        sequences: list[Sequence[Turn]] = []
        rows: list[tuple[str, int, float, dict[str, int], int]] = []
        for origin, record in records:
            counts: dict[str, int] = {}
            try:
                turns = self.view.render(record, self.reading, counts)
            except RowError as error:
                lose(origin, error)
                continue
            sequences += turns
            rows.append((origin, self.view.flag(record), self.view.value(record), counts, len(turns)))
        encoded = self.encoder.encode(sequences)
        cuts: list[Cut] = []
        ends: list[int] = []
        first = 0
        for *_, count in rows:
            cuts += self.view.cut(encoded[first : first + count], self.reading)
            first += count
            ends.append(len(cuts))
        shard = assemble_all(cuts)
        num_supervised, num_cut = shard.num_supervised.tolist(), shard.cuts.tolist()
        return [
            EncodedRow(origin, flag, value, counts, cuts[i:j], shard, range(i, j), num_supervised[i:j], num_cut[i:j])
            for (origin, flag, value, counts, _), i, j in zip(rows, [0, *ends], ends, strict=False)
        ]

    def keep(self, row: EncodedRow) -> tuple[Sequence[int], str]:
        """The places of the examples of a row that are used, and why none is.

        Raises:
            DataError: an example is too long, and the config wants that to stop the run.
        """
        if self.overlong == "error" and any(row.num_cut):
            place = next(place for place, num_cut in enumerate(row.num_cut) if num_cut)
            cutoff_len = self.reading.cutoff_len
            raise DataError(
                "an example is longer than cutoff_len",
                where=row.origin,
                found=f"{len(row.examples[place]) + row.num_cut[place]:,} tokens",
                expected=f"at most {cutoff_len:,} tokens (overlong: error)",
                fix="raise cutoff_len, or set overlong: truncate or drop",
            )
        judged = zip(row.places, row.num_supervised, row.num_cut, strict=True)
        fitting = [(place, count) for place, count, num_cut in judged if not num_cut or self.overlong == "truncate"]
        kept = [place for place, num_supervised in fitting if num_supervised or not self.view.is_supervised]
        reason = NO_TARGET if fitting or not row.places else TOO_LONG
        if self.view.is_whole and len(kept) < len(row.places):
            return (), reason if len(fitting) == len(row.places) else TOO_LONG
        return kept, reason


def open_reader(
    spec: DatasetSpec, data: DataConfig, view: View, *, seed: int, allows_media: bool = True
) -> RecordReader:
    """A reader of the rows that the config asks for; training does not allow rows with media.

    Raises:
        DataError: data that only another stage can learn from.
    """
    return RecordReader(
        spec=fit_spec(spec, view),
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
