"""Attention over prefix trees: several continuations of one prefix, the prefix computed once.

A tree is `(prefix, suffix, suffix, ...)` in tokens, laid out in that order. A prefix token sees the prefix up to
itself; a suffix token sees the whole prefix and its own suffix up to itself; suffixes never see each other. Each token
so sees exactly what it would see in a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.nn import functional as F


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    trees: Sequence[Sequence[int]],
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Attends within each tree of one flat row.

    The first suffix runs in one causal call together with its prefix; each other suffix is a call of its own over
    prefix and suffix.

    Args:
        query: `[1, heads, time, head_dim]`.
        key: `[1, kv_heads, time, head_dim]`.
        value: as `key`.
        trees: sizes in tokens, summing to `time`; a part may be empty.
        dropout: attention dropout probability.
        scaling: factor on the scores; None means `head_dim ** -0.5`.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.

    Returns:
        `[1, heads, time, head_dim]`.
    """
    grouped = query.shape[1] != key.shape[1]
    pieces: list[torch.Tensor] = []
    start = 0
    for prefix, first, *others in trees:
        trunk = slice(start, start + prefix + first)
        sees_all = sliding_window is None or prefix + first <= sliding_window
        if prefix + first:
            pieces.append(
                F.scaled_dot_product_attention(
                    query[:, :, trunk],
                    key[:, :, trunk],
                    value[:, :, trunk],
                    attn_mask=None
                    if sees_all
                    else bottom_mask(prefix + first, prefix + first, sliding_window, query.device),
                    dropout_p=dropout,
                    is_causal=sees_all,
                    scale=scaling,
                    enable_gqa=grouped,
                )  # fmt: skip
            )
        end = trunk.stop
        for suffix in others:
            own = slice(end, end + suffix)
            end = own.stop
            if not suffix:
                continue
            stem = slice(start, start + prefix)
            pieces.append(
                F.scaled_dot_product_attention(
                    query[:, :, own],
                    torch.cat([key[:, :, stem], key[:, :, own]], dim=2),
                    torch.cat([value[:, :, stem], value[:, :, own]], dim=2),
                    attn_mask=bottom_mask(suffix, prefix + suffix, sliding_window, query.device),
                    dropout_p=dropout,
                    scale=scaling,
                    enable_gqa=grouped,
                )  # fmt: skip
            )
        start = end
    return torch.cat(pieces, dim=2)


_LARGE_MASK = 2**20


def bottom_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Boolean `[queries, keys]`: the queries are the last positions of the keys, causal, banded by the window."""
    kept = _kept_large if queries * keys > _LARGE_MASK else _kept_small
    return kept(queries, keys, window, device)


def _make_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    known = torch.arange(keys, device=device)[None, :]
    mask = position >= known
    return mask if window is None else mask & (known > position - window)


# Every layer of a pass asks for the same masks, and keeps them for its backward pass. Those of passes before go: no
# more than 64 MB of small ones and a few large ones are ever kept.
_kept_small = lru_cache(maxsize=64)(_make_mask)
_kept_large = lru_cache(maxsize=4)(_make_mask)
