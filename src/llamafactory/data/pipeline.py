"""Config -> training and evaluation examples: read, render, encode, count. The order of work, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamafactory.data.blocks import cut_blocks
from llamafactory.data.cache_key import key_parts, method_parts
from llamafactory.data.data_report import DataReport
from llamafactory.data.encoded_rows import RowEncoder, open_reader
from llamafactory.data.kept_rows import note_size
from llamafactory.data.lost_rows import keep_lost_rows, refuse_useless
from llamafactory.data.mix import Mix, mix_rows
from llamafactory.data.order import split_order
from llamafactory.data.records import RecordReader
from llamafactory.data.registry import find_specs
from llamafactory.data.source_rows import SourceRows
from llamafactory.data.stream import ExampleStream
from llamafactory.data.table import Examples, ExampleTable, join_tables
from llamafactory.data.token_cache import TokenCache, TokenCaches
from llamafactory.data.tokenised import Tokenised, take_stored, tokenise
from llamafactory.data.types import SourceAccess, Template, ViewName
from llamafactory.extras import log
from llamafactory.extras.errors import DataError
from llamafactory.hparams.data import DataConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """What a run trains and evaluates on.

    `evaluation` has the key `eval`, or the names of the data sets with `eval_on_each_dataset`. `mix` says how the rows
    of several data sets make up an epoch; None: each row comes once. With a `stream`, `train` holds only the first
    rows. `source_rows` finds the row of an example, where rows were read.
    """

    train: Examples
    evaluation: Mapping[str, Examples]
    report: DataReport
    mix: Mix | None = None
    stream: ExampleStream | None = None
    source_rows: SourceRows | None = None


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
    cache_dir: Path | None = None,
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
        cache_dir: where tokenised rows are kept; None: this user's cache folder.

    Raises:
        DataError: unreadable data, too many bad rows, or nothing to train on.
    """
    if data.val_size and data.eval_dataset:
        raise DataError(
            "val_size and eval_dataset are both given", where="val_size", expected="one of them", fix="remove one"
        )
    rows = RowEncoder.from_config(data, view, template, tokenizer)
    caches = TokenCaches.of(data, cache_dir)
    sets: dict[str, list[Tokenised]] = {"train": [], "eval": []}
    made: list[tuple[str, int, RecordReader, TokenCache]] = []
    has_grown = False
    for use, names in (("train", data.dataset), ("eval", data.eval_dataset)):
        for spec in find_specs(names, data.dataset_dir, access or SourceAccess(media_dir=data.media_dir)):
            reader = open_reader(spec, data, rows.view, seed=seed, allows_media=False)
            cache = caches.find(use, spec.name, key_parts(reader, rows))
            has_grown |= cache.manifest() is None
            had_lost_words = rows.encoder.has_lost_words
            sets[use].append(tokenise(reader, rows, cache, remakes=data.overwrite_cache))
            refuse_useless(sets[use][-1], data, output_dir)
            if rows.encoder.has_lost_words and not had_lost_words:
                for other, place, earlier, doubted in made:
                    sets[other][place] = tokenise(earlier, rows, doubted, remakes=True)
            made.append((use, len(sets[use]) - 1, reader, cache))
    _note_growth(caches, has_grown=has_grown)
    if not data.dataset and not data.eval_dataset:
        for cache in caches.stored(method_parts(rows)):
            sets[cache.use].append(take_stored(cache))
    everything = [one for part in sets.values() for one in part]
    keep_lost_rows(everything, output_dir)
    training, held_out = split_groups(join_tables([one.table for one in sets["train"]]), data.val_size, seed)
    if for_training and not training.num_groups:
        raise DataError("nothing to train on", where="dataset", found="no data set is named", fix="set dataset")
    mix = _mix_of(data, sets["train"], training, seed)
    mix_report = mix.realised() if mix else []
    if mix is not None and is_cut_into_blocks(data, view):
        training, mix = training.select(mix_rows(mix, 0)), None
    train = as_read(training, data, view)
    tables = _evaluation_tables(data, sets["eval"], held_out)
    evaluation = {name: as_read(table, data, view) for name, table in tables.items()}
    report = DataReport(
        datasets=tuple(one.report for one in everything),
        num_train=len(train),
        num_evaluation={name: len(examples) for name, examples in evaluation.items()},
        mix=tuple(mix_report),
    )
    source_rows = SourceRows([(reader, sets[use][place]) for use, place, reader, _ in made])
    return PreparedData(train=train, evaluation=evaluation, report=report, mix=mix, source_rows=source_rows)


