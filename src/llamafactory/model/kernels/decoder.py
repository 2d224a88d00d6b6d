"""A whole decoder through the fused functions: the same numbers as the model's own forward, for less time and memory.

It reads the modules and never changes them, so that saving, loading and generation are those of transformers and peft.
It applies to float32 on a CPU, flat batches, and families whose blocks are proven (`Family.prenorm_blocks`); a model
that holds anything else than plain modules and plain LoRA gets None, and the caller runs the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llamafactory.model.family import family_of
from llamafactory.model.kernels.attention import Attention, Layout, attention
from llamafactory.model.kernels.mlp import Mlp, mlp
from llamafactory.model.kernels.norm import rms_norm, rms_norm_back
from llamafactory.model.kernels.projection import read_projection
from llamafactory.model.kernels.rotary import Rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llamafactory.data.batch import Batch

Block = tuple[Attention, Mlp]


def decode(base: PreTrainedModel, batch: Batch, rows: Tensor) -> Tensor | None:
    """Last hidden states of some rows of a batch, after the final norm.

    Args:
        base: a causal language model, without peft's wrapper around it.
        batch: flat, of sequences or prefix trees, on the model's device.
        rows: int64 `[wanted]`, indices into the flattened positions, in any order; answers that share their prefix
            may want its last row several times, and it is computed once.

    Returns:
        `[wanted, width]`, or None where this path does not apply.
    """
    body: Any = base.base_model
    if batch.segment_lengths is None:  # padded
        return None
    blocks = read_blocks(base)
    if blocks is None or torch.is_autocast_enabled("cpu"):
        return None
    embedded = body.embed_tokens(batch.input_ids)
    if embedded.dtype is not torch.float32 or embedded.device.type != "cpu":
        return None
    rotation = Rotation.of(*body.rotary_emb(embedded, position_ids=batch.position_ids))
    states = embedded[0]
    kept, places = _each_once(rows)
    for place, (layer, block) in enumerate(zip(body.layers, blocks, strict=True)):
        layout = Layout(
            parts=batch.segment_lengths,
            rotation=rotation if getattr(layer.self_attn, "use_rope", True) else None,
            rows=kept if place == len(blocks) - 1 else None,
        )
        states = _run(layer, states, block, layout)
    found = _Norm.apply(states, body.norm.weight, body.norm.variance_epsilon)
    return found if places is None else found.index_select(0, places)


def _each_once(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """The different ones of `rows` in order, and the place of each row among them, or None where they are the same."""
    kept, places = torch.unique(rows, return_inverse=True)
    return (rows, None) if torch.equal(kept, rows) else (kept, places)


def read_blocks(base: PreTrainedModel) -> list[Block] | None:
    """The blocks of a model as the fused functions want them, or None where one of them is not plain."""
    config: Any = base.config
    if not family_of(config.model_type).prenorm_blocks or config.hidden_act != "silu":
        return None
    body: Any = base.base_model
    blocks = [_read_block(layer, config) for layer in body.layers]
    found = [block for block in blocks if block is not None]
    return found if len(found) == len(blocks) else None


def _read_block(layer: Any, config: Any) -> Block | None:
    if layer._forward_hooks or layer._forward_pre_hooks:  # for example of FSDP, which shards the weights
        return None
    heads, inner = layer.self_attn, layer.mlp
    if heads.training and heads.attention_dropout:
        return None
    modules = [getattr(heads, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    modules += [getattr(inner, name) for name in ("gate_proj", "up_proj", "down_proj")]
    read = [read_projection(module) for module in modules]
    layers = [projection for projection in read if projection is not None]
    if len(layers) < len(read):
        return None
    before, middle = layer.input_layernorm, layer.post_attention_layernorm
    return (
        Attention(
            norm=before.weight,
            eps=before.variance_epsilon,
            layers=(layers[0], layers[1], layers[2], layers[3]),
            query_norm=_weight(heads, "q_norm"),
            key_norm=_weight(heads, "k_norm"),
            head_dim=heads.head_dim,
            scaling=heads.scaling,
            window=_window(heads, config),
        ),
        Mlp(norm=middle.weight, eps=middle.variance_epsilon, layers=(layers[4], layers[5], layers[6])),
    )


def _run(layer: Any, states: Tensor, block: Block, layout: Layout) -> Tensor:
    """Runs a block, by way of activation checkpointing where transformers has turned it on for this layer."""

    def forward(x: Tensor) -> Tensor:
        return mlp(attention(x, block[0], layout), block[1])

    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        checkpointed: Callable[..., Tensor] = layer._gradient_checkpointing_func
        return checkpointed(forward, states)
    return forward(states)


def _weight(owner: nn.Module, name: str) -> Any:
    module = getattr(owner, name, None)
    return None if module is None else module.weight


def _window(heads: Any, config: Any) -> int | None:
    """The sliding window of a layer: its own, or in families whose layers are all alike that of the config."""
    return heads.sliding_window if hasattr(heads, "sliding_window") else getattr(config, "sliding_window", None)


class _Norm(torch.autograd.Function):
    """The final norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        grad_x, grad_weight = rms_norm_back(grads[0].clone(), x, weight, inverse, needs_weight=needs_weight)
        return grad_x, grad_weight, None
