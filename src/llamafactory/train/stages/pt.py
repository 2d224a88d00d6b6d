"""Pre-training: next-token cross-entropy on plain text, rows packed into full bins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llamafactory.hparams.section import Section
from llamafactory.train.stage import LossOutput, Models, Stage

if TYPE_CHECKING:
    from llamafactory.data.batch import Batch


class Options(Section):
    """Stage pt has no keys of its own."""


def loss(models: Models, batch: Batch, options: Section) -> LossOutput:
    """Sum of token losses in nats (divided later by the global number of tokens)."""
    from llamafactory.train.logprob import supervised_nll

    return LossOutput(loss_sum=supervised_nll(models.policy, batch, models.plan), num_units=batch.num_targets)


def summarise(averages: Mapping[str, float]) -> Mapping[str, float]:
    """Perplexity; infinite where the loss is too large for a float."""
    loss_value = averages["loss"]
    return {"perplexity": math.exp(loss_value) if loss_value < 700 else math.inf}


STAGE = Stage(name="pt", view="text", loss=loss, summarise=summarise)
