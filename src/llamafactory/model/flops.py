"""FLOPs of a training step, from a config's numbers alone (symbols as in docs: d, f, L, h, V)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShape:
    """The numbers of a dense decoder.

    Attributes:
        layers: number of blocks.
        width: hidden size d.
        mlp: MLP width f.
        query: heads x head size.
        kv: key/value heads x head size.
        vocab: rows of the head.
    """

    layers: int
    width: int
    mlp: int
    query: int
    kv: int
    vocab: int

    @property
    def block_params(self) -> int:
        """Weights of all blocks' linear layers."""
        return self.layers * (2 * self.width * self.query + 2 * self.width * self.kv + 3 * self.width * self.mlp)

    @property
    def num_params(self) -> int:
        """Weights of blocks and one embedding matrix."""
        return self.block_params + self.vocab * self.width


def decoder_shape(config: PreTrainedConfig) -> DecoderShape | None:
    """The shape of a dense decoder config, or None where its fields are named otherwise or it is not dense."""
    try:
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
            return None
        return DecoderShape(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            mlp=config.intermediate_size,
            query=heads * head_size,
            kv=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
            vocab=config.vocab_size,
        )
    except AttributeError:
        return None


def step_flops(config: PreTrainedConfig, *, lengths: Iterable[int], num_targets: int, full: bool) -> int | None:
    """Lower bound of the FLOPs of one optimizer step: real tokens and supervised rows only.

    Padding, masks, recomputation and unsupervised logits are not in it, so they lower the utilisation that is
    computed from it. LoRA's own matrices (about 1-2 %) are left out.

    Args:
        config: the model's config.
        lengths: tokens of each segment of the step.
        num_targets: supervised tokens.
        full: whether weight gradients are made too.
    """
    shape = decoder_shape(config)
    if shape is None:
        return None
    lengths = list(lengths)
    passes = 6 if full else 4
    linear = passes * sum(lengths) * shape.block_params
    head = passes * num_targets * shape.vocab * shape.width
    attention = 6 * shape.layers * shape.query * sum(n * n for n in lengths)
    return linear + head + attention
