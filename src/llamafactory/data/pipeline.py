"""Config -> training and evaluation examples: read, render, encode, count. The order of work, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from llamafactory.data.blocks import cut_blocks
from llamafactory.data.data_report import DataReport, DatasetReport, LostRow, refuse_bad_rows, write_lost_rows
from llamafactory.data.encoded_rows import RowEncoder, encode_rows, open_reader
from llamafactory.data.order import split_order
from llamafactory.data.records import RecordReader
from llamafactory.data.registry import find_specs
from llamafactory.data.render import LEFT_OUT, REWRITTEN
from llamafactory.data.table import Examples, ExampleTable, ShardBuilder, join_tables, table_of
from llamafactory.data.types import DatasetSpec, SourceAccess, Template, ViewName
from llamafactory.extras.errors import DataError
from llamafactory.extras.log import note, warn
from llamafactory.hparams.data import DataConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """What a run trains and evaluates on.

    `evaluation` has the key `eval`, or the names of the data sets with `eval_on_each_dataset`.
    """

    train: Examples
    evaluation: Mapping[str, Examples]
    report: DataReport


@dataclass(frozen=True, kw_only=True, slots=True)
class _Encoded:
    """One data set: the examples of each kept row."""

    table: ExampleTable
    report: DatasetReport
    lost: list[LostRow]


def prepare_data(
    data: DataConfig,
    template: Template,
    tokenizer: Any,
    *,
    seed: int,
    view: ViewName = "sft",
    access: SourceAccess | None = None,
    for_training: bool = True,
    output_dir: Path | None = None,
) -> PreparedData:
    """Read all data sets of the config and make examples of them.

    Args:
        data: which data sets, and how rows become ids and labels.
        template: writes conversations.
        tokenizer: a transformers tokenizer with a Rust backend.
        view: how the stage reads rows.
        access: tokens and folders of hubs, see `access_of`.
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
    rows = RowEncoder.from_config(data, view, template, tokenizer)
    encoded: dict[str, list[_Encoded]] = {}
    for key, names in (("train", data.dataset), ("eval", data.eval_dataset)):
        specs = find_specs(names, data.dataset_dir, access or SourceAccess(media_dir=data.media_dir))
        encoded[key] = [_encode_dataset(spec, data, rows, seed=seed, output_dir=output_dir) for spec in specs]
    if output_dir is not None:
        write_lost_rows([row for part in encoded.values() for one in part for row in one.lost], output_dir)
    if rows.encoder.num_shifted:
        note(
            f"in {rows.encoder.num_shifted:,} sequences the last ids of a prompt change when its answer follows",
            once=True,
        )
    everything = join_tables([one.table for one in encoded["train"]])
    training, held_out = split_groups(everything, data.val_size, seed)
    if for_training and not training.num_groups:
        raise DataError("nothing to train on", where="dataset", found="no data set is named", fix="set dataset")
    tables = _evaluation_tables(data, encoded["eval"], held_out)
    train = _as_read(training, data, view)
    evaluation = {name: _as_read(table, data, view) for name, table in tables.items()}
    report = DataReport(
        datasets=tuple(one.report for part in encoded.values() for one in part),
        num_train=len(train),
        num_evaluation={name: len(examples) for name, examples in evaluation.items()},
    )
    return PreparedData(train=train, evaluation=evaluation, report=report)


def _as_read(table: ExampleTable, data: DataConfig, view: ViewName) -> Examples:
    """The table as the stage reads it: documents are cut into blocks unless packing is off."""
    if view != "text" or data.packing is False:
        return table
    return cut_blocks(table, data.cutoff_len, is_isolated=data.neat_packing)


def _evaluation_tables(
    data: DataConfig, encoded: Sequence[_Encoded], held_out: ExampleTable
) -> dict[str, ExampleTable]:
    if data.eval_on_each_dataset and encoded:
        return {one.report.name: one.table for one in encoded}
    table = join_tables([held_out, *(one.table for one in encoded)])
    return {"eval": table} if table.num_groups else {}


def _encode_dataset(
    spec: DatasetSpec, data: DataConfig, rows: RowEncoder, *, seed: int, output_dir: Path | None
) -> _Encoded:
    reader = open_reader(spec, data, rows.view, seed=seed, allows_media=False)
    builder = ShardBuilder()
    lost: list[LostRow] = []
    counts: Counter[str] = Counter()
    for row in encode_rows(reader, rows):
        counts.update(row.counts)
        kept, reason = rows.keep(row.examples, row.origin)
        if kept:
            builder.add(kept, row.flag)
        else:
            lost.append(LostRow(dataset=spec.name, origin=row.origin, reason=reason, is_bad=False))
    table = table_of([builder.build()])
    lost = reader.lost + lost
    report = _count(spec.name, reader, table, lost, counts)
    _refuse_useless(spec, report, lost, data, output_dir)
    return _Encoded(table=table, report=report, lost=lost)


def _count(
    name: str, reader: RecordReader, table: ExampleTable, lost: Iterable[LostRow], counts: Mapping[str, int]
) -> DatasetReport:
    cuts = np.concatenate([shard.cuts for shard in table.shards])
    return DatasetReport(
        name=name,
        num_rows=reader.num_rows,
        num_kept=table.num_groups,
        num_examples=len(table),
        dropped=dict(Counter(row.reason for row in lost).most_common()),
        num_truncated=int((cuts > 0).sum()),
        num_cut_tokens=int(cuts.sum()),
        num_tokens=int(table.lengths.sum()),
        num_supervised_tokens=sum(example.num_supervised for example in table),
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


def split_groups(table: ExampleTable, val_size: float, seed: int) -> tuple[ExampleTable, ExampleTable]:
    """Training and held-out groups, both in their order. `val_size` from 1 up is a number of rows, below a share.

    Raises:
        DataError: nothing would be left to train on.
    """
    count = table.num_groups
    wanted = int(val_size) if val_size >= 1 else ceil(count * val_size)
    if wanted == 0:
        return table, table.select([])
    if wanted >= count:
        raise DataError(
            "val_size leaves no rows for training",
            where="val_size",
            found=f"{val_size:g} of {count:,} rows",
            expected=f"less than {count:,} rows, or a share below 1",
        )
    is_held_out = np.zeros(count, dtype=bool)
    is_held_out[split_order(count, seed)[:wanted]] = True
    return table.select(np.flatnonzero(~is_held_out)), table.select(np.flatnonzero(is_held_out))
