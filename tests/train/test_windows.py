"""Every item is in exactly one window of an epoch, on exactly one rank, whatever the split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data.mix import Mix, drawable_rows, mix_rows
from llamafactory.train.windows import PackedMix, Schedule, packed_items, single_items
from llamafactory.train.workload import largest_group


def schedule(lengths, **changes):
    options = {
        "items": single_items(len(lengths)),
        "lengths": lengths,
        "items_per_device": 2,
        "accumulation": 2,
        "num_ranks": 1,
        "micro_batch_tokens": None,
        "seed": 1,
    }
    return Schedule(**(options | changes))


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    items_per_device=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    num_ranks=st.integers(1, 3),
    tokens=st.none() | st.integers(50, 120),
    epoch=st.integers(0, 3),
)
def test_an_epoch_is_a_partition(lengths, items_per_device, accumulation, num_ranks, tokens, epoch):
    plan = schedule(
        lengths,
        items_per_device=items_per_device,
        accumulation=accumulation,
        num_ranks=num_ranks,
        micro_batch_tokens=tokens,
    )
    first = epoch * plan.windows_per_epoch
    windows = [plan.window(step) for step in range(first, first + plan.windows_per_epoch)]
    seen = [item for window in windows for rank in window for group in rank for item in group]
    assert sorted(seen) == plan.items
    for window in windows:
        assert len(window) == num_ranks
        assert len({len(rank) for rank in window}) == 1  # ranks stay in step
        for group in (group for rank in window for group in rank):
            assert tokens is None or sum(lengths[index] for item in group for index in item) <= tokens


@given(lengths=st.lists(st.integers(1, 50), min_size=4, max_size=40), num_ranks=st.integers(1, 4))
def test_the_rows_of_a_window_do_not_depend_on_the_split(lengths, num_ranks):
    alone = schedule(lengths, items_per_device=4, accumulation=num_ranks)
    spread = schedule(lengths, items_per_device=2, accumulation=2, num_ranks=num_ranks, micro_batch_tokens=60)
    for step in range(alone.windows_per_epoch):
        rows = [
            sorted(item for rank in plan.window(step) for group in rank for item in group) for plan in (alone, spread)
        ]
        assert rows[0] == rows[1]


def test_epochs_differ_and_a_seed_repeats():
    plan = schedule([1] * 30)
    per_epoch = plan.windows_per_epoch
    first, second = ([plan.window(e * per_epoch + s) for s in range(per_epoch)] for e in (0, 1))
    assert first != second
    assert first == [schedule([1] * 30).window(step) for step in range(per_epoch)]
    assert first != [schedule([1] * 30, seed=2).window(step) for step in range(per_epoch)]


def test_without_shuffling_the_order_is_that_of_the_data():
    plan = schedule([1] * 6, shuffle=False)
    assert [plan.window(step) for step in range(2)] == [[[[(0,), (1,)], [(2,), (3,)]]], [[[(4,), (5,)]]]]


def test_total_windows():
    plan = schedule([1] * 9)  # 4 items a window: 3 windows an epoch
    assert plan.total_windows(max_steps=-1, num_epochs=2) == 6
    assert plan.total_windows(max_steps=-1, num_epochs=0.5) == 2
    assert plan.total_windows(max_steps=5, num_epochs=2) == 5


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=50))
def test_packed_items_hold_each_example_once_and_fit(lengths):
    items = packed_items(lengths, capacity=30)
    assert sorted(index for item in items for index in item) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in item) <= 30 for item in items)


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=3), step=st.integers(0, 30), over=st.booleans())
def test_a_mixed_order_is_a_function_of_seed_and_step(sizes, step, over):
    strategy = "interleave_over" if over else "interleave_under"
    mix = Mix(names=("a", "b", "c")[: len(sizes)], sizes=tuple(sizes), strategy=strategy, probs=None, seed=3)
    plan = schedule([1] * sum(sizes), mix=mix)
    assert plan.items_per_epoch == len(sizes) * (max(sizes) if over else min(sizes))
    epoch = step // plan.windows_per_epoch
    windows = [plan.window(epoch * plan.windows_per_epoch + place) for place in range(plan.windows_per_epoch)]
    seen = sorted(item[0] for window in windows for rank in window for group in rank for item in group)
    assert seen == sorted(mix_rows(mix, epoch).tolist())
    assert plan.window(step) == schedule([1] * sum(sizes), mix=mix).window(step)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=6, max_size=60),
    items_per_device=st.integers(1, 3),
    num_ranks=st.integers(1, 3),
    over=st.booleans(),
)
def test_a_packed_mix_draws_and_packs_anew_in_each_epoch(lengths, items_per_device, num_ranks, over):
    cut = len(lengths) // 3
    mix = Mix(
        names=("a", "b"), sizes=(cut, len(lengths) - cut), probs=None, seed=3,
        strategy="interleave_over" if over else "interleave_under",
    )  # fmt: skip
    packed = PackedMix(mix=mix, lengths=lengths, capacity=50)
    first = packed.bins(0)
    plan = schedule(
        [sum(lengths[index] for index in item) for item in first], items=first, redraw=packed,
        items_per_device=items_per_device, num_ranks=num_ranks,
    )  # fmt: skip
    per_epoch = plan.windows_per_epoch
    for epoch in (2, 0, 1):  # in any order: each is a function of its number
        windows = [plan.window(step) for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        seen = [item for window in windows for rank in window for group in rank for item in group]
        assert sorted(index for item in seen for index in item) == sorted(mix_rows(mix, epoch).tolist())
        assert all(sum(lengths[index] for index in item) <= 50 for item in seen)
        sizes = [sum(len(group) for rank in window for group in rank) for window in windows]
        assert min(sizes) > 0
        assert not epoch or max(sizes) - min(sizes) <= 1


MIXES = st.sampled_from(["interleave_under", "interleave_over", "interleave_once"])


@given(
    lengths=st.lists(st.integers(1, 50), min_size=6, max_size=40),
    strategy=MIXES,
    packs=st.booleans(),
    shuffle=st.booleans(),
    num_epochs=st.integers(1, 5),
)
def test_no_epoch_has_a_longer_item_than_the_plan_knows_of(lengths, strategy, packs, shuffle, num_epochs):
    cut = len(lengths) // 3
    mix = Mix(names=("a", "b"), sizes=(cut, len(lengths) - cut), probs=None, seed=3, strategy=strategy)
    packed = PackedMix(mix=mix, lengths=lengths, capacity=50)
    items = packed.bins(0, shuffle=shuffle) if packs else single_items(len(lengths))
    sizes = [sum(lengths[index] for index in item) for item in items]
    more = {"redraw": packed.within(items) if shuffle else None} if packs else {"mix": mix}
    plan = schedule(sizes, items=items, shuffle=shuffle, **more)

    def tokens(item):
        return sum(lengths[index] for index in item)

    num_steps = num_epochs * plan.windows_per_epoch
    (known,), _ = largest_group(replace(plan, micro_batch_tokens=1), tokens, num_steps)
    limit = tokens(known)
    plan = replace(plan, micro_batch_tokens=limit)
    groups = [group for step in range(num_steps) for rank in plan.window(step) for group in rank]
    assert max(sum(map(tokens, group)) for group in groups) <= limit
    if packs or num_epochs == 1 or strategy == "interleave_over":  # nothing is asked for that no row needs
        assert limit <= max(*(tokens(item) for item in items), max(lengths))


def test_rows_that_are_never_drawn_bound_nothing():
    mix = Mix(names=("a", "b"), sizes=(4, 4), probs=(1.0, 0.0), seed=3, strategy="interleave_under")
    assert drawable_rows(mix).tolist() == [True] * 4 + [False] * 4
    lengths = [3, 9, 4, 2, 50, 50, 50, 50]
    assert PackedMix(mix=mix, lengths=lengths, capacity=60).longest() == (1,)
    assert schedule(lengths, mix=mix).longest_later(100) == (1,)


def test_a_packed_mix_shows_rows_that_the_first_epoch_left_out():
    mix = Mix(names=("a", "b"), sizes=(10, 90), probs=None, seed=3, strategy="interleave_under")
    packed = PackedMix(mix=mix, lengths=[10] * 100, capacity=40)
    first = packed.bins(0)
    plan = schedule([40] * len(first), items=first, redraw=packed)
    seen = [
        {index for rank in plan.window(step) for group in rank for item in group for index in item}
        for step in range(8 * plan.windows_per_epoch)
    ]
    assert len(set().union(*seen[: plan.windows_per_epoch])) == 20
    assert len(set().union(*seen)) > 50


def padded(lengths, **changes):
    return schedule(lengths, is_padded=True, items_per_device=4, accumulation=4, **changes)


@given(
    lengths=st.lists(st.integers(1, 200), min_size=16, max_size=64),
    seed=st.integers(0, 99),
    tokens=st.none() | st.integers(200, 900),
)
def test_padded_passes_hold_rows_of_similar_length(lengths, seed, tokens):
    """Sorted within a step: never more positions than the same rows in the order of the step."""
    plan = padded(lengths, seed=seed, micro_batch_tokens=tokens)
    for step in range(plan.windows_per_epoch):
        (groups,) = plan.window(step)
        sizes = [[lengths[item[0]] for item in group] for group in groups]
        flat = [size for group in sizes for size in group]
        assert flat == sorted(flat, reverse=True)  # the longest first
        assert all(len(group) <= 4 for group in sizes)
        if tokens is not None:
            assert all(len(group) == 1 or plan.positions(group) <= tokens for group in sizes)
            continue
        drawn = [lengths[index] for index in plan.order(0).tolist()[step * 16 : step * 16 + 16]]
        unsorted = [drawn[start : start + 4] for start in range(0, len(drawn), 4)]
        assert sum(map(plan.positions, sizes)) <= sum(map(plan.positions, unsorted))


def test_grouping_by_length_saves_most_of_the_padding():
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 400, 256).tolist()
    plan = padded(lengths)
    per_step = [plan.window(step)[0] for step in range(plan.windows_per_epoch)]
    grouped = sum(plan.positions([lengths[item[0]] for item in group]) for groups in per_step for group in groups)
    order = plan.order(0).tolist()
    drawn = sum(plan.positions([lengths[i] for i in order[at : at + 4]]) for at in range(0, len(order), 4))
    assert (grouped - sum(lengths)) < 0.5 * (drawn - sum(lengths))


def test_padded_passes_depend_on_seed_and_step_alone():
    lengths = np.random.default_rng(1).integers(1, 100, 70).tolist()
    first = padded(lengths)
    whole = [first.window(step) for step in range(3 * first.windows_per_epoch)]
    again = padded(lengths)  # as a run that is resumed: any step, without those before
    assert [again.window(step) for step in reversed(range(len(whole)))] == whole[::-1]
    assert [padded(lengths, seed=2).window(step) for step in range(len(whole))] != whole
