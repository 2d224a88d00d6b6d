"""Rotary position embedding (arXiv 2104.09864), half-split layout, in place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """Angles of every token.

    Attributes:
        cos: `[time, 1, rotated / 2]`.
        sin: as `cos`.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor) -> Rotation:
        """From the `[1, time, rotated]` tables of a transformers model, whose two halves are equal."""
        half = cos.shape[-1] // 2
        return cls(cos=cos[0, :, None, :half].contiguous(), sin=sin[0, :, None, :half].contiguous())


def rotate(x: Tensor, rotation: Rotation, *, back: bool = False) -> None:
    """Rotates `x` `[time, heads, head_dim]` in place; `back` turns the other way, which is also the gradient."""
    half = rotation.cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    sign = -1.0 if back else 1.0
    turned = first * rotation.sin
    first.mul_(rotation.cos).addcmul_(second, rotation.sin, value=-sign)
    second.mul_(rotation.cos).add_(turned, alpha=sign)
