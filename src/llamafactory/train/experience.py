"""What a rollout leaves to train on: sampled tokens, and what is known of each of them. Arrays on the host.

Token ids are those that were sampled; nothing here is ever decoded and encoded again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamafactory.data.answer_batch import AnswerBatch, AnswerGroup, collate_answers
from llamafactory.data.pack import pack_best_fit
from llamafactory.data.types import IGNORE_INDEX, Example

if TYPE_CHECKING:
    from llamafactory.model.plan import ModelPlan

PER_TOKEN = ("sampler", "old", "reference", "advantages", "values", "returns")
"""Fields of `Experience` that hold a number for each sampled token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Experience:
    """A prompt with its sampled answers.

    Attributes:
        place: number of the prompt in its rollout, over all ranks.
        row: number of the prompt in the data.
        prompt: int32 `[time]` token ids.
        answers: int32 `[tokens]` ids of each answer, its stop among them; never empty.
        sampler: float32 log-probabilities of all answers' tokens, end to end, as the generator computed them.
        old: the same as the trainer computes them before the first update, or None where there is only one.
        reference: the same under the reference, or None.
        values: of the states that tokens were chosen in, or None.
        advantages: of each token.
        returns: what values are trained towards, or None.
        weights: float32 `[answers]`, 0 for an answer that is left out.
    """

    place: int
    row: int
    prompt: NDArray[np.int32]
    answers: tuple[NDArray[np.int32], ...]
    sampler: NDArray[np.float32]
    old: NDArray[np.float32] | None = None
    reference: NDArray[np.float32] | None = None
    values: NDArray[np.float32] | None = None
    advantages: NDArray[np.float32] | None = None
    returns: NDArray[np.float32] | None = None
    weights: NDArray[np.float32]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer."""
        return [len(answer) for answer in self.answers]

    def part(self, first: int, last: int) -> Experience:
        """The same prompt with the answers `first` up to `last`."""
        ends = np.cumsum([0, *self.lengths])
        tokens = slice(ends[first], ends[last])
        cut = {name: getattr(self, name)[tokens] for name in PER_TOKEN if getattr(self, name) is not None}
        return replace(self, answers=self.answers[first:last], weights=self.weights[first:last], **cut)

    def blank(self) -> Experience:
        """One answer without any weight, for a rank that has nothing to do."""
        one = self.part(0, 1)
        return replace(one, weights=np.zeros_like(one.weights))


@dataclass(frozen=True, kw_only=True)
class ExperienceBatch(AnswerBatch):
    """Answers with what their rollout knows of them; see `Experience` for the fields that a token has.

    Attributes:
        sampler: float32 `[targets]`.
        old: float32 `[targets]`, or None where the policy has not changed since it sampled.
        reference_logps: as in `AnswerBatch`.
        advantages: float32 `[targets]`.
        values: float32 `[targets]` or None.
        returns: float32 `[targets]` or None.
        weights: float32 `[answers]`.
        num_counted: answers whose weight is not 0.
        rollout_metrics: name -> `[2]`, a sum and its divisor, of the rollout that the batch begins; on the host.
    """

    sampler: Tensor
    old: Tensor | None
    advantages: Tensor | None
    values: Tensor | None
    returns: Tensor | None
    weights: Tensor
    num_counted: int
    rollout_metrics: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


def collate_experience(
    experiences: Sequence[Experience], layout: Literal["flat", "padded"], pad_id: int
) -> ExperienceBatch:
    """Lays prompts with their answers out as one batch; in the flat layout a prompt is there once.

    Raises:
        ValueError: no experiences.
    """
    groups = [
        AnswerGroup(answers=tuple(_example(one.prompt, answer) for answer in one.answers)) for one in experiences
    ]
    batch = collate_answers(groups, layout, pad_id)

    def joined(name: str) -> Tensor | None:
        parts = [getattr(one, name) for one in experiences]
        if any(part is None for part in parts):
            return None
        return torch.from_numpy(np.concatenate(parts).astype(np.float32))

    sampler, weights = joined("sampler"), joined("weights")
    if sampler is None or weights is None:
        raise ValueError("an experience without log-probabilities or weights")
    known: dict[str, Any] = vars(batch) | {"reference_logps": joined("reference")}
    return ExperienceBatch(
        **known,
        sampler=sampler, old=joined("old"), advantages=joined("advantages"), values=joined("values"),
        returns=joined("returns"), weights=weights, num_counted=int(torch.count_nonzero(weights)),
    )  # fmt: skip


def _example(prompt: NDArray[np.int32], answer: NDArray[np.int32]) -> Example:
    labels = np.concatenate([np.full(len(prompt), IGNORE_INDEX, dtype=np.int32), answer])
    return Example(input_ids=np.concatenate([prompt, answer]), labels=labels)


Piece = tuple[int, int, int]
"""Number of an experience, and the first and the last (exclusive) of its answers."""


def micro_batches(sizes: Sequence[tuple[int, Sequence[int]]], plan: ModelPlan, rows_at_once: int) -> list[list[Piece]]:
    """Splits experiences into forward passes. A prompt whose answers are too many for one is split among several.

    Args:
        sizes: tokens of the prompt and of each answer, of each experience.
        plan: says how many tokens one pass may have.
        rows_at_once: answers of a pass where the plan gives no number of tokens.
    """
    limit = plan.micro_batch_tokens
    pieces: list[Piece] = []
    tokens: list[int] = []
    for number, (prompt, answers) in enumerate(sizes):
        first, total = 0, prompt
        for place, answer in enumerate(answers):
            is_full = total + answer > limit if limit else place - first >= rows_at_once
            if place > first and is_full:
                pieces.append((number, first, place))
                tokens.append(total)
                first, total = place, prompt
            total += answer
        pieces.append((number, first, len(answers)))
        tokens.append(total)
    if limit:
        return [[pieces[place] for place in places] for places in pack_best_fit(tokens, limit)]
    batches: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        count = piece[2] - piece[1]
        if count > room:
            batches.append([])
            room = rows_at_once
        batches[-1].append(piece)
        room -= count
    return batches


def to_tensors(experiences: Sequence[Experience]) -> dict[str, Tensor]:
    """Experiences as a few flat tensors, for a checkpoint."""
    found: dict[str, Any] = {
        "heads": np.array([(one.place, one.row, len(one.prompt), len(one.answers)) for one in experiences], np.int64),
        "lengths": np.array([length for one in experiences for length in one.lengths], np.int64),
        "prompts": np.concatenate([one.prompt for one in experiences]),
        "answers": np.concatenate([answer for one in experiences for answer in one.answers]),
        "weights": np.concatenate([one.weights for one in experiences]),
    }
    for name in PER_TOKEN:
        parts = [getattr(one, name) for one in experiences]
        if all(part is not None for part in parts):
            found[name] = np.concatenate(parts).astype(np.float32)
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in found.items()}


def from_tensors(tensors: Mapping[str, Tensor]) -> list[Experience]:
    """The experiences of `to_tensors`."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    found: list[Experience] = []
    prompts = answers = lengths = 0
    for place, row, num_prompt, count in arrays["heads"].tolist():
        sizes = arrays["lengths"][lengths : lengths + count]
        ends = answers + np.cumsum([0, *sizes])
        per_token = {name: arrays[name][ends[0] : ends[-1]] for name in PER_TOKEN if name in arrays}
        found.append(
            Experience(
                place=place,
                row=row,
                prompt=arrays["prompts"][prompts : prompts + num_prompt],
                answers=tuple(arrays["answers"][start:stop] for start, stop in zip(ends, ends[1:], strict=False)),
                weights=arrays["weights"][lengths : lengths + count],
                **per_token,
            )
        )
        prompts, answers, lengths = prompts + num_prompt, int(ends[-1]), lengths + count
    return found
