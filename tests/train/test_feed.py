"""Batches of windows: whatever the split, every row is in one window of an epoch, on one rank, and is counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data.table import ExampleTable, ShardBuilder, table_of
from llamafactory.data.types import IGNORE_INDEX, Example
from llamafactory.model.workload import tokens_of
from llamafactory.train.feed import Feed
from llamafactory.train.rows import ROWS
from llamafactory.train.windows import Schedule, group_items, packed_items, single_items

VIEWS = {"sft": 1, "feedback": 1, "pairs": 2}
"""A view and the sequences of a row."""


def table(lengths: Sequence[int], answers: int = 1) -> ExampleTable:
    """Rows whose first token is their number; supervised behind the second token, sequences of a row share two."""
    builder = ShardBuilder()
    for number, length in enumerate(lengths):
        group: list[Example] = []
        for place in range(answers):
            ids = np.array([100 + number, 1, *range(10 + place, 10 + place + length)], dtype=np.int32)
            group.append(Example(input_ids=ids, labels=np.where(np.arange(len(ids)) < 2, IGNORE_INDEX, ids)))
        builder.add(group, flag=number % 2)
        builder.note_origin(f"rows.json#{number}")
    return table_of([builder.build()])


def feed_of(rows: ExampleTable, view: str, *, layout: Any = "flat", capacity: int = 0, **changes: Any) -> Feed:
    kind: Any = ROWS[view]  # type: ignore[index]
    items = group_items(rows.offsets.tolist()) if VIEWS[view] > 1 else single_items(len(rows))
    if capacity:
        items = packed_items(rows.lengths.tolist(), capacity)
    read = kind.reader(rows, 0, 64)
    options = {
        "items_per_device": 2, "accumulation": 2, "num_ranks": 1, "micro_batch_tokens": None, "seed": 5,
        "is_padded": layout == "padded",
    }  # fmt: skip
    lengths = [sum(kind.num_tokens(row, layout) for row in read(item)) for item in items]
    schedule = Schedule(items=items, lengths=lengths, **(options | changes))
    return Feed(examples=rows, schedule=schedule, layout=layout, pad_id=0, kind=kind, read=read)


def first_tokens(batch: Any) -> list[int]:
    """The number of every row of a batch, from the token that begins it."""
    return [token - 100 for token in batch.input_ids.flatten().tolist() if token >= 100]


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30),
    view=st.sampled_from(sorted(VIEWS)),
    layout=st.sampled_from(["flat", "padded"]),
    num_ranks=st.integers(1, 4),
    items_per_device=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    tokens=st.none() | st.integers(22, 80),
    epoch=st.integers(0, 2),
)
def test_an_epoch_has_every_row_once_and_counts_it_once(
    lengths, view, layout, num_ranks, items_per_device, accumulation, tokens, epoch
):
    rows = table(lengths, VIEWS[view])
    feed = feed_of(
        rows, view, layout=layout, num_ranks=num_ranks, items_per_device=items_per_device, accumulation=accumulation,
        micro_batch_tokens=tokens,
    )  # fmt: skip
    per_epoch = feed.schedule.windows_per_epoch
    seen, units, targets, counted = Counter[int](), 0, 0, 0
    for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
        windows = [feed.window(step, rank) for rank in range(num_ranks)]
        assert len({len(window.batches) for window in windows}) == 1  # ranks stay in step
        facts = {(w.num_units, w.num_targets, tuple(w.lengths), w.num_rows) for w in windows}
        assert len(facts) == 1  # what a step is divided by is that of all ranks, and the same on each
        window = windows[0]
        names = Counter(name.split(" ")[0] for name in feed.rows(step))
        found = Counter[int]()
        for batch in (batch for one in windows for batch in one.batches):
            counts = getattr(batch, "num_groups", batch.num_targets)
            if counts:  # else it only keeps ranks in step
                found.update(first_tokens(batch))
                assert tokens is None or layout == "padded" or len(batch.segment_lengths) == 1 or (
                    batch.num_tokens <= tokens
                )  # fmt: skip
        copies = VIEWS[view] if layout == "padded" else 1
        assert found == Counter({row: copies for row in map(int, (name.split("#")[1] for name in names))})
        units += window.num_units
        targets += window.num_targets
        counted += window.num_rows
        seen.update(found)
    copies = VIEWS[view] if layout == "padded" else 1
    assert seen == Counter(dict.fromkeys(range(len(lengths)), copies))
    assert counted == len(lengths)
    supervised = sum(example.num_supervised for example in rows)
    assert targets == supervised  # a mismatched answer of kto is measured, not trained
    assert units == (supervised if view == "sft" else len(lengths))


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30),
    num_ranks=st.integers(1, 3),
    step=st.integers(0, 40),
)
def test_a_window_is_a_function_of_its_number(lengths, num_ranks, step):
    rows = table(lengths)
    fresh, used = feed_of(rows, "sft", num_ranks=num_ranks), feed_of(rows, "sft", num_ranks=num_ranks)
    for earlier in range(step):
        used.window(earlier, 0)
    for rank in range(num_ranks):
        one, other = fresh.window(step, rank), used.window(step, rank)
        assert [batch.input_ids.tolist() for batch in one.batches] == [b.input_ids.tolist() for b in other.batches]
        assert replace(one, batches=()) == replace(other, batches=())
    cursor = fresh.cursor(step)
    assert cursor["epoch"] * fresh.schedule.windows_per_epoch + cursor["window"] == step


@given(lengths=st.lists(st.integers(1, 20), min_size=2, max_size=30), num_ranks=st.integers(2, 4))
def test_units_of_the_ranks_batches_add_up_to_what_the_step_is_divided_by(lengths, num_ranks):
    """The oracle of a ragged last step: with more ranks than rows some have batches without any unit."""
    feed = feed_of(table(lengths), "sft", num_ranks=num_ranks, items_per_device=3, micro_batch_tokens=30)
    last = feed.schedule.windows_per_epoch - 1
    windows = [feed.window(last, rank) for rank in range(num_ranks)]
    total = sum(batch.num_targets for window in windows for batch in window.batches)
    assert total == windows[0].num_units > 0
    blank = feed.batch([])
    assert blank.num_targets == 0
    assert blank.input_ids.numel() > 0  # a rank with nothing to do runs a forward pass all the same


@given(lengths=st.lists(st.integers(1, 18), min_size=1, max_size=30), num_ranks=st.integers(1, 3))
def test_packed_bins_are_rows_laid_end_to_end(lengths, num_ranks):
    rows = table(lengths)
    feed = feed_of(rows, "sft", capacity=20, num_ranks=num_ranks)
    seen = Counter[int]()
    for step in range(feed.schedule.windows_per_epoch):
        window = feed.window(step, 0)
        assert sum(int(name.split("(")[1].split()[0]) for name in feed.rows(step)) == sum(window.lengths)
        for batch in (b for rank in range(num_ranks) for b in feed.window(step, rank).batches if b.num_targets):
            seen.update(first_tokens(batch))
            assert max(map(tokens_of, batch.segment_lengths)) <= 20
            starts = np.cumsum([0, *batch.segment_lengths])[:-1]
            assert batch.position_ids[0, torch.from_numpy(starts)].tolist() == [0] * len(starts)
    assert seen == Counter(range(len(lengths)))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_one_pass_is_the_first_epoch_on_all_ranks(num_ranks):
    feed = feed_of(table([3, 5, 2, 8, 1, 4, 6]), "sft", num_ranks=num_ranks, shuffle=False)
    passes = [list(feed.one_pass(rank)) for rank in range(num_ranks)]
    assert len({len(steps) for steps in passes}) == 1
    seen = [
        row for steps in passes for step in steps for batch in step if batch.num_targets for row in first_tokens(batch)
    ]
    assert sorted(seen) == list(range(7))


def test_rows_without_a_known_origin_have_a_number():
    rows = [Example(input_ids=np.arange(4, dtype=np.int32), labels=np.arange(4, dtype=np.int32)) for _ in range(3)]
    builder = ShardBuilder()
    for row in rows:
        builder.add([row])
    feed = feed_of(table_of([builder.build()]), "sft", shuffle=False)
    assert feed.rows(0) == ["example 0 (4 tokens)", "example 1 (4 tokens)", "example 2 (4 tokens)"]
