"""Log-probabilities of supervised rows only: never a full `[batch, time, vocab]` logits tensor.

The head runs on the rows whose next token is supervised, in chunks (`model.kernels.head`). What this file never does:
decide which rows are supervised, or divide by a count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from llamafactory.model.attention import Boxed, no_mask
from llamafactory.model.family import Head, family_of
from llamafactory.model.kernels.decoder import decode
from llamafactory.model.kernels.head import ChunkedCrossEntropy, ChunkedLogProbs

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
    head = _chunkable_head(base, plan)
    if head is None:
        return _weighted_sum(target_logits(base, batch, plan), batch)
    rows = _scaled(target_states(base, batch, plan), head.factor(base.config))
    weight = _head_module(base).weight
    return ChunkedCrossEntropy.apply(
        rows, weight, batch.target_ids, batch.target_weights, plan.loss_chunk_rows, head.cap(base.config)
    )


def token_logprobs(model: nn.Module, batch: Batch, plan: ModelPlan, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each supervised token, with a gradient; `batch.target_weights` is not applied.

    Args:
        model: a causal language model, bare or wrapped by peft.
        batch: flat or padded, on the model's device.
        plan: says whether the fused head may be used and its chunk size.
        temperature: divides the logits, as in sampling.

    Returns:
        Float32 `[targets]` in nats, in the order of `batch.target_ids`.
    """
    base = unwrap_peft(model)
    if _chunkable_head(base, plan, temperature) is not None:
        rows = target_states(base, batch, plan)
        if (found := state_logprobs(base, rows, batch, plan, temperature=temperature)) is not None:
            return found
    logits = target_logits(base, batch, plan).float() / temperature
    return -F.cross_entropy(logits, batch.target_ids, reduction="none")


def state_logprobs(
    base: PreTrainedModel, rows: Tensor, batch: Batch, plan: ModelPlan, *, temperature: float = 1.0
) -> Tensor | None:
    """As `token_logprobs`, from hidden states that are there already.

    Args:
        base: a causal language model without its peft wrapper.
        rows: `target_states` of the batch.
        batch: as in `token_logprobs`.
        plan: as in `token_logprobs`.
        temperature: divides the logits.

    Returns:
        Float32 `[targets]`, or None where only the model's own forward knows how logits are made.
    """
    head = _chunkable_head(base, plan, temperature)
    if head is None:
        return None
    rows = _scaled(rows, head.factor(base.config) / temperature)
    weight = _head_module(base).weight
    return ChunkedLogProbs.apply(rows, weight, batch.target_ids, plan.loss_chunk_rows, head.cap(base.config))


def _scaled(rows: Tensor, factor: float) -> Tensor:
    return rows if factor == 1.0 else rows * factor


def target_states(base: PreTrainedModel, batch: Batch, plan: ModelPlan) -> Tensor:
    """Last hidden states of the supervised rows, `[targets, width]`, after the final norm."""
    return row_states(base, batch, plan, batch.target_rows)


def row_states(base: PreTrainedModel, batch: Batch, plan: ModelPlan, rows: Tensor) -> Tensor:
    """Last hidden states of any rows, `[rows, width]`, after the final norm.

    Args:
        base: a causal language model without its peft wrapper.
        batch: flat or padded, on the model's device.
        plan: says whether the fused blocks may be used.
        rows: int64 indices into the flattened positions of the batch, in any order, repeated or not.
    """
    if plan.fused_blocks and (states := decode(base, batch, rows)) is not None:
        return states
    return hidden_states(base, batch).flatten(0, 1).index_select(0, rows)


def hidden_states(base: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states `[batch, time, width]`, after the final norm."""
    return _forward(base.base_model, batch).last_hidden_state


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft wrapper; adapters sit inside its layers, so its forward runs them."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator,return-value]


def _chunkable_head(base: PreTrainedModel, plan: ModelPlan, temperature: float = 1.0) -> Head | None:
    """How the head makes logits, or None where only its own forward knows (a bias, an adapter around it).

    A temperature acts on logits that are capped already, so that capped heads are left to their own forward then.
    """
    module = _head_module(base)
    if not plan.fused_head or type(module) is not nn.Linear or "bias" in module.state_dict():
        return None
    head = family_of(base.config.model_type).head
    return None if head is None or (temperature != 1.0 and head.cap(base.config) is not None) else head


def _head_module(base: PreTrainedModel) -> Any:
    return base.get_output_embeddings()


def target_logits(base: PreTrainedModel, batch: Batch, plan: ModelPlan) -> Tensor:
    """Logits `[targets, vocab]` from the model's own forward, or from its head where nothing follows the head."""
    head = family_of(base.config.model_type).head
    if plan.fused_head and head is not None and head == Head():
        return _head_module(base)(target_states(base, batch, plan))
    return _forward(base, batch).logits.flatten(0, 1).index_select(0, batch.target_rows)


def _weighted_sum(logits: Tensor, batch: Batch) -> Tensor:
    """Sum of cross-entropies of `[targets, vocab]` logits; an empty sum is zero and stays attached to the graph."""
    losses = F.cross_entropy(logits.float(), batch.target_ids, reduction="none")
    return (losses if batch.target_weights is None else losses * batch.target_weights).sum()


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
        segment_lengths=Boxed(batch.segment_lengths),
    )
