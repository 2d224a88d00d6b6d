"""Supervised fine-tuning: next-token cross-entropy on the supervised tokens of a conversation, and three variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llamafactory.hparams.section import Section, option
from llamafactory.train.stage import LossOutput, Models, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from llamafactory.data.batch import Batch

_GROUP = "Supervised fine-tuning"


class Options(Section):
    """The keys of stage sft."""

    use_dft_loss: bool = option(False, "Weigh each token's loss by its probability (arXiv 2508.05629).", group=_GROUP)
    use_asft_loss: bool = option(
        False, "DFT, held near the model before training by a KL term (arXiv 2509.23753).", group=_GROUP
    )
    asft_alpha: float = option(0.1, "Weight of the KL term of use_asft_loss.", group=_GROUP, ge=0)
    use_eaft_loss: bool = option(
        False, "Weigh each token's loss by the entropy of its prediction (arXiv 2601.02151).", group=_GROUP
    )
    eaft_alpha: float = option(1.0, "Exponent of the entropy weight of use_eaft_loss.", group=_GROUP, ge=0)
    compute_accuracy: bool = option(
        False, "Report the share of supervised tokens that are the most likely one, in evaluation.", group=_GROUP
    )
    ref_model: str | None = option(
        None, "Reference model; null takes the model as it is before training.", group="Preference optimisation"
    )
    ref_model_adapters: tuple[str, ...] = option(
        (), "Adapters that are merged into ref_model.", group="Preference optimisation"
    )


def loss(models: Models, batch: Batch, options: Options) -> LossOutput:
    """Sum of token losses in nats (divided later by the global number of supervised tokens)."""
    from llamafactory.train.logprob import supervised_nll

    if options.use_dft_loss or options.use_asft_loss or options.use_eaft_loss:
        total = _weighted(_variant(models, batch, options), batch)
    else:
        total = supervised_nll(models.policy, batch, models.plan)
    metrics = _accuracy(models, batch) if options.compute_accuracy and not models.policy.training else {}
    return LossOutput(loss_sum=total, num_units=batch.num_targets, metrics=metrics)


def _variant(models: Models, batch: Batch, options: Options) -> Tensor:
    """Loss of each supervised token, `[targets]`."""
    from llamafactory.train import distribution
    from llamafactory.train.logprob import token_logprobs

    if options.use_dft_loss and not options.use_asft_loss:
        return dft_losses(token_logprobs(models.policy, batch, models.plan))
    rows = distribution.Rows(models.policy, batch, models.plan)
    if options.use_eaft_loss:
        return rows.map(lambda logits, targets: eaft_losses(logits, targets, options.eaft_alpha), batch.target_ids)
    if models.reference is None:
        raise ValueError("use_asft_loss was given no reference model")
    with models.reference.of(models.policy) as model:
        known = distribution.Rows(model, batch, models.plan)
    return rows.map(
        lambda logits, targets, reference: asft_losses(logits, targets, reference, options.asft_alpha),
        batch.target_ids,
        known,
    )


def dft_losses(logps: Tensor) -> Tensor:
    """Cross-entropy weighed by the token's probability, through which no gradient flows (arXiv 2508.05629, eq. 9)."""
    return -logps * logps.detach().exp()


def eaft_losses(logits: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """Cross-entropy weighed by `(entropy of the 20 most likely tokens / 3) ** alpha`, without gradient through it.

    3 is about ln 20, the largest entropy that 20 tokens can have.

    Args:
        logits: float32 `[rows, vocab]`.
        targets: int64 `[rows]`.
        alpha: 0 is plain cross-entropy.
    """
    from llamafactory.train.distribution import top_entropy

    weights = (top_entropy(logits.detach()) / 3.0) ** alpha
    return -_logps(logits, targets) * weights


def asft_losses(logits: Tensor, targets: Tensor, reference: Tensor, alpha: float) -> Tensor:
    """DFT plus `alpha` times the KL from the reference's distribution to the model's (arXiv 2509.23753).

    Args:
        logits: float32 `[rows, vocab]`.
        targets: int64 `[rows]`.
        reference: logits of the reference, as `logits`.
        alpha: 0 is DFT.
    """
    from llamafactory.train.distribution import divergence

    return dft_losses(_logps(logits, targets)) + alpha * divergence(logits, reference)


def _logps(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


def _weighted(losses: Tensor, batch: Batch) -> Tensor:
    return (losses if batch.target_weights is None else losses * batch.target_weights).sum()


def _accuracy(models: Models, batch: Batch) -> Mapping[str, Tensor]:
    import torch

    from llamafactory.train import distribution
    from llamafactory.train.answers import averaged

    with torch.no_grad():
        right = distribution.Rows(models.policy, batch, models.plan).map(distribution.is_most_likely, batch.target_ids)
    return {"accuracy": averaged(right, torch.ones_like(right))}


STAGE = Stage(
    name="sft",
    view="sft",
    loss=loss,
    needs_reference=lambda options: options.use_asft_loss,
    predicts="answers",
)
