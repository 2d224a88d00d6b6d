"""What a loss needs of whole next-token distributions: a chunk of rows at a time, made again in the backward pass.

All functions read the supervised rows of a batch only. Logits of at most `plan.loss_chunk_rows` rows exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llamafactory.model.family import Head, family_of
from llamafactory.train.logprob import target_logits, target_states, unwrap_peft

if TYPE_CHECKING:
    from llamafactory.data.batch import Batch
    from llamafactory.model.plan import ModelPlan


class Rows:
    """The supervised rows of one model on one batch, from which logits are made chunk by chunk."""

    def __init__(self, model: nn.Module, batch: Batch, plan: ModelPlan) -> None:
        """Runs the model up to its last hidden states.

        Args:
            model: a causal language model, bare or wrapped by peft.
            batch: flat or padded, on the model's device.
            plan: size of a chunk, and whether the head may be run on chosen rows.
        """
        base: Any = unwrap_peft(model)
        self._head: Any = base.get_output_embeddings()
        facts = family_of(base.config.model_type).head
        self._is_known = facts is not None
        facts = facts or Head()
        self._factor, self._cap = facts.factor(base.config), facts.cap(base.config)
        if self._is_known:
            self._states = target_states(base, batch, plan)
        else:
            self._states = target_logits(base, batch, plan)
        self._chunk = plan.loss_chunk_rows

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Which rows, and what their logits are made of."""
        for start in range(0, len(self._states), self._chunk):
            part = slice(start, start + self._chunk)
            yield part, self._states[part]

    def logits(self, states: Tensor) -> Tensor:
        """Float32 `[rows, vocab]`."""
        if not self._is_known:
            return states.float()
        logits = self._head(states).float() * self._factor
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def map(self, compute: Callable[..., Tensor], *others: Tensor | Rows) -> Tensor:
        """Applies `compute(logits, *others)` to each chunk and joins the results.

        Args:
            compute: float32 `[rows, vocab]` logits, and the rows of the others -> `[rows, ...]`.
            *others: tensors of one entry a row, or the rows of another model on the same batch, which become logits.
        """
        found = []
        for part, states in self.chunks():

            def run(states: Tensor, part: slice = part) -> Tensor:
                rest = [
                    other.logits(other._states[part]) if isinstance(other, Rows) else other[part] for other in others
                ]
                return compute(self.logits(states), *rest)

            found.append(checkpoint(run, states, use_reentrant=False) if torch.is_grad_enabled() else run(states))
        return torch.cat(found) if found else self._states.sum(dim=-1).float()


def top_entropy(logits: Tensor, count: int = 20) -> Tensor:
    """Entropy in nats of the `count` most likely tokens, their probabilities scaled to a sum of 1: `[rows]`."""
    logps = torch.log_softmax(logits.topk(min(count, logits.shape[-1]), dim=-1).values, dim=-1)
    return -(logps.exp() * logps).sum(dim=-1)


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || model) of each row in nats: `[rows]`."""
    ours, theirs = torch.log_softmax(logits, dim=-1), torch.log_softmax(reference, dim=-1)
    return (theirs.exp() * (theirs - ours)).sum(dim=-1)


def is_most_likely(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the target is the most likely token: float32 `[rows]`."""
    return (logits.argmax(dim=-1) == targets).float()
