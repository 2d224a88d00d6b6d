"""Reward model: one number for an answer, trained to rank pairs (arXiv 2203.02155, eq. 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from llamafactory.hparams.section import Section
from llamafactory.train.stage import LossOutput, Models, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from llamafactory.data.answer_batch import AnswerBatch
    from llamafactory.model.valuehead import ModelWithValueHead


class Options(Section):
    """Stage rm has no keys of its own."""


def loss(models: Models, batch: AnswerBatch, options: Section) -> LossOutput:
    """Sum of the pairs' ranking losses (divided later by the global number of pairs)."""
    from llamafactory.train.answers import answer_scores, averaged

    values = answer_scores(cast("ModelWithValueHead", models.policy), batch)
    chosen, rejected = values[::2], values[1::2]
    weights = batch.group_weights
    found = {
        "accuracy": (chosen > rejected).float(),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "length_gap": batch.lengths[::2] - batch.lengths[1::2],
    }
    return LossOutput(
        loss_sum=(ranking_losses(chosen, rejected) * weights).sum(),
        num_units=batch.num_groups,
        metrics={name: averaged(numbers, weights) for name, numbers in found.items()},
    )


def ranking_losses(chosen: Tensor, rejected: Tensor, margins: Tensor | float = 0.0) -> Tensor:
    """Bradley-Terry: minus the log probability that the chosen answer is better by its margin, `[pairs]`."""
    from torch.nn import functional as F

    return -F.logsigmoid(chosen - rejected - margins)


STAGE = Stage(name="rm", view="pairs", loss=loss, has_value_head=True, predicts="pair_scores")
