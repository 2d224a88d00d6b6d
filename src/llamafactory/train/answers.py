"""Numbers of whole answers: log-probabilities under policy and reference, and scores of a value head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamafactory.train.logprob import row_states, token_logprobs, unwrap_peft

if TYPE_CHECKING:
    from llamafactory.data.answer_batch import AnswerBatch
    from llamafactory.model.plan import ModelPlan
    from llamafactory.model.valuehead import ModelWithValueHead
    from llamafactory.train.stage import Models


def policy_logps(models: Models, batch: AnswerBatch) -> Tensor:
    """Float32 `[targets]` log-probabilities of the supervised tokens, with gradient."""
    return token_logprobs(models.policy, batch, models.plan, temperature=models.temperature)


def reference_logps(models: Models, batch: AnswerBatch) -> Tensor:
    """Float32 `[targets]` log-probabilities under the reference, without gradient; not run where they are known."""
    if batch.reference_logps is not None:
        return batch.reference_logps
    if models.reference is None:
        raise ValueError("this stage was given no reference model")
    with models.reference.of(models.policy) as model:
        return token_logprobs(model, batch, models.plan, temperature=models.temperature).detach()


def answer_scores(model: ModelWithValueHead, batch: AnswerBatch, plan: ModelPlan) -> Tensor:
    """Float32 `[answers]`: the value head at each answer's last real token. The language-model head is not run."""
    return model.v_head(row_states(unwrap_peft(model.pretrained_model), batch, plan, batch.last_rows))


def per_answer(values: Tensor, batch: AnswerBatch) -> Tensor:
    """Sums `[targets]` values over each answer: `[answers]`; an answer without targets has 0."""
    return values.new_zeros(batch.num_answers).index_add(0, batch.owners, values)


def averaged(values: Tensor, weights: Tensor) -> Tensor:
    """A metric of `LossOutput`: weighted sum of values and sum of weights, float32 `[2]`, without gradient."""
    return torch.stack([(values.detach() * weights).sum(), weights.sum()])
