"""What rows are read with: the tokenizer, the template, and the seed of their order. Loads no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamafactory.data.template_choice import end_token, template_of
from llamafactory.model.loader import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llamafactory.data.types import Template
    from llamafactory.hparams.run_config import RunConfig


def load_text(cfg: RunConfig) -> tuple[PreTrainedTokenizerFast, Template]:
    """Loads the tokenizer, with the end token that the template asks for, and the template."""
    tokenizer = load_tokenizer(cfg.model, eos_token=end_token(cfg.data.template))
    return tokenizer, template_of(cfg.data, tokenizer)


def data_seed(cfg: RunConfig) -> int:
    """Seed of everything that concerns rows."""
    return cfg.train.seed if cfg.train.data_seed is None else cfg.train.data_seed
