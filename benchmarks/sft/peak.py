"""The fastest plain float32 matrix product of this process: the limit that utilisation is measured against."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def gemm_peak(sizes: tuple[int, ...] = (1024, 2048), repeats: int = 6) -> float:
    """Best FLOP/s of MKL's and oneDNN's product; the better library counts, whichever the training used."""
    from llamafactory.model.kernels.product import times

    best = 0.0
    products: tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...] = (torch.mm, times)
    with torch.no_grad():
        for size in sizes:
            left, right = torch.randn(size, size), torch.randn(size, size)
            for product in products:
                product(left, right)
                for _ in range(repeats):
                    start = time.perf_counter()
                    product(left, right)
                    best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best
