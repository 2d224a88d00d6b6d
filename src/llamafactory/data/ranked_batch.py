"""A batch of what a reward model learns from: pairs, of which one answer is better, and answers that have a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from llamafactory.data.answer_batch import AnswerBatch, AnswerGroup, collate_answers


@dataclass(frozen=True, kw_only=True)
class RankedBatch(AnswerBatch):
    """Where the pairs and the single answers of an `AnswerBatch` are.

    Attributes:
        chosen: int64 `[pairs]`, the answer that each pair begins with; the other one is behind it.
        margins: float32 `[pairs]`.
        pair_weights: float32 `[pairs]`, 1, or 0 for a pair that does not count.
        singles: int64 `[singles]`, answers that have a score.
        labels: float32 `[singles]`, the scores that the rows give them.
        single_weights: float32 `[singles]`, as `pair_weights`.
    """

    chosen: Tensor
    margins: Tensor
    pair_weights: Tensor
    singles: Tensor
    labels: Tensor
    single_weights: Tensor


def collate_ranked(groups: Sequence[AnswerGroup], layout: Literal["flat", "padded"], pad_id: int) -> RankedBatch:
    """As `collate_answers`, for groups of two answers or one, with the numbers that they bring."""
    batch = collate_answers(groups, layout, pad_id)
    firsts = [0, *accumulate(len(group.answers) for group in groups)]
    pairs, singles = ([place for place, group in enumerate(groups) if len(group.answers) == size] for size in (2, 1))
    return RankedBatch(
        **vars(batch),
        chosen=torch.tensor([firsts[place] for place in pairs], dtype=torch.int64),
        margins=torch.tensor([groups[place].value for place in pairs], dtype=torch.float32),
        pair_weights=torch.tensor([float(groups[place].counts) for place in pairs], dtype=torch.float32),
        singles=torch.tensor([firsts[place] for place in singles], dtype=torch.int64),
        labels=torch.tensor([groups[place].value for place in singles], dtype=torch.float32),
        single_weights=torch.tensor([float(groups[place].counts) for place in singles], dtype=torch.float32),
    )
