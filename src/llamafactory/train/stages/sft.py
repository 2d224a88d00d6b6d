"""Supervised fine-tuning: next-token cross-entropy on the supervised tokens of a conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamafactory.hparams.section import Section
from llamafactory.train.stage import LossOutput, Models, Stage

if TYPE_CHECKING:
    from llamafactory.data.batch import Batch


class Options(Section):
    """Supervised fine-tuning has no options of its own yet."""


def loss(models: Models, batch: Batch, options: Section) -> LossOutput:
    """Sum of token losses in nats (divided later by the global number of supervised tokens)."""
    from llamafactory.train.logprob import supervised_nll

    return LossOutput(loss_sum=supervised_nll(models.policy, batch, models.plan), num_units=batch.num_targets)


STAGE = Stage(name="sft", view="sft", loss=loss)
