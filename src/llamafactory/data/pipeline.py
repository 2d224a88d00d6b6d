"""Config -> training and evaluation examples: read, render, encode, count. The order of work, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from llamafactory.data.data_report import DataReport, DatasetReport, LostRow, refuse_bad_rows, write_lost_rows
from llamafactory.data.encode import EncodedTurn, Encoder, assemble
from llamafactory.data.order import split_order
from llamafactory.data.records import RecordReader, chunked
from llamafactory.data.registry import find_specs
from llamafactory.data.render import LEFT_OUT, REWRITTEN, mask_options, render_turns
from llamafactory.data.row_error import RowError
from llamafactory.data.types import Conversation, DatasetSpec, Example, Template, Turn
from llamafactory.extras import failpoints
from llamafactory.extras.errors import DataError
from llamafactory.extras.log import note, warn
from llamafactory.hparams.data import DataConfig

_CHUNK_ROWS = 512
NO_TARGET = "no supervised token"
TOO_LONG = "longer than cutoff_len"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """What a run trains and evaluates on.

    `evaluation` has the key `eval`, or the names of the data sets with `eval_on_each_dataset`.
    """

    train: Sequence[Example]
    evaluation: Mapping[str, Sequence[Example]]
    report: DataReport


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRow:
    """One row: its sequences before truncation, and the examples made of them.

    Both are empty where no answer of the row carries loss. `num_left_out` counts answers that would be sequences of
    their own, but for `rewritten_history: last`.
    """

    origin: str
    sequences: list[list[EncodedTurn]]
    examples: list[Example]
    num_left_out: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Encoded:
    """One data set: the examples of each kept row."""

    rows: list[list[Example]]
    report: DatasetReport
    lost: list[LostRow]


def prepare_data(
    data: DataConfig,
    template: Template,
    tokenizer: Any,
    *,
    seed: int,
    for_training: bool = True,
    output_dir: Path | None = None,
) -> PreparedData:
    """Read all data sets of the config and make examples of them.

    Args:
        data: which data sets, and how rows become ids and labels.
        template: writes conversations.
        tokenizer: a transformers tokenizer with a Rust backend.
        seed: decides which rows are held out by `val_size`; the order of training rows is decided later, by epoch.
        for_training: whether there must be something to train on.
        output_dir: where `bad_rows.jsonl` goes if rows are lost; None: nowhere.

    Raises:
        DataError: unreadable data, too many bad rows, or nothing to train on.
    """
    if data.val_size and data.eval_dataset:
        raise DataError(
            "val_size and eval_dataset are both given", where="val_size", expected="one of them", fix="remove one"
        )
    encoder = Encoder(tokenizer, is_whole=template.is_tokenized_whole)
    encoded: dict[str, list[_Encoded]] = {}
    for key, names in (("train", data.dataset), ("eval", data.eval_dataset)):
        encoded[key] = []
        for spec in find_specs(names, data.dataset_dir):
            encoded[key].append(_encode_dataset(spec, data, template, encoder, seed=seed, output_dir=output_dir))
    if output_dir is not None:
        write_lost_rows([row for part in encoded.values() for one in part for row in one.lost], output_dir)
    if encoder.num_shifted:
        note(
            f"in {encoder.num_shifted:,} sequences the last ids of a prompt change when its answer follows", once=True
        )
    rows = [row for one in encoded["train"] for row in one.rows]
    train_rows, held_out = _split(rows, data.val_size, seed)
    if for_training and not train_rows:
        raise DataError("nothing to train on", where="dataset", found="no data set is named", fix="set dataset")
    evaluation = _evaluation_sets(data, encoded["eval"], held_out)
    train = _flat(train_rows)
    report = DataReport(
        datasets=tuple(one.report for part in encoded.values() for one in part),
        num_train=len(train),
        num_evaluation={name: len(examples) for name, examples in evaluation.items()},
    )
    return PreparedData(train=train, evaluation=evaluation, report=report)


def _evaluation_sets(
    data: DataConfig, encoded: Sequence[_Encoded], held_out: Sequence[list[Example]]
) -> dict[str, list[Example]]:
    if data.eval_on_each_dataset and encoded:
        return {one.report.name: _flat(one.rows) for one in encoded}
    rows = [*held_out, *(row for one in encoded for row in one.rows)]
    return {"eval": _flat(rows)} if rows else {}


def _encode_dataset(
    spec: DatasetSpec, data: DataConfig, template: Template, encoder: Encoder, *, seed: int, output_dir: Path | None
) -> _Encoded:
    reader = open_reader(spec, data, seed=seed)
    rows: list[list[Example]] = []
    lost: list[LostRow] = []
    counts: Counter[str] = Counter()
    for row in encode_rows(reader, data, template, encoder):
        counts.update({REWRITTEN: len(row.sequences) + row.num_left_out > 1, LEFT_OUT: row.num_left_out})
        kept, reason = keep_examples(row.examples, data, row.origin)
        if kept:
            rows.append(kept)
        else:
            lost.append(LostRow(dataset=spec.name, origin=row.origin, reason=reason, is_bad=False))
    lost = reader.lost + lost
    report = _count(spec.name, reader, rows, lost, counts)
    _refuse_useless(spec, report, lost, data, output_dir)
    return _Encoded(rows=rows, report=report, lost=lost)


def open_reader(spec: DatasetSpec, data: DataConfig, *, seed: int) -> RecordReader:
    """A reader of the rows that the config asks for.

    Raises:
        DataError: data that only another stage can learn from.
    """
    _refuse_other_stage(spec)
    return RecordReader(spec=spec, max_samples=data.max_samples, seed=seed, variables=data.data_variables)


def encode_rows(reader: RecordReader, data: DataConfig, template: Template, encoder: Encoder) -> Iterator[EncodedRow]:
    """The rows of one data set as ids and labels, in their order; rows that break a rule go to `reader.lost`.

    Raises:
        DataError: unreadable data.
    """
    mask = mask_options(data)
    for chunk in chunked(iter(reader), _CHUNK_ROWS):
        failpoints.visit("data")
        sequences: list[Sequence[Turn]] = []
        owners: list[int] = []
        rows: dict[int, EncodedRow] = {}
        for number, (origin, record) in enumerate(chunk):
            counts: Counter[str] = Counter()
            try:
                turns = render_turns(_conversation(record), template, mask, counts=counts)
            except RowError as error:
                reader.lose(origin, error)
                continue
            rows[number] = EncodedRow(origin=origin, sequences=[], examples=[], num_left_out=counts[LEFT_OUT])
            sequences += turns
            owners += [number] * len(turns)
        for number, turns in zip(owners, encoder.encode(sequences), strict=True):
            rows[number].sequences.append(turns)
            example = assemble(turns, data.cutoff_len, keep_last=mask.is_last_only)
            rows[number].examples.append(replace(example, origin=rows[number].origin))
        yield from rows.values()


def _conversation(record: object) -> Conversation:
    """The record as a conversation with an answer.

    Raises:
        RowError: a row of plain text.
    """
    if not isinstance(record, Conversation):
        raise TypeError(f"{type(record).__name__} is not a conversation")
    if not any(message.role == "assistant" for message in record.messages):
        raise RowError(
            "no answer",
            field="response",
            found="a row of plain text",
            expected="a prompt and an answer",
            fix="name the column of answers: columns: {response: ...}",
        )
    return record


def keep_examples(examples: Sequence[Example], data: DataConfig, origin: str) -> tuple[list[Example], str]:
    """The examples of a row that are used, and why none is.

    Raises:
        DataError: an example is too long, and the config wants that to stop the run.
    """
    cut = next((example for example in examples if example.num_cut), None)
    if cut is not None and data.overlong == "error":
        raise DataError(
            "an example is longer than cutoff_len",
            where=origin,
            found=f"{len(cut) + cut.num_cut:,} tokens",
            expected=f"at most {data.cutoff_len:,} tokens (overlong: error)",
            fix="raise cutoff_len, or set overlong: truncate or drop",
        )
    fitting = [example for example in examples if not example.num_cut or data.overlong == "truncate"]
    kept = [example for example in fitting if example.num_supervised]
    return kept, NO_TARGET if fitting or not examples else TOO_LONG


def _count(
    name: str,
    reader: RecordReader,
    rows: Sequence[list[Example]],
    lost: Iterable[LostRow],
    counts: Mapping[str, int],
) -> DatasetReport:
    examples = _flat(rows)
    return DatasetReport(
        name=name,
        num_rows=reader.num_rows,
        num_kept=len(rows),
        num_examples=len(examples),
        dropped=dict(Counter(row.reason for row in lost).most_common()),
        num_truncated=sum(example.num_cut > 0 for example in examples),
        num_cut_tokens=sum(example.num_cut for example in examples),
        num_tokens=sum(len(example) for example in examples),
        num_supervised_tokens=sum(example.num_supervised for example in examples),
        fingerprint=reader.fingerprint,
        num_rewritten=counts[REWRITTEN],
        num_left_out=counts[LEFT_OUT],
    )


def _refuse_useless(
    spec: DatasetSpec, report: DatasetReport, lost: Sequence[LostRow], data: DataConfig, output_dir: Path | None
) -> None:
    """Stop on too many bad rows, or where no row is left; say which rows are dropped otherwise."""
    try:
        refuse_bad_rows(spec.name, lost, report.num_rows, data.max_bad_rows)
        if not report.num_kept:
            reasons = ", ".join(f"{reason}: {count:,} rows" for reason, count in report.dropped.items())
            raise DataError(
                "no row has a supervised token",
                where=spec.name,
                found=reasons or "no rows",
                expected="at least one answer within cutoff_len",
                fix=f"raise cutoff_len (now {data.cutoff_len:,}), or look at train and weight marks in the rows",
            )
    except DataError:
        if output_dir is not None:
            write_lost_rows(lost, output_dir)
        raise
    if lost:
        warn(f"{spec.name}: {len(lost):,} of {report.num_rows:,} rows are not used; first: {_short(lost[0])}")


def _short(row: LostRow) -> str:
    return row.render() if row.is_bad else f"{row.origin}: {row.reason}"


def _refuse_other_stage(spec: DatasetSpec) -> None:
    """Raises: DataError for data that only another stage can learn from."""
    if spec.is_ranking:
        found, stages = "preference pairs (ranking: true)", "rm, dpo"
    elif spec.columns.get("kto_tag"):
        found, stages = "judged answers (a kto_tag column)", "kto"
    else:
        return
    raise DataError(
        "the data set does not fit the stage",
        where=spec.name,
        found=found,
        expected="conversations whose answers are all good",
        fix=f"such data is for the stages: {stages}",
    )


def _split(rows: list[list[Example]], val_size: float, seed: int) -> tuple[list[list[Example]], list[list[Example]]]:
    """Training rows and held-out rows, both in their order. `val_size` from 1 up is a number of rows, below a share.

    Raises:
        DataError: nothing would be left to train on.
    """
    wanted = int(val_size) if val_size >= 1 else ceil(len(rows) * val_size)
    if wanted == 0:
        return rows, []
    if wanted >= len(rows):
        raise DataError(
            "val_size leaves no rows for training",
            where="val_size",
            found=f"{val_size:g} of {len(rows):,} rows",
            expected=f"less than {len(rows):,} rows, or a share below 1",
        )
    held_out = set(split_order(len(rows), seed)[:wanted].tolist())
    train = [row for number, row in enumerate(rows) if number not in held_out]
    return train, [rows[number] for number in sorted(held_out)]


def _flat(rows: Iterable[list[Example]]) -> list[Example]:
    return [example for row in rows for example in row]
