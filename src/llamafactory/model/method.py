"""What a fine-tuning method is (`finetuning_type`): a record in `model/adapters/<name>.py`, found by file name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from llamafactory.hparams.section import Section


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A fine-tuning method.

    Attributes:
        apply: `(model, options, *, adapters, trainable) -> model`; wraps or unfreezes the loaded base model.
        outline: `(model, options, *, adapters) -> model` as it will be trained; reads no weights.
        merged_before: `(options, adapters) -> adapters` that `apply` merges into the base before it trains.
        trains_base: base weights get gradients, so they are kept in fp32 master precision.
        saves_adapter: the result is an adapter folder beside the base; else a whole model.
    """

    apply: Callable[..., nn.Module]
    outline: Callable[..., nn.Module]
    merged_before: Callable[[Any, tuple[Path, ...]], tuple[Path, ...]]
    trains_base: bool
    saves_adapter: bool


def load_method(finetuning_type: str) -> Method:
    """The method of that name, or the `METHOD` of the module at a dotted path; the config check knows the names."""
    name = finetuning_type if "." in finetuning_type else f"llamafactory.model.adapters.{finetuning_type}"
    return importlib.import_module(name).METHOD


def apply_method(
    model: nn.Module, finetuning_type: str, options: Section, *, adapters: tuple[Path, ...], trainable: bool
) -> nn.Module:
    """Applies the method to a loaded base model.

    Args:
        model: the base model.
        finetuning_type: name of the method.
        options: the method's `Options`.
        adapters: folders of trained adapters, in order.
        trainable: whether the run trains.
    """
    return load_method(finetuning_type).apply(model, options, adapters=adapters, trainable=trainable)
