"""Root-mean-square norm (arXiv 1910.07467) over the last dimension, without autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`weight * x / rms(x)`.

    Returns:
        The normed tensor, and `1 / rms(x)` with a last dimension of 1, for the backward pass.
    """
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
    return (x * inverse).mul_(weight), inverse


def rms_norm_again(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The normed tensor once more, from the kept `1 / rms(x)`."""
    return (x * inverse).mul_(weight)


def rms_norm_back(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, *, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `x` (in the memory of `grad`, which is overwritten) and, where needed, of the weight."""
    unit = x * inverse
    grad_weight = (grad * unit).flatten(0, -2).sum(0) if needs_weight else None
    grad.mul_(weight)
    mean = (grad * unit).mean(-1, keepdim=True)
    return grad.sub_(unit.mul_(mean)).mul_(inverse), grad_weight
