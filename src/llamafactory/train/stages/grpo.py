"""GRPO: answers of the policy itself, each compared with the other answers to the same prompt.

Variants by option: grpo (arXiv 2402.03300), dr_grpo (2503.20783), dapo (2503.14476), gspo (2507.18071), rloo
(2402.14740).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from llamafactory.hparams.section import option
from llamafactory.train.rewards.options import RewardOptions
from llamafactory.train.stage import LossOutput, Models, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from llamafactory.train.experience import Experience, ExperienceBatch
    from llamafactory.train.group_loss import GroupRules
    from llamafactory.train.rollout_rules import Judged, Played, RolloutRules

_GROUP = "GRPO"


class Options(RewardOptions):
    """The keys of stage grpo. Those that are null follow `grpo_variant`."""

    num_generations: int = option(8, "Answers to each prompt that are compared with each other.", group=_GROUP, ge=2)
    grpo_variant: Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo"] = option(
        "grpo", "Which paper's choices the other keys follow.", group=_GROUP
    )
    grpo_beta: float | None = option(
        None, "Weight of the KL to the model before training; 0 needs no reference.", group=_GROUP, ge=0
    )
    grpo_clip_low: float | None = option(None, "The ratio is clipped below 1 minus this.", group=_GROUP, gt=0, le=1)
    grpo_clip_high: float | None = option(None, "The ratio is clipped above 1 plus this.", group=_GROUP, gt=0)
    grpo_scale: Literal["group", "step", "none"] | None = option(
        None, "Advantages are divided by the deviation of rewards in their group, in the step, or not.", group=_GROUP
    )
    grpo_average: Literal["answer", "token", "limit"] | None = option(
        None,
        "The loss is a mean over answers of their token means, over all tokens, or a sum over max_new_tokens.",
        group=_GROUP,
    )
    grpo_epochs: int = option(1, "Passes over each rollout.", group=_GROUP, ge=1)
    grpo_buffer_size: int = option(1, "Optimizer steps that a pass over a rollout is split into.", group=_GROUP, ge=1)
    dynamic_sampling: int | None = option(
        None, "How often prompts whose answers all earn the same are replaced in a rollout.", group=_GROUP, ge=0
    )
    overlong_buffer: int | None = option(
        None, "Tokens before max_new_tokens in which a penalty for length grows from 0 to 1.", group=_GROUP, ge=1
    )
    mask_truncated: bool = option(False, "Leave answers out that max_new_tokens cut off.", group=_GROUP)
    rollout_correction: float = option(
        2.0, "Largest weight of a token whose generator and trainer disagree; 0 for no correction.", group=_GROUP, ge=0
    )
    rollout_batch_size: int = option(64, "Answers that are generated at once.", group=_GROUP, ge=1)
    ref_model: str | None = option(
        None, "Reference model; null takes the model as it is before training.", group=_GROUP
    )
    ref_model_adapters: tuple[str, ...] = option((), "Adapters that are merged into ref_model.", group=_GROUP)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What a paper chose."""

    ratio: Literal["token", "mean", "sum"] = "token"
    average: Literal["answer", "token", "limit"] = "answer"
    baseline: Literal["group", "others"] = "group"
    scale: Literal["group", "step", "none"] = "group"
    low: float = 0.2
    high: float = 0.2
    beta: float = 0.04
    redraws: int = 0


VARIANTS = {
    "grpo": Variant(),
    "dr_grpo": Variant(average="limit", scale="none", beta=0.0),
    "dapo": Variant(average="token", high=0.28, beta=0.0, redraws=3),
    "gspo": Variant(ratio="mean", low=3e-4, high=4e-4, beta=0.0),
    "rloo": Variant(ratio="sum", baseline="others", scale="none", beta=0.05),
}


def variant_of(options: Options) -> Variant:
    """The variant with the keys that were set."""
    given = {
        "beta": options.grpo_beta, "low": options.grpo_clip_low, "high": options.grpo_clip_high,
        "scale": options.grpo_scale, "average": options.grpo_average, "redraws": options.dynamic_sampling,
    }  # fmt: skip
    return replace(VARIANTS[options.grpo_variant], **{key: value for key, value in given.items() if value is not None})


def group_rules(options: Options) -> GroupRules:
    """The loss; RLOO has its KL in the reward."""
    from llamafactory.train.group_loss import GroupRules

    chosen = variant_of(options)
    return GroupRules(
        ratio=chosen.ratio, low=chosen.low, high=chosen.high, average=chosen.average,
        beta=0.0 if chosen.ratio == "sum" else chosen.beta, correction=options.rollout_correction,
    )  # fmt: skip


def needs_reference(options: Options) -> bool:
    """Whether a reference is run."""
    return variant_of(options).beta > 0


