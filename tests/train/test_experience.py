"""Sampled tokens keep their ids and numbers through batches, splits and checkpoints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamafactory.train.experience import (
    PER_TOKEN,
    Experience,
    collate_experience,
    from_tensors,
    micro_batches,
    to_tensors,
)

ANSWERS = st.lists(st.integers(1, 9), min_size=1, max_size=5)
LIMIT = st.one_of(st.none(), st.integers(1, 40))


def make_experience(place: int, prompt: int, lengths: list[int], *, without: tuple[str, ...] = ()) -> Experience:
    rng = np.random.default_rng(place)
    total = sum(lengths)
    values = {name: rng.normal(size=total).astype(np.float32) for name in PER_TOKEN if name not in without}
    return Experience(
        place=place, row=place + 7, prompt=rng.integers(1, 90, prompt).astype(np.int32),
        answers=tuple(rng.integers(1, 90, length).astype(np.int32) for length in lengths),
        weights=np.ones(len(lengths), dtype=np.float32), **values,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_targets_are_the_sampled_ids_with_their_numbers(layout: Any) -> None:
    rows = [make_experience(0, 5, [3, 1, 4]), make_experience(1, 2, [2, 2, 6])]
    batch = collate_experience(rows, layout, 0)
    sampled = np.concatenate([answer for row in rows for answer in row.answers])
    assert batch.target_ids.tolist() == sampled.tolist()
    assert batch.input_ids.flatten()[batch.target_rows + 1].tolist() != []
    for name in ("sampler", "old", "advantages", "values", "returns"):
        assert torch.equal(getattr(batch, name), torch.from_numpy(np.concatenate([getattr(r, name) for r in rows])))
    assert batch.lengths.tolist() == [3, 1, 4, 2, 2, 6]
    assert batch.num_tokens == (5 + 8 + 2 + 10 if layout == "flat" else 5 * 3 + 8 + 2 * 3 + 10)
    assert batch.to("cpu").rollout_metrics == {}


@given(st.lists(st.tuples(st.integers(1, 9), ANSWERS), min_size=1, max_size=6), LIMIT, st.integers(1, 4))
def test_micro_batches_hold_every_answer_once(sizes: Any, limit: int | None, rows: int) -> None:
    plan: Any = SimpleNamespace(micro_batch_tokens=limit)
    batches = micro_batches(sizes, plan, rows)
    seen = sorted(
        (number, place) for batch in batches for number, first, last in batch for place in range(first, last)
    )
    assert seen == [(number, place) for number, (_, answers) in enumerate(sizes) for place in range(len(answers))]
    for batch in batches:
        tokens = sum(sizes[number][0] + sum(sizes[number][1][first:last]) for number, first, last in batch)
        answers = sum(last - first for _, first, last in batch)
        assert tokens <= limit or answers == 1 if limit else answers <= rows


def test_parts_cut_every_number() -> None:
    whole = make_experience(0, 4, [3, 1, 4], without=("returns",))
    part = whole.part(1, 3)
    assert part.lengths == [1, 4]
    assert part.returns is None
    assert np.array_equal(part.sampler, whole.sampler[3:])
    blank = whole.blank()
    assert blank.lengths == [3]
    assert not blank.weights.any()


def test_a_checkpoint_gives_back_what_it_got() -> None:
    sizes = ((3, 5, [3, 1]), (1, 2, [2, 6]))
    rows = [make_experience(*size, without=("values", "returns")) for size in sizes]
    found = from_tensors(to_tensors(rows))
    assert [(row.place, row.row, row.lengths) for row in found] == [(3, 10, [3, 1]), (1, 8, [2, 6])]
    for before, after in zip(rows, found, strict=True):
        assert np.array_equal(before.prompt, after.prompt)
        assert all(np.array_equal(a, b) for a, b in zip(before.answers, after.answers, strict=True))
        for name in PER_TOKEN:
            old, new = getattr(before, name), getattr(after, name)
            assert (old is None and new is None) or np.array_equal(old, new)
