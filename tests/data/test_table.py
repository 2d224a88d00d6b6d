from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data.table import ExampleTable, ShardBuilder, join_tables, table_of
from llamafactory.data.types import IGNORE_INDEX, Example


@st.composite
def examples(draw: st.DrawFn) -> Example:
    marks = draw(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 0.5, 1.0])), max_size=6))
    ids = np.array([token for token, _ in marks], dtype=np.int32)
    weights = np.array([weight for _, weight in marks], dtype=np.float32)
    return Example(
        input_ids=ids,
        labels=np.where(weights != 0, ids, np.int32(IGNORE_INDEX)),
        weights=weights if (weights == 0.5).any() else None,
        num_cut=draw(st.integers(0, 9)),
    )


groups_of_rows = st.lists(st.tuples(st.lists(examples(), min_size=1, max_size=3), st.sampled_from([0, 1])), max_size=8)


def same(one: Example, other: Example) -> bool:
    def listed(example: Example) -> list[object]:
        weights = None if example.weights is None else example.weights.tolist()
        return [example.input_ids.tolist(), example.labels.tolist(), weights, example.num_cut]

    return listed(one) == listed(other)


def build(rows: list[tuple[list[Example], int]]) -> ExampleTable:
    shards = []
    for start in range(0, len(rows), 3):
        builder = ShardBuilder()
        for group, flag in rows[start : start + 3]:
            builder.add(group, flag)
        shards.append(builder.build())
    return table_of(shards)


@given(rows=groups_of_rows)
def test_what_goes_in_comes_out(rows: list[tuple[list[Example], int]]) -> None:
    table = build(rows)
    flat = [example for group, _ in rows for example in group]
    assert len(table) == len(flat)
    assert all(same(one, other) for one, other in zip(table, flat, strict=True))
    assert table.lengths.tolist() == [len(example) for example in flat]
    assert table.num_groups == len(rows)
    assert (table.flags is None) == (not rows)
    for number, (group, flag) in enumerate(rows):
        assert all(same(one, other) for one, other in zip(table.group(number), group, strict=True))
        assert table.flags is not None
        assert table.flags[number] == flag


@given(first=groups_of_rows, second=groups_of_rows, data=st.data())
def test_selected_and_joined_groups_are_those_groups(
    first: list[tuple[list[Example], int]], second: list[tuple[list[Example], int]], data: st.DataObject
) -> None:
    rows = first + second
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9)) if rows else []
    joined = join_tables([build(first), build(second)])
    for table, wanted in (
        (joined, rows),
        (joined.select(chosen), [rows[number] for number in chosen]),
        (join_tables([joined.select(chosen), build(first)]), [*(rows[number] for number in chosen), *first]),
    ):
        assert table.num_groups == len(wanted)
        for number, (group, _) in enumerate(wanted):
            assert all(same(one, other) for one, other in zip(table.group(number), group, strict=True))
        if table.flags is not None:
            assert table.flags.tolist() == [flag for _, flag in wanted]


def test_indices_are_those_of_a_sequence() -> None:
    ids = np.arange(3, dtype=np.int32)
    table = build([([Example(input_ids=ids + number, labels=ids + number)], 1) for number in range(5)])
    assert table[-1].input_ids.tolist() == [4, 5, 6]
    assert [example.input_ids[0] for example in table[1:3]] == [1, 2]
    with pytest.raises(IndexError):
        table[5]
    assert len(join_tables([])) == 0


@given(rows=groups_of_rows)
def test_a_shard_counts_what_its_examples_count(rows: list[tuple[list[Example], int]]) -> None:
    builder = ShardBuilder()
    for group, flag in rows:
        builder.add(group, flag)
    counts = [example.num_supervised for group, _ in rows for example in group]
    assert builder.build().num_supervised.tolist() == counts


@given(rows=groups_of_rows)
def test_rows_taken_from_a_shard_are_those_that_were_put_in(rows: list[tuple[list[Example], int]]) -> None:
    builder, other, places = ShardBuilder(), ShardBuilder(), []
    for group, flag in rows:
        first = places[-1].stop if places else 0
        places.append(range(first, first + len(group)))
        builder.add(group, flag)
    shard = builder.build()
    for number in range(len(rows) - 1, -1, -2):
        other.take(shard, places[number], rows[number][1])
    again = ShardBuilder()
    for group, flag in rows[::-2]:
        again.add(group, flag)
    taken, added = other.build(), again.build()
    for name in ("tokens", "example_ends", "cuts", "group_ends", "flags"):
        assert getattr(taken, name).tolist() == getattr(added, name).tolist(), name
    assert all(same(taken.example(place), added.example(place)) for place in range(len(added.example_ends)))


def test_examples_know_where_they_come_from_also_in_another_order() -> None:
    names = [f"folder of #1/a:b.jsonl:{number}" for number in (1, 2, 5)] + ["rows.json#1", "rows.json#7"]
    one = Example(input_ids=np.arange(3, dtype=np.int32), labels=np.arange(3, dtype=np.int32))
    shards = []
    for part in (names[:2], names[2:]):
        builder = ShardBuilder()
        for number, name in enumerate(part):
            builder.add([one] * (1 + number % 2))  # a row may become several examples
            builder.note_origin(name)
        shards.append(builder.build())
    table = table_of(shards)
    assert [table.origin(place) for place in range(len(table))] == [
        *names[:2],
        names[1],
        *names[2:4],
        names[3],
        names[4],
    ]
    chosen = join_tables([table.select([4, 0]), table.select([1])])
    assert [chosen.origin(place) for place in range(len(chosen))] == [names[4], names[0], names[1], names[1]]


def test_examples_that_nobody_named_have_no_origin() -> None:
    one = Example(input_ids=np.arange(3, dtype=np.int32), labels=np.arange(3, dtype=np.int32))
    builder = ShardBuilder()
    builder.add([one])
    builder.note_origin("rows.json#1")
    builder.add([one])
    assert table_of([builder.build()]).origin(0) == ""
