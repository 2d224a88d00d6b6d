"""Head and cross-entropy of selected rows, a chunk of rows at a time: the full logits never exist.

Two autograd functions on one formula, `logits = cap(rows @ weight.T)`. The sum makes its gradient in the forward pass,
while a chunk's logits are in the cache (the idea of Liger, arXiv 2410.10989); the per-token form makes the logits
again in the backward pass, because the gradient of each token's log-probability is not known before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llamafactory.model.kernels.product import times, times_transposed

CACHED_ROWS = 16
"""Rows that are normalised together: 16 rows of 49k float32 logits are 3 MB, which stays in the cache."""


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of weighted cross-entropies. A frozen weight gets no gradient; a trained one is accumulated in float32.

    Second derivatives are not defined.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_weights: Tensor | None,
        chunk: int,
        cap: float | None = None,
    ) -> Tensor:
        """Computes the loss and keeps the gradients.

        Args:
            ctx: autograd's context.
            rows: `[rows, width]` hidden states.
            weight: `[vocab, width]` matrix of the head.
            targets: int64 `[rows]`.
            row_weights: float32 `[rows]` or None for ones.
            chunk: rows whose logits exist at once.
            cap: soft-cap c of the logits, `c tanh(logits / c)`, or None.

        Returns:
            Float32 scalar.
        """
        needs_rows, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_rows = torch.empty_like(rows) if needs_rows else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        matrix = weight.to(rows.dtype)
        total = rows.new_zeros((), dtype=torch.float32)
        for part in _chunks(rows.shape[0], chunk):
            logits = times_transposed(rows[part], matrix).float()
            for small in _chunks(logits.shape[0], CACHED_ROWS):
                piece, index = logits[small], targets[part][small].unsqueeze(1)
                slope = _cap(piece, cap, with_slope=needs_rows or needs_weight)
                losses = _normalise(piece, index)
                piece.scatter_add_(1, index, torch.full_like(index, -1.0, dtype=piece.dtype))
                if slope is not None:
                    piece *= slope
                if row_weights is not None:
                    scale = row_weights[part][small]
                    losses = losses * scale
                    piece *= scale.unsqueeze(1)
                total += losses.sum()
            grad = logits.to(rows.dtype)
            if grad_rows is not None:
                grad_rows[part] = times(grad, matrix)
            if grad_weight is not None:
                _add_product(grad_weight, grad, rows[part])
        ctx.save_for_backward(grad_rows, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the kept gradients by the upstream scalar."""
        grad_rows, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        rows = None if grad_rows is None else grad_rows * scale.to(grad_rows.dtype)
        weight = None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype)
        return rows, weight, None, None, None, None


class ChunkedLogProbs(torch.autograd.Function):
    """Log-probability of each row's target, in float32. Second derivatives are not defined."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, chunk: int, cap: float | None = None
    ) -> Tensor:
        """Computes log-probabilities.

        Args:
            ctx: autograd's context.
            rows: `[rows, width]` hidden states.
            weight: `[vocab, width]` matrix of the head.
            targets: int64 `[rows]`.
            chunk: rows whose logits exist at once.
            cap: soft-cap of the logits, or None.

        Returns:
            Float32 `[rows]`.
        """
        matrix = weight.to(rows.dtype)
        found = rows.new_empty(rows.shape[0], dtype=torch.float32)
        for part in _chunks(rows.shape[0], chunk):
            logits = times_transposed(rows[part], matrix).float()
            for small in _chunks(logits.shape[0], CACHED_ROWS):
                piece = logits[small]
                _cap(piece, cap, with_slope=False)
                found[part][small] = -_normalise(piece, targets[part][small].unsqueeze(1))
        ctx.save_for_backward(rows, weight, targets)
        ctx.chunk, ctx.cap = chunk, cap
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Makes each chunk's softmax again; d log p / d logits is `onehot - softmax`."""
        rows, weight, targets = ctx.saved_tensors
        upstream = grad_outputs[0].float()
        needs_rows, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_rows = torch.empty_like(rows) if needs_rows else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        matrix = weight.to(rows.dtype)
        for part in _chunks(rows.shape[0], ctx.chunk):
            logits = times_transposed(rows[part], matrix).float()
            for small in _chunks(logits.shape[0], CACHED_ROWS):
                piece, index = logits[small], targets[part][small].unsqueeze(1)
                slope = _cap(piece, ctx.cap, with_slope=True)
                _normalise(piece, index)
                piece.scatter_add_(1, index, torch.full_like(index, -1.0, dtype=piece.dtype))
                if slope is not None:
                    piece *= slope
                piece *= -upstream[part][small].unsqueeze(1)
            grad = logits.to(rows.dtype)
            if grad_rows is not None:
                grad_rows[part] = times(grad, matrix)
            if grad_weight is not None:
                _add_product(grad_weight, grad, rows[part])
        return grad_rows, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))


def _cap(logits: Tensor, cap: float | None, *, with_slope: bool) -> Tensor | None:
    """Soft-caps logits in place; returns the derivative `1 - tanh^2` where it is asked for."""
    if cap is None:
        return None
    logits.div_(cap).tanh_()
    slope = 1 - logits * logits if with_slope else None
    logits.mul_(cap)
    return slope


def _normalise(logits: Tensor, index: Tensor) -> Tensor:
    """Turns logits `[rows, vocab]` into probabilities in place, and returns each row's cross-entropy at `index`."""
    logits.sub_(logits.amax(-1, keepdim=True))
    at_target = logits.gather(1, index)
    norm = logits.exp_().sum(-1, keepdim=True)
    logits.div_(norm)
    return (norm.log() - at_target).squeeze(1)


def _add_product(total: Tensor, grad: Tensor, rows: Tensor) -> None:
    """`total += grad.T @ rows`, accumulated in float32."""
    if grad.dtype is torch.float32:
        total.addmm_(grad.T, rows)
    else:
        total += grad.T @ rows
