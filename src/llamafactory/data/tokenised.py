"""One data set, tokenised: taken from the cache, or made shard by shard and kept there."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llamafactory.data.cache_key import fingerprint_of
from llamafactory.data.data_report import DatasetReport, LostRow
from llamafactory.data.encoded_rows import RowEncoder
from llamafactory.data.formats import Record
from llamafactory.data.records import RecordReader
from llamafactory.data.render import LEFT_OUT, REWRITTEN
from llamafactory.data.row_error import RowError
from llamafactory.data.sources import SourceRow, list_files
from llamafactory.data.table import ExampleTable, Shard, ShardBuilder, table_of
from llamafactory.data.token_cache import TokenCache
from llamafactory.data.types import DatasetSpec
from llamafactory.extras import log
from llamafactory.extras.errors import DataError

ROWS_PER_SHARD = 4096
_ROWS_AT_ONCE = 512
_SECONDS_BETWEEN_LINES = 10.0
_SHIFTED = "sequences whose prompt ids change when the answer follows"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenised:
    """One data set: its examples, what became of its rows, and the rows that were lost."""

    table: ExampleTable
    report: DatasetReport
    lost: list[LostRow]
    num_shifted: int


def tokenise(reader: RecordReader, rows: RowEncoder, cache: TokenCache, *, remakes: bool = False) -> Tokenised:
    """The data set from the cache; what the cache does not have is made first.

    Args:
        reader: the rows.
        rows: what makes examples of them.
        cache: where they are kept.
        remakes: make all of it again, whatever is there.

    Raises:
        DataError: unreadable data, a row that stops the run, or a cache folder that cannot be written.
    """
    found = None if remakes else cache.load()
    if found is None:
        with cache.only_writer():
            if remakes:
                cache.clear()
            found = cache.load()  # another process may have made it while this one waited
            found = _make(reader, rows, cache) if found is None else found
    names = dict(zip(cache.file_names(), _file_names(reader.spec), strict=False))
    return _together(cache, reader.spec.name, found, names)


def take_stored(cache: TokenCache) -> Tokenised:
    """A data set that was tokenised before, without a look at its rows.

    Raises:
        DataError: it is incomplete or damaged.
    """
    found = cache.load()
    if found is None:
        raise DataError(
            "tokenised rows are incomplete or damaged", where=str(cache.folder), fix="set dataset to make them again"
        )
    return _together(cache, cache.name, found, {})


def _file_names(spec: DatasetSpec) -> list[str]:
    return [file.name for file in list_files(Path(spec.location))] if spec.source == "file" else []


def _make(reader: RecordReader, rows: RowEncoder, cache: TokenCache) -> list[tuple[Shard, dict[str, Any]]]:
    """Makes the shards that are not sealed yet, and maps all of them.

    Starts again where looked-up words turn out to be wrong: no shard that was made with them is kept.
    """
    number, num_rows = 0, 0
    had_lost_words = rows.encoder.has_lost_words
    last_line = time.monotonic()
    for number, chunk in enumerate(row_chunks(reader.rows(), ROWS_PER_SHARD), start=1):
        num_rows += len(chunk)
        if not cache.has(number - 1):
            cache.seal(number - 1, *encode_shard(chunk, reader, rows))
        if rows.encoder.has_lost_words and not had_lost_words:
            cache.clear()
            return _make(reader, rows, cache)
        if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
            log.info(f"{reader.spec.name}: {num_rows:,} rows tokenised")
            last_line = time.monotonic()
    cache.finish(number, _file_names(reader.spec))
    return [cache.read(place) for place in range(number)]


def encode_shard(chunk: Sequence[SourceRow], reader: RecordReader, rows: RowEncoder) -> tuple[Shard, dict[str, Any]]:
    """The examples of some rows, and what is to be remembered about them."""
    builder = ShardBuilder()
    bad: list[LostRow] = []
    dropped: list[LostRow] = []
    counts: Counter[str] = Counter()
    num_shifted = rows.encoder.num_shifted

    def lose(origin: str, error: RowError) -> None:
        bad.append(LostRow.from_error("", origin, error))

    with log.recording() as said, _without_cycle_search():
        for part in row_chunks(iter(chunk), _ROWS_AT_ONCE):
            for row in rows.encode(list(_records(part, reader, lose)), lose):
                if row.counts:
                    counts.update(row.counts)
                kept, reason = rows.keep(row)
                if kept:
                    builder.take(row.shard, kept, row.flag, row.value)
                    builder.note_origin(row.origin)
                else:
                    dropped.append(LostRow(dataset="", origin=row.origin, reason=reason, is_bad=False))
    shard = builder.build()
    counts["supervised"] = int(shard.num_supervised.sum())
    counts[_SHIFTED] = rows.encoder.num_shifted - num_shifted
    record = {
        "num_rows": len(chunk),
        "counts": dict(counts),
        "lost": [asdict(row) for row in bad + dropped],
        "said": said,
    }
    return shard, record


@contextmanager
def _without_cycle_search() -> Iterator[None]:
    """No search for cyclic garbage while a shard is made: there is none, and the search is a seventh of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _records(part: Iterable[SourceRow], reader: RecordReader, lose: Any) -> Iterator[tuple[str, Record]]:
    for row in part:
        try:
            yield row.origin, reader.read(row)
        except RowError as error:
            lose(row.origin, error)


def _together(
    cache: TokenCache, name: str, found: Sequence[tuple[Shard, Mapping[str, Any]]], file_names: Mapping[str, str]
) -> Tokenised:
    """All shards as one data set, under the name that it and its files have now; repeats what was said about them."""
    for _, record in found:
        for kind, message in record["said"]:
            log.repeat(kind, message)
    table = table_of(_renamed(shard, file_names) for shard, _ in found)
    records = [record for _, record in found]
    lost = [
        replace(LostRow(**row), dataset=name, origin=_origin_now(row["origin"], file_names))
        for record in records
        for row in record["lost"]
    ]
    counts: Counter[str] = sum((Counter(record["counts"]) for record in records), Counter())
    num_cut = [shard.cuts for shard, _ in found]
    report = DatasetReport(
        name=name,
        num_rows=sum(record["num_rows"] for record in records),
        num_kept=table.num_groups,
        num_examples=len(table),
        dropped=dict(Counter(row.reason for row in lost).most_common()),
        num_truncated=sum(int(np.count_nonzero(cuts)) for cuts in num_cut),
        num_cut_tokens=sum(int(cuts.sum(dtype=np.int64)) for cuts in num_cut),
        num_tokens=int(table.lengths.sum()),
        num_supervised_tokens=counts["supervised"],
        fingerprint=fingerprint_of(cache.parts),
        num_rewritten=counts[REWRITTEN],
        num_left_out=counts[LEFT_OUT],
    )
    return Tokenised(table=table, report=report, lost=lost, num_shifted=counts[_SHIFTED])


def _origin_now(origin: str, file_names: Mapping[str, str]) -> str:
    """`rows.jsonl:12` with the name that the file has now."""
    file, mark, number = origin.rpartition("#" if "#" in origin else ":")
    return f"{file_names.get(file, file)}{mark}{number}"


def _renamed(shard: Shard, file_names: Mapping[str, str]) -> Shard:
    """The shard with the names that its files have now."""
    names = tuple(f"{file_names.get(name[:-1], name[:-1])}{name[-1]}" for name in shard.origin_names)
    return replace(shard, origin_names=names)


def row_chunks(rows: Iterator[SourceRow], size: int) -> Iterator[list[SourceRow]]:
    """Lists of up to `size` rows."""
    while chunk := list(islice(rows, size)):
        yield chunk
