"""Counts of a data set equal those of training, and lengths, duplicates and shares are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data.pipeline import prepare_data
from llamafactory.data.registry import find_specs
from llamafactory.data.statistics import (
    DatasetStatistics,
    length_histogram,
    length_summary,
    measure_dataset,
    mix_shares,
)
from llamafactory.data.template_choice import build_template
from llamafactory.hparams.data import DataConfig

ROWS = [{"instruction": f"Q{number}", "output": "word " * (1 + number * 7)} for number in range(10)]


def measure(config: DataConfig, tokenizer: Any) -> DatasetStatistics:
    (spec,) = find_specs(config.dataset, config.dataset_dir)
    return measure_dataset(spec, config, build_template("chatml", tokenizer), tokenizer, seed=0)


def test_counts_are_those_of_training(data_config: Callable[..., DataConfig], tokenizer: Any) -> None:
    for overlong in ("truncate", "drop"):
        config = data_config(ROWS, cutoff_len=40, overlong=overlong)
        (report,) = prepare_data(config, build_template("chatml", tokenizer), tokenizer, seed=0).report.datasets
        found = measure(config, tokenizer)
        assert (found.num_rows, found.num_kept, found.dropped) == (10, report.num_kept, report.dropped)
        assert (found.num_examples, found.num_cut_tokens) == (report.num_examples, report.num_cut_tokens)
        assert found.num_tokens == report.num_tokens
        assert found.num_supervised_tokens == report.num_supervised_tokens
        assert 0 < found.supervised_share < 1
        assert len(found.lengths) == 10
        assert found.num_over_cutoff == (found.lengths > 40).sum() > 0


def test_bad_rows_are_counted_and_stop_nothing(data_config: Callable[..., DataConfig], tokenizer: Any) -> None:
    found = measure(data_config([ROWS[0], {"instruction": "a", "output": ""}]), tokenizer)
    assert (found.num_rows, found.num_kept, sum(found.dropped.values())) == (2, 1, 1)


def test_duplicates(data_config: Callable[..., DataConfig], tokenizer: Any) -> None:
    assert measure(data_config([*ROWS, ROWS[3], ROWS[3], ROWS[5]]), tokenizer).num_duplicates == 3
    assert measure(data_config(ROWS), tokenizer).num_duplicates == 0


@given(st.lists(st.integers(1, 50_000), min_size=1, max_size=60))
def test_the_histogram_holds_every_length_once(lengths: list[int]) -> None:
    bins = length_histogram(np.array(lengths, dtype=np.int64))
    assert len(bins) <= 12
    assert [one.num_sequences for one in bins] == [sum(one.first <= n <= one.last for n in lengths) for one in bins]
    assert sum(one.num_sequences for one in bins) == len(lengths)
    assert bins[0].first == 1


def test_no_lengths() -> None:
    none = np.array([], dtype=np.int64)
    assert length_histogram(none) == []
    assert length_summary(none) == {}


def test_lengths_and_shares(data_config: Callable[..., DataConfig], tokenizer: Any) -> None:
    summary = length_summary(np.arange(1, 101))
    assert (summary["min"], summary["p50"], summary["max"], summary["mean"]) == (1, 50.5, 100, 50.5)
    part = measure(data_config(ROWS), tokenizer)
    shares = mix_shares([part, part])
    assert shares == [{"examples": 0.5, "tokens": 0.5, "supervised_tokens": 0.5}] * 2
