"""The gated MLP half of a decoder block as one autograd function: `x + down(silu(gate(norm x)) * up(norm x))`.

Kept for the backward pass: `x`, `gate`, `up` and LoRA's narrow states. The normed input and the gated product are made
again, which costs two passes over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from llamafactory.model.kernels.norm import rms_norm, rms_norm_again, rms_norm_back
from llamafactory.model.kernels.projection import Projection, flatten, project, project_back, refill


@dataclass(frozen=True, kw_only=True, slots=True)
class Mlp:
    """What the function computes with.

    Attributes:
        norm: weight of the norm before it.
        eps: of that norm.
        layers: the projections gate, up and down.
    """

    norm: Tensor
    eps: float
    layers: tuple[Projection, Projection, Projection]


def mlp(x: Tensor, block: Mlp) -> Tensor:
    """Applies the block to `[rows, width]`; differentiable."""
    return _Mlp.apply(block, x, block.norm, *flatten(block.layers))


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: Mlp, x: Tensor, norm: Tensor, *tensors: Tensor | None) -> Tensor:
        normed, inverse = rms_norm(x, norm, block.eps)
        (gate, up), inner = project(normed, block.layers[:2])
        product = F.silu(gate).mul_(up)
        (output,), inner_down = project(product, block.layers[2:])
        ctx.block = block
        ctx.save_for_backward(x, norm, inverse, gate, up, inner, inner_down, *tensors)
        return output.add_(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, norm, inverse, gate, up, inner, inner_down, *tensors = ctx.saved_tensors
        grad = grads[0]
        needs_x, needs_norm, *needs = ctx.needs_input_grad[1:]
        layers, wanted = refill(ctx.block.layers, tensors), refill(ctx.block.layers, needs)
        activated = F.silu(gate)
        product = activated * up
        grad_product, for_down = project_back([grad], product, inner_down, layers[2:], wanted[2:], needs_input=True)
        grad_product = cast("Tensor", grad_product)
        grad_up = torch.mul(grad_product, activated, out=activated)
        grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up), gate)
        normed = rms_norm_again(x, norm, inverse)
        needs_inside = needs_x or needs_norm
        grad_normed, for_inputs = project_back(
            [grad_gate, grad_up], normed, inner, layers[:2], wanted[:2], needs_input=needs_inside
        )
        grad_x = grad_norm = None
        if grad_normed is not None:
            grad_x, grad_norm = rms_norm_back(grad_normed, x, norm, inverse, needs_weight=needs_norm)
            grad_x.add_(grad)
        return None, grad_x, grad_norm, *flatten([*for_inputs, *for_down])
