"""A head that gives one number a token, its file, and the standard classifier that it becomes on export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llamafactory.extras.errors import LlamaFactoryError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FILE = "value_head.safetensors"
_WEIGHT, _BIAS = "v_head.summary.weight", "v_head.summary.bias"


class ValueHead(nn.Module):
    """One linear layer, in float32 whatever the model computes in."""

    def __init__(self, width: int) -> None:
        """Draws the weight from N(0, 1 / (width + 1)) (arXiv 2009.01325, appendix C); the bias is 0."""
        super().__init__()
        self.summary = nn.Linear(width, 1)
        nn.init.normal_(self.summary.weight, std=(width + 1) ** -0.5)
        nn.init.zeros_(self.summary.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Values `[tokens]` of hidden states `[tokens, width]`."""
        with torch.autocast(states.device.type, enabled=False):
            return self.summary(states.float()).squeeze(-1)


class ModelWithValueHead(nn.Module):
    """A language model, with its adapter if it has one, and a value head beside it."""

    def __init__(self, model: nn.Module, head: ValueHead) -> None:
        """Holds both; `model` is bare or wrapped by peft."""
        super().__init__()
        self.pretrained_model = model
        self.v_head = head


def add_value_head(model: Any, *, source: Path | None = None, trainable: bool = True) -> ModelWithValueHead:
    """Puts a value head beside a model.

    Args:
        model: the language model.
        source: folder of a run whose head is continued; a folder without one, or None, gives a new head.
        trainable: whether the head is trained.

    Raises:
        LlamaFactoryError: the stored head belongs to a model of another width.
    """
    head = ValueHead(model.config.get_text_config().hidden_size)
    if source is not None and (source / FILE).is_file():
        load_value_head(head, source)
    return ModelWithValueHead(model, head.requires_grad_(trainable))


def split_value_head(
    model: Any, folder: Path, state: Mapping[str, Tensor] | None
) -> tuple[Any, Mapping[str, Tensor] | None]:
    """Writes the value head, if there is one, and gives the language model that is left to write.

    Args:
        model: the model that is trained, with or without a value head.
        folder: existing folder.
        state: a copy of the model's state that is written in its place, or None.

    Returns:
        The language model, and its part of the state.
    """
    if not isinstance(model, ModelWithValueHead):
        return model, state
    found = model.state_dict() if state is None else state
    save_value_head({name: tensor for name, tensor in found.items() if name.startswith("v_head.")}, folder)
    inner = "pretrained_model."
    rest = {name.removeprefix(inner): tensor for name, tensor in found.items() if name.startswith(inner)}
    return model.pretrained_model, None if state is None else rest


def save_value_head(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Writes `value_head.safetensors`."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / FILE)


def load_value_head(head: ValueHead, folder: Path) -> None:
    """Reads `value_head.safetensors` into `head`.

    Raises:
        LlamaFactoryError: it belongs to a model of another width.
    """
    from safetensors.torch import load_file

    tensors = load_file(folder / FILE)
    if tensors[_WEIGHT].shape != head.summary.weight.shape:
        raise LlamaFactoryError(
            f"{folder / FILE} is for a model of width {tensors[_WEIGHT].shape[1]}, and this one has "
            f"{head.summary.weight.shape[1]}. Use the base model that the reward model was trained from."
        )
    with torch.no_grad():
        head.summary.weight.copy_(tensors[_WEIGHT])
        head.summary.bias.copy_(tensors[_BIAS])


def as_classifier(
    model: PreTrainedModel, head: ValueHead, tokenizer: PreTrainedTokenizerFast
) -> tuple[PreTrainedModel, str]:
    """The same function as a `...ForSequenceClassification` with one label, which plain transformers loads.

    transformers reads the score at the last token that is not padding *by id*, so the pad token must be one that no
    answer ends with.

    Args:
        model: the language model, adapters merged.
        head: the value head; transformers' classifiers have no bias, which a ranking loss leaves at 0.
        tokenizer: gives the pad token.

    Returns:
        The classifier, and the pad token that it needs.

    Raises:
        LlamaFactoryError: the model type has no classifier in transformers, the bias is not 0, or no token can pad.
    """
    from transformers import AutoModelForSequenceClassification

    bias = head.summary.bias.item()
    if bias != 0.0:
        raise LlamaFactoryError(f"the value head has a bias ({bias:g}), which a standard classifier cannot hold")
    pad = padding_token(tokenizer)
    config = type(model.config).from_dict(
        {**model.config.to_dict(), "num_labels": 1, "pad_token_id": tokenizer.convert_tokens_to_ids(pad)}
    )
    try:
        made: Any = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
    except ValueError as error:
        raise LlamaFactoryError(
            f"model type {model.config.model_type!r} has no sequence classifier in transformers; "
            f"keep the adapter and {FILE}, which this project loads"
        ) from error
    made.base_model.load_state_dict(cast("Any", model).base_model.state_dict())
    with torch.no_grad():
        made.score.weight.copy_(head.summary.weight)
    return made.eval(), pad


def padding_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """A special token that no answer ends with.

    Raises:
        LlamaFactoryError: there is none.
    """
    if tokenizer.pad_token and tokenizer.pad_token != tokenizer.eos_token:
        return str(tokenizer.pad_token)
    named = {str(token) for token in (tokenizer.eos_token, tokenizer.bos_token) if token}
    spare = [str(token) for token in tokenizer.all_special_tokens if token not in named]
    for token in (tokenizer.unk_token, *spare):
        if token and str(token) not in named:
            return str(token)
    raise LlamaFactoryError(
        "the tokenizer's only special tokens end or begin answers, so none of them can be padding of a classifier. "
        "Add a pad token to the tokenizer and train again."
    )
