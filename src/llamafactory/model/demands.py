"""What a stage asks of the machine beyond a forward and a backward pass of the policy over its rows. Numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_BYTES_PER_TOKEN = 4 * 7
"""Of a sampled token in a checkpoint: its id, and six numbers that its rollout knows of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """The answers that one device samples.

    Attributes:
        rows_at_once: answers that grow together.
        group_size: answers to each prompt, which is read once for all of them.
        prompt_tokens: of the longest prompt.
        new_tokens: of an answer, at most.
        answers: of one rollout.
        num_epochs: passes of the optimizer over a rollout.
    """

    rows_at_once: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    answers: int
    num_epochs: int

    @property
    def rows(self) -> int:
        """Answers that grow together, where there are that many."""
        return min(self.rows_at_once, self.answers)

    @property
    def kept_bytes(self) -> int:
        """Of the rollout that a checkpoint holds."""
        return self.answers * (_BYTES_PER_TOKEN * self.new_tokens + 4 * self.prompt_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Demands:
    """What a stage takes besides the policy's own pass.

    Attributes:
        reference: what the policy is compared with: nothing; its own base, the adapter switched off; a frozen copy of
            the adapter that is continued; or a second model.
        reference_parameters: of the second model; None for another copy of the base.
        reference_bytes: of the second model where it is quantised; else None.
        has_value_head: a head that gives one number a token is trained too.
        makes_logits: the language-model head is run.
        passes: forward passes without gradient over the rows of a step.
        sampling: the answers that the policy samples, or None.
    """

    reference: Literal["none", "base", "adapter", "copy"] = "none"
    reference_parameters: int | None = None
    reference_bytes: int | None = None
    has_value_head: bool = False
    makes_logits: bool = True
    passes: float = 0.0
    sampling: Sampling | None = None

    @property
    def drops_nothing(self) -> bool:
        """The policy's numbers are compared with others of the same tokens, so that it runs without dropout."""
        return self.reference != "none" or self.sampling is not None


NOTHING_MORE = Demands()
"""Of stages that need the policy alone."""
