"""Preference optimisation on pairs: DPO and its relatives (`pref_loss`)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from llamafactory.hparams.section import option
from llamafactory.train.preference_options import GROUP, PreferenceOptions
from llamafactory.train.stage import LossOutput, Models, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from llamafactory.data.answer_batch import AnswerBatch
    from llamafactory.train.preference import Answers

_WITHOUT_REFERENCE = ("orpo", "simpo")


class Options(PreferenceOptions):
    """The keys of stage dpo."""

    pref_loss: Literal["sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo"] = option(
        "sigmoid", "Loss on preference pairs; orpo and simpo need no reference model.", group=GROUP
    )
    pref_bco_weight: float = option(
        0.0, "Weight of the BCO loss, mixed in as (loss + weight x BCO) / (1 + weight).", group=GROUP, ge=0
    )
    dpo_label_smoothing: float = option(
        0.0, "Share of pairs that are labelled the wrong way round; only for pref_loss sigmoid.", group=GROUP,
        ge=0, lt=0.5,
    )  # fmt: skip
    simpo_gamma: float = option(0.5, "Target margin of pref_loss simpo.", group=GROUP, ge=0)
    ld_alpha: float | None = option(
        None, "Weight of tokens past the shorter answer's length (LD-DPO); null or 1 counts all alike.", group=GROUP,
        ge=0, le=1,
    )  # fmt: skip


def needs_reference(options: Options) -> bool:
    """Whether the loss compares with a reference."""
    return options.pref_loss not in _WITHOUT_REFERENCE


def prepares(options: Options) -> bool:
    """Whether the loss needs a statistic of the whole optimizer step."""
    return options.pref_loss == "kto_pair" or (options.pref_bco_weight > 0 and needs_reference(options))


def prepare(models: Models, batch: AnswerBatch, options: Options) -> tuple[Tensor, AnswerBatch]:
    """Sums of the log ratios of chosen and of rejected answers, and the number of pairs: `[3]`."""
    import torch

    from llamafactory.train.answers import policy_logps, reference_logps

    known = replace(batch, reference_logps=reference_logps(models, batch))
    chosen, rejected, _ = _sides(policy_logps(models, batch), known, options)
    weights = batch.group_weights
    sums = torch.stack([(chosen.ratios * weights).sum(), (rejected.ratios * weights).sum(), weights.sum()])
    return sums, known


def loss(models: Models, batch: AnswerBatch, options: Options) -> LossOutput:
    """Sum of the pairs' losses (divided later by the global number of pairs)."""
    from llamafactory.train.answers import policy_logps, reference_logps

    if needs_reference(options):
        batch = replace(batch, reference_logps=reference_logps(models, batch))
    chosen, rejected, plain = _sides(policy_logps(models, batch), batch, options)
    losses = pair_losses(chosen, rejected, options, batch.step_sums)
    if options.pref_ftx:
        losses = losses - options.pref_ftx * plain[0].mean_logps
    return LossOutput(
        loss_sum=(losses * batch.group_weights).sum(),
        num_units=batch.num_groups,
        metrics=_metrics(*plain, options, batch.group_weights),
    )


def pair_losses(chosen: Answers, rejected: Answers, options: Options, step_sums: Tensor | None = None) -> Tensor:
    """The preference loss of each pair, `[pairs]`, without `pref_ftx`."""
    from llamafactory.train import preference

    beta = options.pref_beta
    simple = {
        "sigmoid": lambda: preference.sigmoid_losses(
            chosen, rejected, beta=beta, label_smoothing=options.dpo_label_smoothing
        ),
        "hinge": lambda: preference.hinge_losses(chosen, rejected, beta=beta),
        "ipo": lambda: preference.ipo_losses(chosen, rejected, beta=beta),
        "orpo": lambda: preference.orpo_losses(chosen, rejected, beta=beta),
        "simpo": lambda: preference.simpo_losses(chosen, rejected, beta=beta, gamma=options.simpo_gamma),
        "kto_pair": lambda: preference.kto_pair_losses(chosen, rejected, beta=beta, kl=_means(step_sums)),
    }
    losses = simple[options.pref_loss]()
    weight = options.pref_bco_weight
    if weight and needs_reference(options):
        delta = beta * _means(step_sums).mean()
        losses = (losses + weight * preference.bco_losses(chosen, rejected, beta=beta, delta=delta)) / (1 + weight)
    return losses


def _means(step_sums: Tensor | None) -> Tensor:
    """Mean log ratio of chosen and of rejected answers over the optimizer step, `[2]`."""
    if step_sums is None:
        raise ValueError("the step's sums are missing: prepare was not run")
    return step_sums[:2] / step_sums[2].clamp(min=1)


def _sides(logps: Tensor, batch: AnswerBatch, options: Options) -> tuple[Answers, Answers, tuple[Answers, Answers]]:
    """Chosen and rejected answers as the loss sees them, and both without LD-DPO's weights."""
    from llamafactory.train.preference import shorten_tails

    plain = _split(logps, batch)
    if options.ld_alpha is None or options.ld_alpha == 1:
        return *plain, plain

    def weighted(values: Tensor) -> Tensor:
        return shorten_tails(values, batch.owners, batch.places, batch.lengths, alpha=options.ld_alpha or 0.0)

    reference = batch.reference_logps
    shortened = replace(batch, reference_logps=None if reference is None else weighted(reference))
    return *_split(weighted(logps), shortened), plain


def _split(logps: Tensor, batch: AnswerBatch) -> tuple[Answers, Answers]:
    from llamafactory.train.answers import per_answer
    from llamafactory.train.preference import Answers

    sums = per_answer(logps, batch)
    known = None if batch.reference_logps is None else per_answer(batch.reference_logps, batch)
    sides = [
        Answers(
            logps=sums[side::2],
            lengths=batch.lengths[side::2],
            ref_logps=None if known is None else known[side::2],
        )
        for side in (0, 1)
    ]
    return sides[0], sides[1]


def _metrics(chosen: Answers, rejected: Answers, options: Options, weights: Tensor) -> dict[str, Tensor]:
    """The compatible names, then ours: change of log-probability per token against the reference, length gap."""
    import torch
    from torch.nn import functional as F

    from llamafactory.train.answers import averaged
    from llamafactory.train.preference import log_odds

    with torch.no_grad():
        compares = needs_reference(options)
        shown = [side.ratios if compares else side.mean_logps for side in (chosen, rejected)]
        rewards = [options.pref_beta * values for values in shown]
        right = (rewards[0] > rewards[1]).float()
        found = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/accuracies": right,
            "rewards/margins": rewards[0] - rewards[1],
            "logps/chosen": chosen.logps,
            "logps/rejected": rejected.logps,
            "logps_per_token/chosen": chosen.mean_logps,
            "logps_per_token/rejected": rejected.mean_logps,
            "length_gap": chosen.lengths - rejected.lengths,
        }
        if compares:
            for name, side in (("chosen", chosen), ("rejected", rejected)):
                found[f"change_per_token/{name}"] = side.ratios / side.lengths.clamp(min=1)
        if options.pref_loss == "orpo":
            found["sft_loss"] = -chosen.mean_logps
            found["odds_ratio_loss"] = -F.logsigmoid(log_odds(chosen, rejected))
        return {name: averaged(values, weights) for name, values in found.items()}


STAGE = Stage(name="dpo", view="pairs", loss=loss, prepare=prepare, prepares=prepares, needs_reference=needs_reference)
