"""What a reward sees of an answer, and what a source of rewards is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One sampled answer.

    Attributes:
        prompt: text that the model was given, special tokens included.
        completion: text of the answer, special tokens left out.
        answer: the row's own answer, or None where the row has none.
        prompt_ids: token ids of the prompt.
        completion_ids: the sampled token ids, never encoded again.
        is_stopped: the model ended the answer; else it was cut at `max_new_tokens`.
        row: number of the prompt in the prepared data, from 0.
        columns: the row as its file has it, where a source of rewards asks for it.
    """

    prompt: str
    completion: str
    answer: str | None
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    is_stopped: bool
    row: int
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def label(self) -> str:
        """Names the answer to a person."""
        return f"prompt {self.row}, which ends {self.prompt[-60:]!r}, answer {self.completion[:80]!r}"


Score: TypeAlias = Callable[[Sequence[Answer]], Sequence[float]]
"""Scores answers, one number each, in their order. NaN means that an answer could not be scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """A source of rewards.

    Attributes:
        name: as the curves are called.
        score: see `Score`.
        weight: that its numbers are multiplied by.
        columns: of the row that it cannot do without.
        wants_rows: whether it is given rows at all.
    """

    name: str
    score: Score
    weight: float = 1.0
    columns: frozenset[str] = frozenset()
    wants_rows: bool = False
