"""Attention that never crosses a segment: the exact path for rows laid end to end (padding-free and packed batches).

Registered with transformers' AttentionInterface under the name `segments`. A batch that carries `segment_lengths` gets
one causal SDPA call a segment and no mask at all; any other call (generation, padded batches) goes to the stock SDPA
path with its stock mask, so one loaded model serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llamafactory.model.tree_attention import bottom_mask, tree_attention

NAME = "segments"
UNCOMPILED_NAME = "segments_uncompiled"


def register() -> str:
    """Makes the attention known to transformers (safe to call again).

    Returns:
        The name to pass as `attn_implementation`.
    """
    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def register_uncompiled() -> str:
    """As `register`, for a model whose blocks are compiled: this attention runs between their graphs.

    The lengths of the segments would be part of a graph, so that each number of segments would be compiled anew.
    """
    AttentionInterface.register(UNCOMPILED_NAME, torch.compiler.disable(segment_attention))
    AttentionMaskInterface.register(UNCOMPILED_NAME, sdpa_mask)
    return UNCOMPILED_NAME


class Boxed:
    """Lengths of segments that torch.compile does not look into: a graph depends on this class, not on them."""

    __slots__ = ("lengths",)

    def __init__(self, lengths: Sequence[int | Sequence[int]]) -> None:
        """Keeps them."""
        self.lengths = lengths


def no_mask(device: torch.device | str) -> torch.Tensor:
    """A 4-D placeholder, which transformers hands through as "already prepared" instead of building a T x T mask."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: Sequence[int | Sequence[int]] | Boxed | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment of one flat row.

    Args:
        module: the attention layer (for the stock path).
        query: `[1, heads, time, head_dim]`.
        key: `[1, kv_heads, time, head_dim]`; fewer heads than `query` in grouped-query attention.
        value: as `key`.
        attention_mask: ignored where `segment_lengths` is given.
        dropout: attention dropout probability.
        scaling: factor on the scores; None means `head_dim ** -0.5`.
        segment_lengths: tokens of each segment, summing to `time`; or of each prefix tree, see `tree_attention`.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        **kwargs: of the stock path; `softcap` (Gemma 2) and `s_aux` (sinks, GPT-OSS) change the scores here too.

    Returns:
        `[1, time, heads, head_dim]` and None for the attention weights.
    """
    if isinstance(segment_lengths, Boxed):
        segment_lengths = segment_lengths.lengths
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if segment_lengths is None and (softcap is not None or sinks is not None):
        return _stock_scored(query, key, value, attention_mask, sliding_window, dropout, scaling, softcap, sinks), None
    if segment_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    trees = [(0, part) if isinstance(part, int) else tuple(part) for part in segment_lengths]
    if softcap is not None or sinks is not None:
        sizes = [sum(tree) for tree in trees]
        masks = [_tree_mask(tree, sliding_window, query.device) for tree in trees]
        parts = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), masks, strict=True)
        scored = [
            _scored_attention(*part, dropout=dropout, scaling=scaling, softcap=softcap, sinks=sinks) for part in parts
        ]
        return torch.cat(scored, dim=2).transpose(1, 2).contiguous(), None
    lengths = [length for length in segment_lengths if isinstance(length, int)]
    if len(lengths) < len(segment_lengths):
        mixed = tree_attention(
            query, key, value, trees, dropout=dropout, scaling=scaling, sliding_window=sliding_window
        )
        return mixed.transpose(1, 2).contiguous(), None
    grouped = query.shape[1] != key.shape[1]
    pieces = [
        F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_band_mask(q.shape[2], sliding_window, q.device),
            dropout_p=dropout,
            is_causal=sliding_window is None or q.shape[2] <= sliding_window,
            scale=scaling,
            enable_gqa=grouped,
        )
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _stock_scored(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    window: int | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention under transformers' own mask, as in generation: SDPA would refuse caps and ignore sinks."""
    if mask is None:
        mask = bottom_mask(query.shape[2], key.shape[2], window, query.device)
    visible = mask if mask.dtype == torch.bool else mask >= 0
    scored = _scored_attention(
        query, key, value, visible[..., : key.shape[2]], dropout=dropout, scaling=scaling, softcap=softcap, sinks=sinks
    )
    return scored.transpose(1, 2).contiguous()


def _scored_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    *,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one segment or tree with its scores in memory, for what SDPA cannot do to them.

    Args:
        query: `[batch, heads, time, head_dim]`.
        key: `[batch, kv_heads, keys, head_dim]`.
        value: as `key`.
        visible: boolean `[time, keys]` or `[batch, 1, time, keys]`: which keys a query sees. One that sees none
            (padding) gets the mean of all values.
        dropout: of the attention weights.
        scaling: factor on the scores; None means `head_dim ** -0.5`.
        softcap: c of `c tanh(scores / c)`, or None.
        sinks: `[heads]` logits of an empty key that takes weight and gives nothing, or None.
    """
    heads, length = query.shape[1], key.shape[2]
    key, value = (states.repeat_interleave(heads // states.shape[1], dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, heads, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores.float(), dim=-1).to(query.dtype)[..., :length]
    return F.dropout(weights, dropout) @ value


def _tree_mask(tree: Sequence[int], window: int | None, device: torch.device) -> torch.Tensor:
    """Boolean `[time, time]`: a prefix, then branches that see the prefix and themselves, each causally."""
    prefix, *branches = tree
    positions = torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + size) for size in branches)])
    owners = torch.repeat_interleave(torch.arange(len(tree)), torch.tensor(tree))
    distance = positions[:, None] - positions[None, :]
    visible = (distance >= 0) & ((owners[:, None] == owners[None, :]) | (owners[None, :] == 0))
    return (visible if window is None else visible & (distance < window)).to(device)


def _band_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Boolean `[length, length]` mask of a causal sliding window, or None where the window is not reached."""
    if window is None or length <= window:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)