def loss(models: Models, batch: ExperienceBatch, options: Options) -> LossOutput:
    """Sum of the losses of sampled tokens or answers (divided later by the step's units, see `rollout`)."""
    from llamafactory.train.answers import averaged, reference_logps
    from llamafactory.train.group_loss import group_loss_terms
    from llamafactory.train.logprob import token_logprobs
    from llamafactory.train.spread import spread_of

    logps = token_logprobs(models.policy, batch, models.plan, temperature=models.temperature)
    reference = reference_logps(models, batch) if needs_reference(options) else None
    old = logps.detach() if batch.old is None else batch.old
    if batch.advantages is None:
        raise ValueError("a batch of stage grpo needs advantages")
    first = batch.places == 0
    terms = group_loss_terms(
        logps, old, owners=batch.owners, num_answers=batch.num_answers, advantages=batch.advantages[first],
        reference=reference, sampler=batch.sampler, rules=group_rules(options), weights=batch.weights,
    )  # fmt: skip
    counted = batch.weights[batch.owners]
    weights = batch.weights if terms.ratios.shape == batch.weights.shape else counted
    gap = (old - batch.sampler).abs()
    metrics = {
        "ratio": averaged(terms.ratios, weights),
        "ratio_off": averaged((terms.ratios - 1).abs(), weights),
        "clipped": averaged(terms.clipped.float(), weights),
        "logp_gap/mean": averaged(gap, counted),
        "logp_gap/over_0.1": averaged((gap > 0.1).float(), counted),
    }
    if terms.kl is not None:
        metrics["kl"] = averaged(terms.kl, counted)
    moved = {name: values.to(logps.device) for name, values in batch.rollout_metrics.items()}
    return LossOutput(
        loss_sum=terms.losses.sum(),
        num_units=batch.num_counted,
        metrics={**metrics, **moved},
        spreads={"logp_gap": spread_of(gap, counted)},
    )


def rollout(options: Options) -> RolloutRules:
    """How rollouts are made."""
    from llamafactory.train.rollout_rules import RolloutRules

    chosen = variant_of(options)
    units: dict[str, Callable[[int, int, int], int]] = {
        "answer": lambda answers, tokens, limit: answers,
        "token": lambda answers, tokens, limit: tokens,
        "limit": lambda answers, tokens, limit: answers * limit,
    }
    in_reward = chosen.ratio == "sum" and chosen.beta > 0
    return RolloutRules(
        group_size=options.num_generations,
        num_epochs=options.grpo_epochs,
        num_parts=options.grpo_buffer_size,
        num_redraws=chosen.redraws,
        needs_old=options.grpo_epochs * options.grpo_buffer_size > 1 or in_reward,
        needs_reference=needs_reference(options),
        num_units=units["answer" if chosen.ratio == "sum" else chosen.average],
        judge=partial(judge, options),
    )


def judge(
    options: Options,
    played: Played,
    experiences: Sequence[Experience],
    state: Mapping[str, Any],
    total: Callable[[Tensor], Tensor],
) -> Judged:
    """Advantages of each answer, the same for all its tokens."""
    import numpy as np
    import torch

    from llamafactory.train import rl
    from llamafactory.train.rollout_rules import Judged, as_metric

    chosen = variant_of(options)
    rewards = torch.from_numpy(played.rewards).clone()
    metrics: dict[str, Tensor] = {}
    if options.overlong_buffer:
        lengths = torch.from_numpy(played.lengths).double()
        penalty = rl.overlong_penalty(lengths, limit=played.limit, buffer=min(options.overlong_buffer, played.limit))
        metrics["overlong_penalty"] = as_metric(penalty.numpy())
        rewards = rewards + penalty
    if chosen.ratio == "sum" and chosen.beta > 0:
        kl = total(_answer_kl(experiences, rewards.shape))
        metrics["kl"] = as_metric(kl.numpy())
        rewards = rewards - chosen.beta * kl
    moments = rl.moments(rewards)
    table = rl.group_advantages(rewards, baseline=chosen.baseline, spread=chosen.scale, step_moments=moments)
    weights = played.stopped.astype(np.float64) if options.mask_truncated else np.ones(rewards.shape)
    judged = [
        replace(
            one,
            advantages=np.repeat(table[one.place].numpy(), one.lengths).astype(np.float32),
            weights=weights[one.place].astype(np.float32),
        )
        for one in experiences
    ]
    return Judged(experiences=judged, weights=weights, metrics=metrics)


def _answer_kl(experiences: Sequence[Experience], shape: Any) -> Tensor:
    """This process's part of the table of log ratios of policy and reference of whole answers."""
    import numpy as np
    import torch

    table = torch.zeros(shape, dtype=torch.float64)
    for one in experiences:
        if one.old is None or one.reference is None:
            raise ValueError("the KL of an answer needs both log-probabilities")
        starts = np.cumsum([0, *one.lengths[:-1]])
        table[one.place] = torch.from_numpy(np.add.reduceat((one.old - one.reference).astype(np.float64), starts))
    return table


STAGE = Stage(name="grpo", view="prompts", loss=loss, needs_reference=needs_reference, rollout=rollout)
