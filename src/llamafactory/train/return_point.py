"""What a step changes besides weights, kept from its beginning, so that a step can be given up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llamafactory.train.checkpoint.random_state import Generators

if TYPE_CHECKING:
    from llamafactory.train.job import Updates


@dataclass(frozen=True, kw_only=True)
class ReturnPoint:
    """The beginning of an optimizer step.

    Attributes:
        step: steps done before it.
        generators: random states of this process.
        scheduler: state of the learning-rate schedule.
        rates: learning rate of each parameter group.
        supervised: supervised tokens so far.
        num_tokens: input tokens so far.
    """

    step: int
    generators: Generators
    scheduler: dict[str, Any]
    rates: list[Any]
    supervised: int
    num_tokens: int

    @classmethod
    def take(cls, step: int, updates: Updates, supervised: int, num_tokens: int) -> ReturnPoint:
        """Notes the state now; waits for no device."""
        return cls(
            step=step,
            generators=Generators(),
            scheduler=dict(updates.scheduler.state_dict()),
            rates=[group["lr"] for group in updates.optimizer.param_groups],
            supervised=supervised,
            num_tokens=num_tokens,
        )

    def put_back(self, updates: Updates) -> None:
        """Takes schedule and learning rates back, and drops what a step has added to the gradient."""
        updates.scheduler.load_state_dict(self.scheduler)
        for group, rate in zip(updates.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        updates.optimizer.zero_grad(set_to_none=True)
