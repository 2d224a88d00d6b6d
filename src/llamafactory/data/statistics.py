"""Numbers about the rows of a data set, counted on the ids and labels that training gets. Prints nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamafactory.data.encoded_rows import RowEncoder, encode_rows, open_reader
from llamafactory.data.mix import Mix
from llamafactory.data.pipeline import sizes_for_training
from llamafactory.data.types import DatasetSpec, Example, Template, ViewName
from llamafactory.hparams.data import DataConfig

_NUM_BINS = 12
_WITHOUT_STOP = {"truncate": "truncate", "drop": "drop", "error": "drop"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetStatistics:
    """Numbers of one data set; unlike in training, bad rows stop nothing here.

    Attributes:
        num_rows: rows read.
        num_kept: rows that training would use.
        dropped: rows left out, by reason.
        num_examples: training sequences.
        num_tokens: tokens of all examples, after truncation.
        num_supervised_tokens: those of them that carry loss.
        lengths: int64 `[example]` tokens of each sequence before truncation, the dropped ones too.
        num_over_cutoff: rows with a sequence longer than `cutoff_len`, whatever `overlong` makes of them.
        num_cut_tokens: tokens that truncation takes out of the examples.
        num_duplicates: examples that equal an earlier one in all ids and labels.
        values: float64 `[rows used]` scores or margins of the rows; empty where they have none.
    """

    name: str
    num_rows: int
    num_kept: int
    dropped: dict[str, int]
    num_examples: int
    num_tokens: int
    num_supervised_tokens: int
    lengths: NDArray[np.int64]
    num_over_cutoff: int
    num_cut_tokens: int
    num_duplicates: int
    values: NDArray[np.float64]

    @property
    def supervised_share(self) -> float:
        """Supervised tokens by tokens, from 0 to 1."""
        return self.num_supervised_tokens / self.num_tokens if self.num_tokens else 0.0


class LengthBin(NamedTuple):
    """Sequences of `first` to `last` tokens, both included."""

    first: int
    last: int
    num_sequences: int


def measure_dataset(
    spec: DatasetSpec, data: DataConfig, template: Template, tokenizer: Any, *, seed: int, view: ViewName = "sft"
) -> DatasetStatistics:
    """Read, render and encode every row that training would read, and count.

    Raises:
        DataError: unreadable data.
    """
    rows = RowEncoder.from_config(
        data.model_copy(update={"overlong": _WITHOUT_STOP[data.overlong]}), view, template, tokenizer
    )
    reader = open_reader(spec, data, rows.view, seed=seed)
    dropped: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    lengths: list[int] = []
    values: list[float] = []
    seen: set[bytes] = set()
    for row in encode_rows(reader, rows):
        lengths += [len(example) + example.num_cut for example in row.examples]
        totals["over"] += any(row.num_cut)
        kept, reason = rows.keep(row)
        if not kept:
            dropped[reason] += 1
        totals["kept"] += bool(kept)
        values += [row.value] if kept and reader.has_numbers else []
        for example in [row.shard.example(place) for place in kept]:
            totals["examples"] += 1
            totals["tokens"] += len(example)
            totals["supervised"] += example.num_supervised
            totals["cut"] += example.num_cut
            seen.add(_digest(example))
    dropped.update(row.reason for row in reader.lost)
    return DatasetStatistics(
        name=spec.name,
        num_rows=reader.num_rows,
        num_kept=totals["kept"],
        dropped=dict(dropped.most_common()),
        num_examples=totals["examples"],
        num_tokens=totals["tokens"],
        num_supervised_tokens=totals["supervised"],
        lengths=np.array(lengths, dtype=np.int64),
        num_over_cutoff=totals["over"],
        num_cut_tokens=totals["cut"],
        num_duplicates=totals["examples"] - len(seen),
        values=np.array(values, dtype=np.float64),
    )


def length_histogram(lengths: NDArray[np.int64]) -> list[LengthBin]:
    """At most twelve bins of one round width; the last one reaches to the longest, however long. Empty without any."""
    if not len(lengths):
        return []
    width = _round_up(-(-int(np.percentile(lengths, 99)) // (_NUM_BINS - 1)))
    counts = np.bincount(np.minimum((lengths - 1) // width, _NUM_BINS - 1))
    bins = [
        LengthBin(first=place * width + 1, last=(place + 1) * width, num_sequences=int(number))
        for place, number in enumerate(counts)
    ]
    return [*bins[:-1], bins[-1]._replace(last=max(bins[-1].last, int(lengths.max())))]


def length_summary(lengths: NDArray[np.int64]) -> dict[str, float]:
    """Smallest, mean, median, 90th and 99th percentile and largest length, in tokens; empty where there are none."""
    if not len(lengths):
        return {}
    half, most, nearly_all = np.percentile(lengths, (50, 90, 99))
    return {
        "min": int(lengths.min()),
        "mean": round(float(lengths.mean()), 1),
        "p50": float(half),
        "p90": float(most),
        "p99": round(float(nearly_all), 1),
        "max": int(lengths.max()),
    }


def value_summary(values: NDArray[np.float64]) -> dict[str, float]:
    """Smallest, mean and largest value and their standard deviation; empty where there are none."""
    if not len(values):
        return {}
    facts = {"min": values.min(), "mean": values.mean(), "max": values.max(), "std": values.std()}
    return {name: round(float(value), 6) for name, value in facts.items()}


def mix_shares(parts: Sequence[DatasetStatistics]) -> list[dict[str, float]]:
    """What each data set has of all examples, tokens and supervised tokens, each from 0 to 1."""

    def shares(counts: Iterable[int]) -> list[float]:
        listed = list(counts)
        return [count / (sum(listed) or 1) for count in listed]

    columns = {
        "examples": shares(part.num_examples for part in parts),
        "tokens": shares(part.num_tokens for part in parts),
        "supervised_tokens": shares(part.num_supervised_tokens for part in parts),
    }
    return [{key: values[place] for key, values in columns.items()} for place in range(len(parts))]


def epoch_mix(parts: Sequence[DatasetStatistics], data: DataConfig, seed: int) -> list[dict[str, Any]]:
    """What an epoch of training takes of each data set where they are interleaved (see `Mix.realised`), else nothing.

    Raises:
        DataError: shares with which an epoch would not end, or a `val_size` that leaves no rows.
    """
    if data.mix_strategy == "concat" or len(parts) < 2:
        return []
    sizes = tuple(sizes_for_training([part.num_kept for part in parts], data.val_size, seed))
    names, probs = tuple(part.name for part in parts), data.interleave_probs or None
    return Mix(names=names, sizes=sizes, strategy=data.mix_strategy, probs=probs, seed=seed).realised()


def _round_up(width: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale >= width:
                return digit * scale
        scale *= 10


def _digest(example: Example) -> bytes:
    digest = blake2b(example.input_ids.tobytes(), digest_size=16)
    digest.update(example.labels.tobytes())
    return digest.digest()
