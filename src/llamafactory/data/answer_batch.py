"""Answers to one prompt -> one batch in which the prompt is there once.

The shared part is the longest common prefix of *token ids*, whatever the texts are: a prompt whose last tokens merge
differently with each answer shares less, identical answers share everything. Exact for values and gradients: a token
of the prefix sees the same tokens as it would alone, and each answer sees the prefix and itself. Padded batches share
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamafactory.data.batch import Batch
from llamafactory.data.types import IGNORE_INDEX, Example


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerGroup:
    """Token sequences that begin alike: the answers to one prompt, prompt included.

    Attributes:
        answers: one example an answer.
        is_desirable: of each answer, where answers are judged alone.
        value: the margin of a pair (0 for none), or the score that a row gives its only answer.
        reference: float32 `[targets]` log-probabilities of each answer's supervised tokens under the reference, where
            they are known already.
        counts: False for a group that only keeps ranks in step: it has no weight in any sum.
    """

    answers: tuple[Example, ...]
    is_desirable: tuple[bool, ...] = ()
    value: float = 0.0
    reference: tuple[NDArray[np.float32], ...] | None = None
    counts: bool = True


@dataclass(frozen=True, kw_only=True)
class AnswerBatch(Batch):
    """A batch whose targets belong to answers. Answers of a group are neighbours, groups keep their order.

    Attributes:
        owners: int64 `[targets]`, the answer that each target belongs to.
        places: int64 `[targets]`, place of the target among its answer's targets, from 0.
        last_rows: int64 `[answers]`, index into the flattened positions of each answer's last real token.
        lengths: float32 `[answers]`, targets of each answer.
        group_weights: float32 `[groups]`, 1, or 0 for a group that does not count.
        is_desirable: bool `[answers]`, or None where answers are not judged alone.
        reference_logps: float32 `[targets]`, or None where the reference has to be run.
        mismatched: the same prompts with answers that belong to other prompts (KTO's estimate of the KL), or None.
        both: in a flat batch the answers and the mismatched ones together, each two with their prompt once, for passes
            that want neither gradients nor the one without the other; else None.
        step_sums: sums over the whole optimizer step of what the stage's `prepare` measured, or None.
        num_answers: in the batch.
        num_groups: groups that count.
    """

    owners: Tensor
    places: Tensor
    last_rows: Tensor
    lengths: Tensor
    group_weights: Tensor
    is_desirable: Tensor | None
    reference_logps: Tensor | None
    mismatched: AnswerBatch | None = None
    both: AnswerBatch | None = None
    step_sums: Tensor | None = None
    num_answers: int
    num_groups: int

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> AnswerBatch:
        """The same batch with its tensors on `device`."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor | AnswerBatch)
        }
        return replace(self, **moved)


def shared_length(answers: Sequence[Example]) -> int:
    """Tokens that all answers of a group begin with."""
    shortest = min(len(answer) for answer in answers)
    first = answers[0].input_ids[:shortest]
    same = np.ones(shortest, dtype=bool)
    for answer in answers[1:]:
        same &= answer.input_ids[:shortest] == first
    return int(shortest if same.all() else np.argmin(same))


def num_batch_tokens(answers: Sequence[Example], layout: Literal["flat", "padded"]) -> int:
    """Tokens of a forward pass over one group."""
    shared = shared_length(answers) * (len(answers) - 1) if layout == "flat" else 0
    return sum(len(answer) for answer in answers) - shared


def collate_answers(groups: Sequence[AnswerGroup], layout: Literal["flat", "padded"], pad_id: int) -> AnswerBatch:
    """Lays groups end to end with their prefix once (`flat`), or pads each answer to a row of its own (`padded`).

    Raises:
        ValueError: no groups.
    """
    if not groups:
        raise ValueError("a batch needs at least one group")
    answers = [answer for group in groups for answer in group.answers]
    ids, positions, mask, segments, rows = _flat(groups) if layout == "flat" else _padded(answers, pad_id)
    targets = [np.flatnonzero(answer.labels[1:] != IGNORE_INDEX) for answer in answers]
    counts = [len(places) for places in targets]
    flags = [flag for group in groups for flag in group.is_desirable]
    reference = [values for group in groups for values in group.reference or ()]
    return AnswerBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        attention_mask=None if mask is None else torch.from_numpy(mask),
        segment_lengths=segments,
        target_rows=_long([row[places] for row, places in zip(rows, targets, strict=True)]),
        target_ids=_long([answer.labels[places + 1] for answer, places in zip(answers, targets, strict=True)]),
        target_weights=None,
        num_rows=len(groups),
        num_tokens=ids.size if mask is None else int(mask.sum()),
        num_targets=sum(counts),
        owners=torch.from_numpy(np.repeat(np.arange(len(answers)), counts)),
        places=_long([np.arange(count) for count in counts]),
        last_rows=torch.tensor([int(row[-1]) for row in rows]),
        lengths=torch.tensor(counts, dtype=torch.float32),
        group_weights=torch.tensor([float(group.counts) for group in groups]),
        is_desirable=torch.tensor(flags) if flags else None,
        reference_logps=torch.from_numpy(np.concatenate(reference)) if len(reference) == len(answers) else None,
        num_answers=len(answers),
        num_groups=sum(group.counts for group in groups),
    )


_Ids: TypeAlias = NDArray[np.int64]


def _flat(groups: Sequence[AnswerGroup]) -> tuple[_Ids, _Ids, None, tuple[tuple[int, ...], ...], list[_Ids]]:
    """Ids, positions, no mask, the shape of each tree, and the row of every token of every answer."""
    ids: list[NDArray[np.int32]] = []
    positions: list[NDArray[np.int64]] = []
    trees: list[tuple[int, ...]] = []
    rows: list[NDArray[np.int64]] = []
    end = 0
    for group in groups:
        prefix = shared_length(group.answers)
        start, end = end, end + prefix
        ids.append(group.answers[0].input_ids[:prefix])
        positions.append(np.arange(prefix))
        for answer in group.answers:
            own = len(answer) - prefix
            ids.append(answer.input_ids[prefix:])
            positions.append(np.arange(prefix, len(answer)))
            rows.append(np.concatenate([np.arange(start, start + prefix), np.arange(end, end + own)]))
            end += own
        trees.append((prefix, *(len(answer) - prefix for answer in group.answers)))
    return np.concatenate(ids).astype(np.int64)[None], np.concatenate(positions)[None], None, tuple(trees), rows


def _padded(answers: Sequence[Example], pad_id: int) -> tuple[_Ids, _Ids, _Ids, None, list[_Ids]]:
    width = -(-max(len(answer) for answer in answers) // 8) * 8
    ids = np.full((len(answers), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = answer.input_ids
        mask[row, : len(answer)] = 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int64), ids.shape).copy()
    rows = [np.arange(row * width, row * width + len(answer)) for row, answer in enumerate(answers)]
    return ids, positions, mask, None, rows


def _long(parts: Sequence[NDArray[np.int32] | NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
