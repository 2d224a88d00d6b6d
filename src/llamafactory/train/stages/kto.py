"""KTO: answers that a person liked or did not like, one at a time (arXiv 2402.01306)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from llamafactory.hparams.section import option
from llamafactory.train.preference_options import GROUP, PreferenceOptions
from llamafactory.train.stage import LossOutput, Models, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from llamafactory.data.answer_batch import AnswerBatch


class Options(PreferenceOptions):
    """The keys of stage kto."""

    kto_chosen_weight: float = option(1.0, "Weight of desirable answers.", group=GROUP, ge=0)
    kto_rejected_weight: float = option(1.0, "Weight of undesirable answers.", group=GROUP, ge=0)


def prepare(models: Models, batch: AnswerBatch, options: Options) -> tuple[Tensor, AnswerBatch]:
    """Sum of the log ratios of mismatched answers, and their number: `[2]`; the batch has its reference afterwards.

    The policy's pass runs the prompt `p` anew, although the loss runs it too. One pass with gradients would carry the
    mismatched answer `m` through the backward as well: the work of 3p + 3a + 3m tokens in place of 4p + 3a + m, which
    is more wherever answers are longer than half their prompt. And the losses of a step need this sum over all batches
    of it, so that the graphs of all of them would have to be kept until then.
    """
    import torch

    from llamafactory.train.answers import per_answer, policy_logps

    other = batch.mismatched
    if other is None:
        raise ValueError("a batch of stage kto needs mismatched answers")
    own_reference, reference = _references(models, batch, other)
    ratios = per_answer(policy_logps(models, other) - reference, other)
    sums = torch.stack([(ratios * other.group_weights).sum(), other.group_weights.sum()])
    return sums, replace(batch, reference_logps=own_reference, both=None)


def _references(models: Models, batch: AnswerBatch, other: AnswerBatch) -> tuple[Tensor, Tensor]:
    """Log-probabilities under the reference of judged and of mismatched answers; flat, their prompts run once."""
    import torch

    from llamafactory.train.answers import reference_logps

    if batch.both is None or batch.reference_logps is not None:
        return reference_logps(models, batch), reference_logps(models, other)
    order = torch.argsort(batch.both.owners % 2, stable=True)  # each judged answer stands before its mismatched one
    own, mismatched = reference_logps(models, batch.both)[order].split([batch.num_targets, other.num_targets])
    return own, mismatched


def loss(models: Models, batch: AnswerBatch, options: Options) -> LossOutput:
    """Sum of the answers' losses (divided later by the global number of judged answers)."""
    import torch

    from llamafactory.train.answers import averaged, per_answer, policy_logps, reference_logps
    from llamafactory.train.preference import Answers, kto_losses

    if batch.step_sums is None or batch.is_desirable is None:
        raise ValueError("a batch of stage kto needs judgements and the step's sums")
    reference = per_answer(reference_logps(models, batch), batch)
    logps = per_answer(policy_logps(models, batch), batch)
    answers = Answers(logps=logps, lengths=batch.lengths, ref_logps=reference)
    kl = reference_point(batch.step_sums)
    weights = (options.kto_chosen_weight, options.kto_rejected_weight)
    losses = kto_losses(answers.ratios, batch.is_desirable, beta=options.pref_beta, kl=kl, weights=weights)
    if options.pref_ftx:
        losses = losses - options.pref_ftx * torch.where(batch.is_desirable, answers.mean_logps, 0.0)
    metrics = {"kl": averaged(kl.expand_as(losses), batch.group_weights)}
    for name, mask in (("chosen", batch.is_desirable), ("rejected", ~batch.is_desirable)):
        share = mask * batch.group_weights
        metrics[f"rewards/{name}"] = averaged(options.pref_beta * answers.ratios, share)
        metrics[f"logps/{name}"] = averaged(answers.logps, share)
        metrics[f"logps_per_token/{name}"] = averaged(answers.mean_logps, share)
        metrics[f"change_per_token/{name}"] = averaged(answers.ratios / batch.lengths.clamp(min=1), share)
        metrics[f"length/{name}"] = averaged(batch.lengths, share)
    return LossOutput(loss_sum=(losses * batch.group_weights).sum(), num_units=batch.num_groups, metrics=metrics)


def reference_point(step_sums: Tensor) -> Tensor:
    """The paper's `z0`: mean log ratio of mismatched answers over the whole optimizer step, at least 0."""
    return (step_sums[0] / step_sums[1].clamp(min=1)).clamp(min=0).float()


def summarise(averages: Mapping[str, float]) -> dict[str, float]:
    """Margins and length gap, which are differences of averages over different answers."""
    found: dict[str, float] = {}
    for name, pair in (("rewards/margins", "rewards"), ("length_gap", "length")):
        if f"{pair}/chosen" in averages and f"{pair}/rejected" in averages:
            found[name] = averages[f"{pair}/chosen"] - averages[f"{pair}/rejected"]
    return found


STAGE = Stage(
    name="kto", view="feedback", loss=loss, prepare=prepare, prepares=lambda options: True,
    needs_reference=lambda options: True, summarise=summarise,
)  # fmt: skip
