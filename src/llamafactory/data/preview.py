"""Rows as they will be trained: the text behind the token ids, what is supervised of it, and where it was cut.

Everything shown is decoded from the ids and labels that training gets; nothing is rendered a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from llamafactory.data.data_report import LostRow
from llamafactory.data.encode import clean_backend, cut_places
from llamafactory.data.encoded_rows import RowEncoder, encode_rows, open_reader
from llamafactory.data.render import LEFT_OUT
from llamafactory.data.table import NO_FLAG
from llamafactory.data.types import IGNORE_INDEX, DatasetSpec, Example, Template, ViewName
from llamafactory.extras.errors import DataError
from llamafactory.hparams.data import DataConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownToken:
    """One token id and its text; a token that is only a part of a character shows as U+FFFD."""

    id: int
    text: str
    is_supervised: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownSpan:
    """Neighbouring tokens that are supervised alike. `num_cut_behind`: tokens that truncation took out behind them."""

    text: str
    is_supervised: bool
    num_cut_behind: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownExample:
    """One training sequence. `is_used` is false where the sequence is left out of training."""

    spans: tuple[ShownSpan, ...]
    tokens: tuple[ShownToken, ...]
    num_tokens: int
    num_supervised: int
    num_cut: int
    is_used: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownRow:
    """One row; several examples where the template rewrites history, or where the view compares answers.

    Attributes:
        reason: why none of the examples is used.
        num_left_out: answers that `rewritten_history: last` leaves out.
        view: how the stage reads rows.
        is_liked: what the row says about its answer; None where it says nothing.
        value: the score of its answer or the margin of its pair; None where it has none.
    """

    dataset: str
    origin: str
    examples: tuple[ShownExample, ...]
    reason: str = ""
    num_left_out: int = 0
    view: ViewName = "sft"
    is_liked: bool | None = None
    value: float | None = None


def preview_rows(
    spec: DatasetSpec,
    data: DataConfig,
    template: Template,
    tokenizer: Any,
    *,
    seed: int,
    num_rows: int,
    view: ViewName = "sft",
) -> Iterator[ShownRow | LostRow]:
    """The first rows of a data set; rows that break a rule come last, as `LostRow`.

    Args:
        spec: the data set.
        data: how rows become ids and labels.
        template: writes conversations.
        tokenizer: a transformers tokenizer with a Rust backend.
        seed: decides which rows `num_samples` takes.
        num_rows: rows to read at most.
        view: how the stage reads rows.

    Raises:
        DataError: unreadable data.
    """
    backend = clean_backend(tokenizer)
    rows = RowEncoder.from_config(data, view, template, tokenizer)
    first = data.model_copy(update={"max_samples": min(num_rows, data.max_samples or num_rows)})
    reader = open_reader(spec, first, rows.view, seed=seed)
    for row in encode_rows(reader, rows):
        try:
            kept, reason = rows.keep(row)
        except DataError as error:
            kept, reason = (), error.what
        shown = [
            show_example(example, backend, cuts=cut_places(*cut), is_used=place in kept)
            for cut, place, example in zip(row.cuts, row.places, row.examples, strict=True)
        ]
        yield ShownRow(
            dataset=spec.name,
            origin=row.origin,
            examples=tuple(shown),
            reason="" if kept else reason,
            num_left_out=row.counts.get(LEFT_OUT, 0),
            view=view,
            is_liked=None if row.flag == NO_FLAG else bool(row.flag),
            value=row.value if reader.has_numbers else None,
        )
    yield from reader.lost


def show_example(
    example: Example, backend: Tokenizer, *, cuts: dict[int, int] | None = None, is_used: bool = True
) -> ShownExample:
    """The text of an example's ids, with its supervised spans and its cuts.

    Args:
        example: ids and labels as training gets them.
        backend: turns ids into text.
        cuts: position among the ids -> tokens taken out there, see `cut_places`.
        is_used: whether training uses it.
    """
    cuts = cuts or {}
    ids: list[int] = example.input_ids.tolist()
    is_supervised: list[bool] = (example.labels != IGNORE_INDEX).tolist()
    changes = {place for place in range(1, len(ids)) if is_supervised[place] != is_supervised[place - 1]}
    places = sorted({0, len(ids)} | changes | cuts.keys())
    spans = [
        ShownSpan(
            text=decode_part(backend, ids, start, stop),
            is_supervised=is_supervised[start],
            num_cut_behind=cuts.get(stop, 0),
        )
        for start, stop in pairwise(places)
    ]
    if 0 in cuts:
        spans.insert(0, ShownSpan(text="", is_supervised=False, num_cut_behind=cuts[0]))
    tokens = (
        ShownToken(id=token, text=decode_part(backend, ids, place, place + 1), is_supervised=is_supervised[place])
        for place, token in enumerate(ids)
    )
    return ShownExample(
        spans=tuple(spans),
        tokens=tuple(tokens),
        num_tokens=len(ids),
        num_supervised=example.num_supervised,
        num_cut=example.num_cut,
        is_used=is_used,
    )


def decode_part(backend: Tokenizer, ids: Sequence[int], start: int, stop: int) -> str:
    """The text of `ids[start:stop]` as it reads behind the token before it.

    Some decoders drop a space at the beginning of what they decode, so that a part alone would lose it.
    """
    before = ids[max(start - 1, 0) : start]
    whole = backend.decode([*before, *ids[start:stop]], skip_special_tokens=False)
    head = backend.decode(list(before), skip_special_tokens=False)
    if whole.startswith(head) and not head.endswith("\ufffd"):  # else the token before ends inside a character
        return whole[len(head) :]
    return backend.decode(ids[start:stop], skip_special_tokens=False)
