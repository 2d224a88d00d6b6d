"""Frozen models of 4 or 8 bits a weight: how bitsandbytes shall make one while it is loaded, and what it takes.

4 bits are NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314), 8 bits LLM.int8 (arXiv 2208.07339).
Linear layers are quantised; embeddings, norms and the head are not. What this file never does: train such a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig

_BLOCK, _OUTER_BLOCK = 64, 256
"""Weights that share a scale of one byte, and scales that share one of four bytes."""
_TABLES = 4 * (16 + 256)
"""Bytes of a 4-bit layer's two tables of values."""


def quantisation(bits: int, *, compute: str) -> BitsAndBytesConfig:
    """What `load_model` takes to quantise on load.

    Args:
        bits: of a weight, 4 or 8.
        compute: dtype of products of 4-bit layers; LLM.int8 has its own.
    """
    from transformers import BitsAndBytesConfig

    from llamafactory.model.patches.bitsandbytes_cpu import import_bitsandbytes

    import_bitsandbytes()
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, compute),
    )  # fmt: skip


def quantised_bytes(config: PreTrainedConfig, *, bits: int, element: int) -> int:
    """Bytes of the weights of a config's model, quantised.

    Args:
        config: of the model.
        bits: of a weight of a linear layer.
        element: bytes of any other weight.
    """
    import copy

    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D) and module is not head]
    weights = [module.weight for module in linear]
    rest = sum(parameter.numel() for parameter in model.parameters()) - sum(weight.numel() for weight in weights)
    return element * rest + sum(_layer_bytes(weight, bits) for weight in weights)


def _layer_bytes(weight: torch.Tensor, bits: int) -> int:
    if bits == 8:
        return weight.numel() + 4 * len(weight)
    scales = -(-weight.numel() // _BLOCK)
    return -(-weight.numel() // 2) + scales + 4 * -(-scales // _OUTER_BLOCK) + _TABLES
