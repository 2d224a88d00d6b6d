"""Cross-entropy on supervised rows only: never a full `[batch, time, vocab]` logits tensor.

The head runs on the rows whose next token is supervised, in chunks, and the gradient is made while a chunk's logits
are still in the cache (the idea of Liger, arXiv 2410.10989; without kernels, for any device). What this file never
does: decide which rows are supervised, or divide by a count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamafactory.model.attention import no_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llamafactory.data.batch import Batch
    from llamafactory.model.plan import ModelPlan


def supervised_nll(model: nn.Module, batch: Batch, plan: ModelPlan) -> Tensor:
    """Weighted sum of the negative log-likelihoods of a batch's supervised tokens, in nats.

    Args:
        model: a causal language model, bare or wrapped by peft.
        batch: flat or padded, on the model's device.
        plan: says whether the fused head may be used and its chunk size.

    Returns:
        A float32 scalar that is attached to the graph also where nothing is supervised.
    """
    base = unwrap_peft(model)
    head: Any = base.get_output_embeddings()
    if not plan.fused_head:
        logits = _forward(base, batch).logits.flatten(0, 1).index_select(0, batch.target_rows)
        return _weighted_sum(logits, batch)
    rows = hidden_states(base, batch).flatten(0, 1).index_select(0, batch.target_rows)
    if type(head) is not nn.Linear or "bias" in head.state_dict():  # for example wrapped by an adapter
        return _weighted_sum(head(rows), batch)
    return ChunkedCrossEntropy.apply(rows, head.weight, batch.target_ids, batch.target_weights, plan.loss_chunk_rows)


def _weighted_sum(logits: Tensor, batch: Batch) -> Tensor:
    """Sum of cross-entropies of `[targets, vocab]` logits; an empty sum is zero and stays attached to the graph."""
    losses = F.cross_entropy(logits.float(), batch.target_ids, reduction="none")
    return (losses if batch.target_weights is None else losses * batch.target_weights).sum()


def hidden_states(base: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states `[batch, time, width]`, after the final norm."""
    return _forward(base.base_model, batch).last_hidden_state


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft wrapper; adapters sit inside its layers, so its forward runs them."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator,return-value]


def _forward(model: nn.Module, batch: Batch) -> Any:
    """Runs a model on a batch of either layout."""
    if batch.segment_lengths is None:
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
    return model(
        input_ids=batch.input_ids,
        attention_mask=no_mask(batch.input_ids.device),
        position_ids=batch.position_ids,
        use_cache=False,
        segment_lengths=batch.segment_lengths,
    )


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of weighted cross-entropies of `rows @ weight.T`, a chunk of rows at a time.

    The gradients of rows and weight are computed in the forward pass and scaled in the backward pass; a frozen weight
    gets none. The weight's gradient is accumulated in float32. Second derivatives are not defined.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor | None, chunk: int
    ) -> Tensor:
        """Computes the loss and keeps the gradients.

        Args:
            ctx: autograd's context.
            rows: `[rows, width]` hidden states.
            weight: `[vocab, width]` matrix of the head.
            targets: int64 `[rows]`.
            row_weights: float32 `[rows]` or None for ones.
            chunk: rows whose logits exist at once.

        Returns:
            Float32 scalar.
        """
        needs_rows, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_rows = torch.empty_like(rows) if needs_rows else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        matrix = weight.to(rows.dtype)
        total = rows.new_zeros((), dtype=torch.float32)
        for start in range(0, rows.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = (rows[part] @ matrix.T).float()
            scale = None if row_weights is None else row_weights[part]
            index = targets[part].unsqueeze(1)
            log_norm = torch.logsumexp(logits, dim=-1, keepdim=True)
            losses = (log_norm - logits.gather(1, index)).squeeze(1)
            total += (losses if scale is None else losses * scale).sum()
            if not (needs_rows or needs_weight):
                continue
            grad = logits.sub_(log_norm).exp_()  # the softmax, in the memory of the logits
            grad.scatter_add_(1, index, torch.full_like(index, -1.0, dtype=grad.dtype))
            if scale is not None:
                grad *= scale.unsqueeze(1)
            grad = grad.to(rows.dtype)
            if grad_rows is not None:
                torch.mm(grad, matrix, out=grad_rows[part])
            if grad_weight is not None:
                grad_weight += grad.T @ rows[part]
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
        return rows, weight, None, None, None
