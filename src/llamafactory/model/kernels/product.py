"""Matrix products without autograd, on the library that is fast here.

In float32 on a CPU, oneDNN multiplies the shapes of a decoder 8 to 12 % faster than MKL on AVX-512 machines from AMD,
with plain weights in either layout (benchmarks/results/sft_cpu.md). Which library is used depends on the machine
alone, so that a resumed run repeats its numbers bit for bit.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def times_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`: the forward pass of a linear layer.

    Args:
        x: `[rows, in]`.
        weight: `[out, in]`, contiguous or a transposed view.

    Returns:
        A new `[rows, out]` tensor.
    """
    if _uses_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.T


def times(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight`: the gradient of a linear layer's input.

    Args:
        x: `[rows, out]`.
        weight: `[out, in]`.
    """
    return times_transposed(x, weight.T)


def _uses_onednn(x: Tensor, weight: Tensor) -> bool:
    return x.dtype is torch.float32 and weight.dtype is torch.float32 and x.device.type == "cpu" and _has_onednn()


@cache
def _has_onednn() -> bool:
    """Whether this torch has the oneDNN product, and it is right (it is not a public operator)."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    x, weight = torch.arange(12.0).reshape(3, 4), torch.arange(20.0).reshape(5, 4).flip(0)
    try:
        with torch.no_grad():
            found = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
            turned = torch.ops.mkldnn._linear_pointwise(found, weight.T, None, "none", [], "")
    except (RuntimeError, NotImplementedError):
        return False
    return bool(torch.equal(found, x @ weight.T) and torch.equal(turned, (x @ weight.T) @ weight))