def _note_growth(caches: TokenCaches, *, has_grown: bool) -> None:
    if has_grown and not caches.is_named and log.is_main_process():
        note_size(caches.root)


def _mix_of(data: DataConfig, sets: Sequence[Tokenised], training: ExampleTable, seed: int) -> Mix | None:
    """How the training rows are mixed, where the config asks for more than one after the other."""
    if data.mix_strategy == "concat" or len(sets) < 2:
        return None
    sizes = [one.table.num_groups for one in sets]
    if training.num_groups != sum(sizes):  # rows were held out
        sizes = sizes_for_training(sizes, data.val_size, seed)
    return Mix(
        names=tuple(one.report.name for one in sets),
        sizes=tuple(sizes),
        strategy=data.mix_strategy,
        probs=data.interleave_probs or None,
        seed=seed,
    )


def is_cut_into_blocks(data: DataConfig, view: ViewName) -> bool:
    """Whether documents are joined and cut, and not trained one by one."""
    return view == "text" and data.packing is not False


def as_read(table: ExampleTable, data: DataConfig, view: ViewName) -> Examples:
    """The table as the stage reads it: documents are cut into blocks unless packing is off."""
    if not is_cut_into_blocks(data, view):
        return table
    return cut_blocks(table, data.cutoff_len, is_isolated=data.neat_packing)


def _evaluation_tables(data: DataConfig, sets: Sequence[Tokenised], held_out: ExampleTable) -> dict[str, ExampleTable]:
    if data.eval_on_each_dataset and sets:
        return {one.report.name: one.table for one in sets}
    table = join_tables([held_out, *(one.table for one in sets)])
    return {"eval": table} if table.num_groups else {}


def sizes_for_training(sizes: Sequence[int], val_size: float, seed: int) -> list[int]:
    """How many rows of each data set are left where `val_size` holds rows of all of them out.

    Raises:
        DataError: none would be left.
    """
    kept = np.setdiff1d(np.arange(sum(sizes)), held_out_rows(sum(sizes), val_size, seed))
    return np.diff(np.searchsorted(kept, np.cumsum([0, *sizes]))).tolist()


def held_out_rows(count: int, val_size: float, seed: int) -> NDArray[np.int64]:
    """The numbers of the rows that `val_size` keeps for evaluation, in no order.

    Raises:
        DataError: nothing would be left to train on.
    """
    rows = split_order(count, seed)[: int(val_size) if val_size >= 1 else ceil(count * val_size)]
    if count and len(rows) == count:
        raise DataError(
            "val_size leaves no rows for training",
            where="val_size",
            found=f"{val_size:g} of {count:,} rows",
            expected=f"less than {count:,} rows, or a share below 1",
        )
    return rows


def split_groups(table: ExampleTable, val_size: float, seed: int) -> tuple[ExampleTable, ExampleTable]:
    """Training and held-out groups, both in their order. `val_size` from 1 up is a number of rows, below a share.

    Raises:
        DataError: nothing would be left to train on.
    """
    count = table.num_groups
    held_out = held_out_rows(count, val_size, seed)
    if not len(held_out):
        return table, table.select([])
    is_held_out = np.zeros(count, dtype=bool)
    is_held_out[held_out] = True
    return table.select(np.flatnonzero(~is_held_out)), table.select(np.flatnonzero(is_held_out))
