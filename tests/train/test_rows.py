"""How rows become batches: who is whose partner, what is cut, and what is not made because nothing reads it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamafactory.data.answer_batch import AnswerGroup
from llamafactory.data.types import IGNORE_INDEX, Example
from llamafactory.train.rows import JUDGED, ROWS, mismatched, partners_of


def example(prompt: list[int], answer: list[int]) -> Example:
    ids = np.array(prompt + answer, dtype=np.int32)
    labels = np.array([IGNORE_INDEX] * len(prompt) + answer, dtype=np.int32)
    return Example(input_ids=ids, labels=labels)


@given(count=st.integers(1, 60), seed=st.integers(0, 99))
def test_each_answer_is_lent_once_and_never_to_its_own_row(count, seed):
    partners = partners_of(count, seed).tolist()
    assert sorted(partners) == list(range(count))
    assert count == 1 or all(partner != row for row, partner in enumerate(partners))
    assert partners == partners_of(count, seed).tolist()


@given(
    prompts=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    answers=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    cutoff=st.integers(9, 20),
)
def test_a_mismatched_row_is_one_prompt_with_the_start_of_the_other_answer(prompts, answers, cutoff):
    own = example(list(range(1, 1 + prompts[0])), list(range(20, 20 + answers[0])))
    other = example(list(range(50, 50 + prompts[1])), list(range(70, 70 + answers[1])))
    found = mismatched(own, other, cutoff)
    ids = found.input_ids.tolist()
    kept = ids[prompts[0] :]
    assert ids[: prompts[0]] == list(range(1, 1 + prompts[0]))
    assert kept == list(range(70, 70 + answers[1]))[: max(1, cutoff - prompts[0])]
    assert found.labels.tolist() == [IGNORE_INDEX] * prompts[0] + kept


def judged(*, known: bool) -> AnswerGroup:
    own, other = example([1, 2, 3], [4, 5]), example([1, 2, 3], [8, 9, 6])
    reference = tuple(np.zeros(size, dtype=np.float32) for size in (2, 3)) if known else None
    return AnswerGroup(answers=(own, other), is_desirable=(True, True), reference=reference)


@pytest.mark.parametrize(
    ("layout", "known", "is_made"),
    [
        ("flat", (False, False), True),
        ("flat", (True, False), True),
        ("flat", (True, True), False),
        ("padded", (False, False), False),
    ],
)
def test_answers_are_laid_together_for_the_reference_only_where_that_will_run(layout, known, is_made):
    groups = [judged(known=one) for one in known]
    batch = JUDGED.collate(groups, layout, 0)
    assert (batch.both is not None) is is_made
    assert (batch.reference_logps is not None) is all(known)  # which then is what stands in for that pass
    assert torch.equal(batch.target_ids, torch.tensor([4, 5, 4, 5]))
    assert torch.equal(batch.mismatched.target_ids, torch.tensor([8, 9, 6, 8, 9, 6]))
    if is_made:
        assert batch.both.input_ids.numel() == 2 * (3 + 2 + 3)  # each prompt once


@pytest.mark.parametrize("view", sorted(ROWS))
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_a_blank_row_has_the_shape_of_a_row_and_no_unit(view, layout):
    kind = ROWS[view]
    row = example([1, 2], [3, 4])
    if view not in ("sft", "text"):
        row = replace(judged(known=False), is_desirable=(True, True) if view == "feedback" else ())
    blank = kind.blank(row)
    assert kind.num_units(row) > 0 == kind.num_units(blank)
    whole, empty = (kind.collate([one], layout, 0) for one in (row, blank))
    assert torch.equal(whole.input_ids, empty.input_ids)
    assert kind.num_tokens(row, layout) == kind.num_tokens(blank, layout)
