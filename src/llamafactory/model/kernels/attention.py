"""The attention half of a decoder block as one autograd function: `x + o(attention(rope(q, k), v))`.

Projections, optional norms of queries and keys, rotation and residual are one function, so that each large tensor
exists once. Attention stays in each sequence or prefix tree (`kernels.branches`). In the last block only the rows
whose logits are wanted go through the output projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from llamafactory.model.kernels.branches import Rules, attend, attend_back
from llamafactory.model.kernels.norm import rms_norm, rms_norm_again, rms_norm_back
from llamafactory.model.kernels.projection import Projection, flatten, project, project_back, refill
from llamafactory.model.kernels.rotary import Rotation, rotate
from llamafactory.model.workload import Part


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """What the function computes with.

    Attributes:
        norm: weight of the norm before it.
        eps: of all norms here.
        layers: the projections q, k, v and o.
        query_norm: weight of the norm of each query head, or None.
        key_norm: weight of the norm of each key head, or None.
        head_dim: width of a head.
        scaling: factor on the scores.
        window: tokens that a token sees, itself among them, or None for all before it.
    """

    norm: Tensor
    eps: float
    layers: tuple[Projection, Projection, Projection, Projection]
    query_norm: Tensor | None
    key_norm: Tensor | None
    head_dim: int
    scaling: float
    window: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where things are in the flat row.

    Attributes:
        parts: tokens of each sequence or prefix tree.
        rotation: angles of each token, or None for a layer without positions.
        rows: rows whose output is wanted, int64, each once; or None for all.
    """

    parts: tuple[Part, ...]
    rotation: Rotation | None
    rows: Tensor | None


def attention(x: Tensor, block: Attention, layout: Layout) -> Tensor:
    """Applies the block to `[time, width]`; differentiable. Returns `[wanted rows, width]`."""
    return _Attention.apply(block, layout, x, block.norm, block.query_norm, block.key_norm, *flatten(block.layers))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block: Attention,
        layout: Layout,
        x: Tensor,
        norm: Tensor,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        normed, inverse = rms_norm(x, norm, block.eps)
        states, inner = project(normed, block.layers[:3])
        q, k, v = (state.view(len(x), -1, block.head_dim) for state in states)
        raw: list[Tensor | None] = [None] * 4  # queries and keys before their norms, and those norms' inverses
        if query_norm is not None and key_norm is not None:
            raw[0], raw[1] = q, k
            (q, raw[2]), (k, raw[3]) = rms_norm(q, query_norm, block.eps), rms_norm(k, key_norm, block.eps)
        if layout.rotation is not None:
            rotate(q, layout.rotation)
            rotate(k, layout.rotation)
        mixed, norms = attend(q, k, v, _rules(block, layout))
        (output,), inner_out = project(_pick(mixed, layout), block.layers[3:])
        ctx.block, ctx.layout = block, layout
        ctx.save_for_backward(
            x, norm, query_norm, key_norm, inverse, q, k, v, *raw, mixed, norms, inner, inner_out, *tensors
        )
        return output.add_(_pick(x, layout))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        block: Attention = ctx.block
        layout: Layout = ctx.layout
        x, norm, query_norm, key_norm, inverse, q, k, v, raw_q, raw_k, inverse_q, inverse_k, *rest = ctx.saved_tensors
        mixed, norms, inner, inner_out, *tensors = rest
        grad = grads[0]
        needs_x, needs_norm, needs_query_norm, needs_key_norm, *needs = ctx.needs_input_grad[2:]
        layers, wanted = refill(block.layers, tensors), refill(block.layers, needs)
        grad_mixed, for_out = project_back(
            [grad], _pick(mixed, layout), inner_out, layers[3:], wanted[3:], needs_input=True
        )
        if layout.rows is not None:
            grad_mixed = torch.zeros_like(mixed).index_copy_(0, layout.rows, cast("Tensor", grad_mixed))
        grad_q, grad_k, grad_v = attend_back(
            cast("Tensor", grad_mixed), (q, k, v), mixed, norms, _rules(block, layout)
        )
        if layout.rotation is not None:
            rotate(grad_q, layout.rotation, back=True)
            rotate(grad_k, layout.rotation, back=True)
        for_query_norm = for_key_norm = None
        if query_norm is not None and key_norm is not None:
            grad_q, for_query_norm = rms_norm_back(grad_q, raw_q, query_norm, inverse_q, needs_weight=needs_query_norm)
            grad_k, for_key_norm = rms_norm_back(grad_k, raw_k, key_norm, inverse_k, needs_weight=needs_key_norm)
        grad_states = [state.view(len(x), -1) for state in (grad_q, grad_k, grad_v)]
        normed = rms_norm_again(x, norm, inverse)
        needs_inside = needs_x or needs_norm
        grad_normed, for_inputs = project_back(
            grad_states, normed, inner, layers[:3], wanted[:3], needs_input=needs_inside
        )
        grad_x = grad_norm = None
        if grad_normed is not None:
            grad_x, grad_norm = rms_norm_back(grad_normed, x, norm, inverse, needs_weight=needs_norm)
            grad_x = grad_x.add_(grad) if layout.rows is None else grad_x.index_add_(0, layout.rows, grad)
        for_layers = flatten([*for_inputs, *for_out])
        return None, None, grad_x, grad_norm, for_query_norm, for_key_norm, *for_layers


def _pick(states: Tensor, layout: Layout) -> Tensor:
    return states if layout.rows is None else states.index_select(0, layout.rows)


def _rules(block: Attention, layout: Layout) -> Rules:
    return Rules(parts=layout.parts, scaling=block.scaling, window=block.window)
