"""What a stage says about its rollouts, and what passes between a rollout and its stage. Records, no behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llamafactory.train.experience import Experience


@dataclass(frozen=True, kw_only=True)
class Played:
    """The answers of a rollout over all ranks; the same in every process.

    Attributes:
        rewards: float64 `[prompts, group]`.
        lengths: int64 `[prompts, group]`, sampled tokens of each answer.
        stopped: bool `[prompts, group]`, False where `max_new_tokens` cut the answer.
        limit: `max_new_tokens`.
    """

    rewards: NDArray[np.float64]
    lengths: NDArray[np.int64]
    stopped: NDArray[np.bool_]
    limit: int


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a stage makes of a rollout.

    Attributes:
        experiences: of this process, with their advantages.
        weights: float64 `[prompts, group]` over all ranks, 0 for an answer that is left out.
        metrics: name -> sum and divisor, `[2]`; the same names in every process.
        state: what the stage remembers for the next rollout; JSON-able.
    """

    experiences: Sequence[Experience]
    weights: NDArray[np.float64]
    metrics: Mapping[str, Tensor]
    state: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class RolloutRules:
    """How a stage wants its rollouts.

    Attributes:
        group_size: answers to each prompt.
        num_epochs: passes over a rollout.
        num_parts: optimizer steps of a pass; the batch size is that of one of them.
        num_redraws: how often prompts whose answers all earn the same are replaced by others.
        needs_old: log-probabilities before the first update are measured by the trainer.
        needs_reference: those of the reference are measured at once, because rewards hold them.
        num_units: `(answers, tokens, max_new_tokens) -> units` that a step's loss is divided by.
        judge: `(played, experiences of this process, state, sum over ranks) -> Judged`.
        state: before the first rollout.
    """

    group_size: int
    num_epochs: int = 1
    num_parts: int = 1
    num_redraws: int = 0
    needs_old: bool = False
    needs_reference: bool = False
    num_units: Callable[[int, int, int], int]
    judge: Callable[[Played, Sequence[Experience], Mapping[str, Any], Callable[[Tensor], Tensor]], Judged]
    state: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def num_updates(self) -> int:
        """Optimizer steps of a rollout."""
        return self.num_epochs * self.num_parts


def as_metric(values: NDArray[Any]) -> Tensor:
    """Sum and number of values, `[2]`."""
    import torch

    return torch.tensor([float(np.sum(values)), float(np.size(values))], dtype=torch.float64)
