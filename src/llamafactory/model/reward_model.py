"""Reward models as they lie on a disk, each loaded as a language model with a value head beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.model.loader import adapter_folders, folder_with, load_classifier, load_model, load_model_config
from llamafactory.model.method import apply_method
from llamafactory.model.valuehead import FILE, ModelWithValueHead, ValueHead, add_value_head

if TYPE_CHECKING:
    from llamafactory.hparams.model import ModelConfig
    from llamafactory.hparams.section import Section


def load_reward_model(
    cfg: ModelConfig, *, method: str, options: Section, dtype: str, attention: str, device: str
) -> ModelWithValueHead:
    """Loads a reward model for scoring.

    Args:
        cfg: names an adapter with a value head and its base; a model folder with a value head; or an exported
            `...ForSequenceClassification` with one label.
        method: fine-tuning method of the adapter.
        options: of the method.
        dtype: of the weights; the value head is float32.
        attention: attention implementation.
        device: where to put the weights.

    Raises:
        LlamaFactoryError: not a reward model.
    """
    architectures = cast("Any", load_model_config(cfg)).architectures or ()
    folders = adapter_folders(cfg)
    if any(str(name).endswith("ForSequenceClassification") for name in architectures):
        if folders:
            raise LlamaFactoryError(
                "adapter_name_or_path: an exported reward model has its adapter inside. Remove the key, or name the "
                "base model that the adapter was trained on."
            )
        return _as_value_model(load_classifier(cfg, dtype=dtype, attention=attention)).to(device)
    source = folders[-1] if folders else folder_with(cfg, FILE)
    if not (source / FILE).is_file():
        raise LlamaFactoryError(
            f"{source} holds no {FILE}, so that it is no reward model. Give the output_dir of a run of stage rm, as "
            "adapter_name_or_path (lora) or as model_name_or_path (full), or the folder of an exported one."
        )
    base = load_model(cfg, dtype=dtype, attention=attention, device=device)
    model = apply_method(base, method, options, adapters=folders, trainable=False)
    return add_value_head(model, source=source, trainable=False).to(device).eval()


def _as_value_model(classifier: Any) -> ModelWithValueHead:
    """The same numbers from the parts of a classifier."""
    weight = classifier.score.weight.detach()
    if weight.shape[0] != 1 or getattr(classifier.score, "bias", None) is not None:
        raise LlamaFactoryError(
            f"the classifier has {weight.shape[0]} labels, and a reward model has one, without a bias"
        )
    head = ValueHead(weight.shape[1])
    with torch.no_grad():
        head.summary.weight.copy_(weight)
    return ModelWithValueHead(classifier, head.requires_grad_(False)).eval()
