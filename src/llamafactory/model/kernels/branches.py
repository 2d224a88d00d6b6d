"""Causal attention inside each sequence and prefix tree of one flat row, forward and backward, without autograd.

A tree is a prefix and the branches that follow it (see `model.tree_attention`). The prefix and its first branch are
one causal sequence, and so is each other branch by itself. What those others see of the prefix is one call for all of
them; the two softmaxes of a token are joined by their normalisers, as blocks are in arXiv 2205.14135. Backward, each
call gets the joined output and normalisers, so that its weights are the whole ones: the gradients of its parts add up.
No key is copied and no mask is made where no window is narrower than a path through the tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamafactory.model.workload import Part

_HIDDEN = -1e30
"""Added to the score of a hidden key: finite, so that a token which sees nothing of its prefix gives it no weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What attention computes with.

    Attributes:
        parts: tokens of each sequence or tree of the row, in order.
        scaling: factor on the scores.
        window: tokens that a token sees, itself among them, or None for all before it.
    """

    parts: Sequence[Part]
    scaling: float
    window: int | None


def attend(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Attends.

    Args:
        q: `[time, heads, head_dim]`.
        k: `[time, kv_heads, head_dim]`.
        v: as `k`.
        rules: the parts and how they are scored.

    Returns:
        `[time, heads * head_dim]`, and the log-normalisers `[time, heads]`.
    """
    mixed = torch.empty_like(q)
    norms = q.new_empty(q.shape[:2])
    for call in _calls(rules, q):
        output, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads(q[call.queries]),
            _heads(k[call.keys]),
            _heads(v[call.keys]),
            0.0,
            call.is_causal,
            attn_mask=call.mask,
            scale=rules.scaling,
        )
        output, norm = output[0].transpose(0, 1), norm[0].T
        if call.is_own:
            mixed[call.queries], norms[call.queries] = output, norm
            continue
        both = torch.logaddexp(norms[call.queries], norm)
        mixed[call.queries].lerp_(output, norm.sub_(both).exp_().unsqueeze(-1))
        norms[call.queries] = both
    return mixed.flatten(1), norms


def attend_back(
    grad: Tensor, states: tuple[Tensor, Tensor, Tensor], mixed: Tensor, norms: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend`.

    Args:
        grad: of its output.
        states: `q`, `k` and `v`.
        mixed: its output.
        norms: the normalisers that it returned.
        rules: as there.

    Returns:
        Gradients of `q`, `k` and `v`, of their shapes.
    """
    q, k, v = states
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad, mixed = grad.view(q.shape), mixed.view(q.shape)
    for call in _calls(rules, q):
        places = call.queries, call.keys, call.keys
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads(grad[call.queries]),
            *(_heads(state[place]) for state, place in zip(states, places, strict=True)),
            _heads(mixed[call.queries]),
            norms[call.queries].T.unsqueeze(0),
            0.0,
            call.is_causal,
            attn_mask=call.mask,
            scale=rules.scaling,
        )
        for whole, place, piece in zip(grads, places, found, strict=True):
            if call.is_own:
                whole[place] = piece[0].transpose(0, 1)
            else:
                whole[place] += piece[0].transpose(0, 1)
    return grads


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """One call of the kernel.

    Attributes:
        queries: places of the tokens that see.
        keys: places of the tokens that are seen: the same ones for a sequence, else the prefix of their tree.
        mask: additive `[queries, keys]`; None where a sequence sees itself causally, and all of a prefix.
    """

    queries: slice
    keys: slice
    mask: Tensor | None = None

    @property
    def is_own(self) -> bool:
        """A sequence that sees itself; each token is in one such call, which comes before it sees a prefix."""
        return self.queries == self.keys

    @property
    def is_causal(self) -> bool:
        """The kernel itself hides what comes later."""
        return self.is_own and self.mask is None


def _calls(rules: Rules, like: Tensor) -> Iterator[_Call]:
    start = 0
    for part in rules.parts:
        prefix, first, *others = (0, part) if isinstance(part, int) else part
        stop = start + prefix + first
        stem, trunk = slice(start, start + prefix), slice(start, stop)
        yield from _sequence(trunk, rules.window, like)
        for size in others:
            yield from _sequence(slice(stop, stop + size), rules.window, like)
            stop += size
        if prefix and stop > trunk.stop:
            yield _Call(
                queries=slice(trunk.stop, stop), keys=stem, mask=_stem_mask(prefix, others, rules.window, like)
            )
        start = stop


def _sequence(own: slice, window: int | None, like: Tensor) -> Iterator[_Call]:
    length = own.stop - own.start
    if not length:
        return
    mask = None
    if window is not None and length > window:
        positions = torch.arange(length)
        distance = positions[:, None] - positions[None, :]
        mask = like.new_zeros(length, length).masked_fill_((distance < 0) | (distance >= window), float("-inf"))
    yield _Call(queries=own, keys=own, mask=mask)


def _stem_mask(prefix: int, branches: Sequence[int], window: int | None, like: Tensor) -> Tensor | None:
    """What the tokens of branches do not see of their prefix, or None where they see all of it."""
    if window is None or prefix + max(branches) <= window:
        return None
    positions = torch.cat([torch.arange(prefix, prefix + size) for size in branches])
    distance = positions[:, None] - torch.arange(prefix)[None, :]
    return like.new_zeros(distance.shape).masked_fill_(distance >= window, _HIDDEN)


def _heads(states: Tensor) -> Tensor:
    """`[time, heads, head_dim]` -> `[1, heads, time, head_dim]`, without a copy."""
    return states.transpose(0, 1).unsqueeze(0)
