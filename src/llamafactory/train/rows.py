"""What the loop must know about the rows of a stage: their size, what counts them, how they become a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llamafactory.data.answer_batch import AnswerGroup, collate_answers, num_batch_tokens
from llamafactory.data.batch import Batch
from llamafactory.data.collate import collate_flat, collate_padded
from llamafactory.data.ranked_batch import collate_ranked
from llamafactory.data.table import Examples
from llamafactory.data.types import IGNORE_INDEX, Example, ViewName

Layout: TypeAlias = Literal["flat", "padded"]
Reader: TypeAlias = Callable[[tuple[int, ...]], Sequence[Any]]
"""Reads the rows of an item, which is a tuple of places of examples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """A kind of rows.

    Attributes:
        reader: `(table, seed, cutoff_len) -> (item -> rows)`.
        sequences: `row -> examples` that are trained, each one sequence of tokens.
        num_tokens: `(row, layout) -> tokens` of a forward pass over the row.
        num_units: `row -> units` that a step's loss is divided by: supervised tokens, or 1 for a row that is judged
            as a whole.
        collate: `(rows, layout, pad_id) -> batch`.
        blank: `row -> row` of the same shape without any unit, for a rank that has nothing to do.
    """

    reader: Callable[[Any, int, int], Reader]
    sequences: Callable[[Any], Sequence[Example]]
    num_tokens: Callable[[Any, Layout], int]
    num_units: Callable[[Any], int]
    collate: Callable[[Sequence[Any], Layout, int], Batch]
    blank: Callable[[Any], Any]


def _examples(table: Examples, seed: int, cutoff_len: int) -> Reader:
    return lambda item: [table[index] for index in item]


def _pairs(table: Examples, seed: int, cutoff_len: int) -> Reader:
    return lambda item: [AnswerGroup(answers=tuple(table[index] for index in item))]


def _ranked(table: Examples, seed: int, cutoff_len: int) -> Reader:
    def read(item: tuple[int, ...]) -> list[AnswerGroup]:
        group = int(np.searchsorted(table.offsets, item[0], side="right")) - 1
        value = math.nan if table.values is None else float(table.values[group])
        return [AnswerGroup(answers=tuple(table[index] for index in item), value=value)]

    return read


def _judged(table: Examples, seed: int, cutoff_len: int) -> Reader:
    partners = partners_of(len(table), seed)

    def read(item: tuple[int, ...]) -> list[AnswerGroup]:
        (index,) = item
        own, other = table[index], table[int(partners[index])]
        flag = table.flags is None or bool(table.flags[index] == 1)
        return [AnswerGroup(answers=(own, mismatched(own, other, cutoff_len)), is_desirable=(flag, flag))]

    return read


def partners_of(count: int, seed: int) -> NDArray[np.int64]:
    """For each judged answer the one whose answer is put to its prompt: int64 `[count]`.

    A function of seed and count alone: a cycle through all rows in random order, so that no row is its own partner
    (unless it is the only one) and each answer is used once.
    """
    order = np.random.default_rng([seed, 0x4B54]).permutation(count)
    partners = np.empty(count, dtype=np.int64)
    partners[order] = np.roll(order, -1)
    return partners


def mismatched(own: Example, other: Example, cutoff_len: int) -> Example:
    """The prompt of one example with the answer of another, whose end is cut where both are too long together."""
    prompt, answer = _answer_start(own), _answer_start(other)
    room = max(1, cutoff_len - prompt)
    ids = np.concatenate([own.input_ids[:prompt], other.input_ids[answer : answer + room]])
    labels = np.concatenate([own.labels[:prompt], other.labels[answer : answer + room]])
    return Example(input_ids=ids, labels=labels)


def _answer_start(example: Example) -> int:
    """The first supervised token."""
    supervised = np.flatnonzero(example.labels != IGNORE_INDEX)
    return int(supervised[0]) if len(supervised) else len(example)


def _collate_examples(examples: Sequence[Example], layout: Layout, pad_id: int) -> Batch:
    return collate_flat(examples) if layout == "flat" else collate_padded(examples, pad_id)


def _unsupervised(example: Example) -> Example:
    return replace(example, labels=np.full_like(example.labels, IGNORE_INDEX), weights=None)


def _collate_judged(groups: Sequence[AnswerGroup], layout: Layout, pad_id: int) -> Batch:
    judged, others = (collate_answers([_only(group, place) for group in groups], layout, pad_id) for place in (0, 1))
    is_known = all(group.reference is not None for group in groups)  # then no pass over both will be made
    both = collate_answers(groups, layout, pad_id) if layout == "flat" and not is_known else None
    return replace(judged, mismatched=others, both=both)


def _only(group: AnswerGroup, place: int) -> AnswerGroup:
    """The group with one of its answers."""
    return replace(
        group,
        answers=(group.answers[place],),
        is_desirable=group.is_desirable[:1],
        reference=None if group.reference is None else (group.reference[place],),
    )


EXAMPLES = Rows(
    reader=_examples,
    sequences=lambda example: (example,),
    num_tokens=lambda example, layout: len(example),
    num_units=lambda example: example.num_supervised,
    collate=_collate_examples,
    blank=_unsupervised,
)
"""Single examples; the unit is a supervised token."""

PAIRS = Rows(
    reader=_pairs,
    sequences=lambda group: group.answers,
    num_tokens=lambda group, layout: num_batch_tokens(group.answers, layout),
    num_units=lambda group: int(group.counts),
    collate=collate_answers,
    blank=lambda group: replace(group, counts=False),
)
"""Pairs of answers to one prompt; the unit is a pair."""

RANKED = replace(PAIRS, reader=_ranked, collate=collate_ranked)
"""Pairs with their margins, and single answers with their scores; the unit is a pair or a single answer."""

JUDGED = replace(
    PAIRS,
    reader=_judged,
    sequences=lambda group: group.answers[:1],
    num_tokens=lambda group, layout: sum(len(answer) for answer in group.answers),
    collate=_collate_judged,
)
"""A judged answer and its mismatched one; the unit is a judged answer."""

ROWS: dict[ViewName, Rows] = {"sft": EXAMPLES, "text": EXAMPLES, "pairs": PAIRS, "ranked": RANKED, "feedback": JUDGED}
"""The rows of each view of the data."""
