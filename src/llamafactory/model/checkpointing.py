"""Activation checkpointing, block by block: which blocks are recomputed in the backward pass.

transformers switches all blocks at once; here every n-th one can be, so that no more is recomputed than memory asks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from llamafactory.model.skeleton import decoder_blocks
from llamafactory.model.trace import is_recomputed


def recompute_blocks(model: nn.Module, every: int, *, use_reentrant: bool = False) -> int:
    """Makes every `every`-th decoder block recompute its activations in the backward pass.

    The result and the gradients stay the same; dropout draws the same numbers again.

    Args:
        model: a transformers model, bare or wrapped by peft.
        every: 1 for all blocks, n for one of n, 0 for none.
        use_reentrant: torch's older implementation, which needs inputs with gradients (they are switched on).

    Returns:
        The number of blocks that are recomputed.

    Raises:
        ValueError: the model has no blocks that can be recomputed.
    """
    if not every:
        return 0
    blocks = decoder_blocks(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks that can be recomputed")
    chosen = [block for index, block in enumerate(blocks) if is_recomputed(index, every)]
    for block in chosen:
        switches: Any = block
        switches._gradient_checkpointing_func = partial(checkpoint, use_reentrant=use_reentrant)
        switches.gradient_checkpointing = True
    if use_reentrant:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        base.enable_input_require_grads()
    return len(chosen)
