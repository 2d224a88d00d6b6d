"""Reward model: one number for an answer, trained to rank pairs or to give answers the scores that people gave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from llamafactory.hparams.section import Section
from llamafactory.train.stage import LossOutput, Models, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from llamafactory.data.ranked_batch import RankedBatch
    from llamafactory.model.valuehead import ModelWithValueHead

_MOMENTS = ("_score", "_label", "_score2", "_label2", "_score_label")


class Options(Section):
    """Stage rm has no keys of its own."""


def loss(models: Models, batch: RankedBatch, options: Section) -> LossOutput:
    """Sum of the pairs' ranking losses and of the single answers' squared errors.

    It is divided later by the global number of pairs and single answers, each of which counts once.
    """
    from llamafactory.train.answers import answer_scores, averaged

    values = answer_scores(cast("ModelWithValueHead", models.policy), batch, models.plan)
    chosen, rejected = values.index_select(0, batch.chosen), values.index_select(0, batch.chosen + 1)
    scores = values.index_select(0, batch.singles)
    errors = score_losses(scores, batch.labels)
    lengths = batch.lengths
    of_pairs = {
        "accuracy": (chosen > rejected).float(),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "length_gap": lengths.index_select(0, batch.chosen) - lengths.index_select(0, batch.chosen + 1),
    }
    of_singles = {"mse": errors, "rewards/scored": scores}
    if not models.policy.training:  # a correlation over the few rows of a step would say nothing
        wide = (scores.double(), batch.labels.double()) if scores.device.type != "mps" else (scores, batch.labels)
        products = (wide[0], wide[1], wide[0].square(), wide[1].square(), wide[0] * wide[1])
        of_singles |= dict(zip(_MOMENTS, products, strict=True))
    ranking = ranking_losses(chosen, rejected, batch.margins) * batch.pair_weights
    return LossOutput(
        loss_sum=ranking.sum() + (errors * batch.single_weights).sum(),
        num_units=batch.num_groups,
        metrics={name: averaged(numbers, batch.pair_weights) for name, numbers in of_pairs.items()}
        | {name: averaged(numbers, batch.single_weights) for name, numbers in of_singles.items()},
    )


def ranking_losses(chosen: Tensor, rejected: Tensor, margins: Tensor | float = 0.0) -> Tensor:
    """Minus the log probability that the chosen answer is better by its margin, `[pairs]`.

    Bradley-Terry as in InstructGPT (arXiv 2203.02155, eq. 1), with the margin of Llama 2 (arXiv 2307.09288, eq. 2).
    """
    from torch.nn import functional as F

    return -F.logsigmoid(chosen - rejected - margins)


def score_losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Squared difference of the score and the one that the row gives, `[answers]`.

    The regression loss of HelpSteer2 (arXiv 2406.08673, section 4), with one attribute.
    """
    return (scores - labels).square()


def summarise(averages: Mapping[str, float]) -> dict[str, float]:
    """Pearson's correlation of scores and labels, of an evaluation's moments; none where one of them never varies."""
    if not averages.keys() >= set(_MOMENTS):
        return {}
    score, label, score2, label2, both = (averages[name] for name in _MOMENTS)
    spread = (score2 - score**2) * (label2 - label**2)
    floor = 1e-14 * score2 * label2  # of rounding
    return {"pearson": (both - score * label) / math.sqrt(spread)} if spread > floor else {}


STAGE = Stage(
    name="rm", view="ranked", loss=loss, has_value_head=True, predicts="scores", summarise=summarise,
)  # fmt: skip
