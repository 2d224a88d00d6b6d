"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llamafactory.hparams.section import Section
from llamafactory.model.method import Method

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Options(Section):
    """Full fine-tuning has no options of its own."""


def apply(model: PreTrainedModel, options: Options, *, adapters: tuple[Path, ...], trainable: bool) -> nn.Module:
    """Makes every parameter trainable, in fp32 master precision where the run trains.

    Args:
        model: the loaded base model.
        options: none to read.
        adapters: must be empty; the config check refuses adapters here.
        trainable: whether the run trains.

    Returns:
        The same model.
    """
    model.requires_grad_(trainable)
    return model


def outline(model: PreTrainedModel, options: Options, *, adapters: tuple[Path, ...]) -> nn.Module:
    """The model as it will be trained, without weights."""
    return apply(model, options, adapters=(), trainable=True)


METHOD = Method(
    apply=apply,
    outline=outline,
    merged_before=lambda options, adapters: (),
    trains_base=True,
    saves_adapter=False,
)
