"""The loss of group-relative policy optimisation and its relatives, from log-probabilities alone.

One set of rules covers grpo (arXiv 2402.03300), dr_grpo (2503.20783), dapo (2503.14476), gspo (2507.18071) and rloo
(2402.14740); they differ in where the ratio is taken, how it is clipped, and what the sum is divided by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from llamafactory.train import rl

Ratio: TypeAlias = Literal["token", "mean", "sum"]
Average: TypeAlias = Literal["answer", "token", "limit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRules:
    """What tells the variants apart.

    Attributes:
        ratio: of each token, or one for an answer: the mean or the sum over its tokens.
        low: the ratio is clipped below `1 - low`.
        high: the ratio is clipped above `1 + high`.
        beta: weight of the KL to the reference (estimator k3) in the loss of each token; with `sum` it belongs into
            the reward.
        average: `answer` is the mean over answers of their mean token loss; `token` the mean over all tokens; `limit`
            the sum over tokens divided by answers times `max_new_tokens`.
        correction: largest weight of a token whose sampler and trainer disagree (truncated importance sampling); 0
            for none.
    """

    ratio: Ratio = "token"
    low: float = 0.2
    high: float = 0.2
    beta: float = 0.0
    average: Average = "answer"
    correction: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupTerms:
    """The loss in parts.

    Attributes:
        losses: `[targets]` or `[answers]`, whose sum is to be divided by the units of `average`.
        ratios: `[targets]` or `[answers]`, without gradient.
        clipped: bool, of the shape of `ratios`.
        kl: `[targets]` estimates without gradient, or None without a reference.
    """

    losses: Tensor
    ratios: Tensor
    clipped: Tensor
    kl: Tensor | None


def group_loss_terms(
    logps: Tensor,
    old_logps: Tensor,
    *,
    owners: Tensor,
    num_answers: int,
    advantages: Tensor,
    reference: Tensor | None,
    sampler: Tensor,
    rules: GroupRules,
    weights: Tensor | None = None,
) -> GroupTerms:
    """Losses of sampled answers.

    Args:
        logps: `[targets]` under the policy, with gradient.
        old_logps: `[targets]` under the policy that sampled, as the trainer computes them.
        owners: int64 `[targets]`, the answer of each target.
        num_answers: answers there are.
        advantages: `[answers]`.
        reference: `[targets]` under the reference, or None.
        sampler: `[targets]` as the generator computed them.
        rules: of the variant.
        weights: `[answers]`, 0 for an answer that is left out; None for ones.

    Returns:
        See `GroupTerms`.
    """
    log_ratios = rl.log_ratios(logps, old_logps, owners, num_answers, level=rules.ratio)
    ratios = torch.exp(log_ratios)
    kl = None if reference is None else rl.kl_estimates(logps, reference, estimator="k3")
    if rules.ratio == "sum":
        losses = rl.clipped_policy_losses(ratios, advantages, low=rules.low, high=rules.high)
        clipped = rl.is_clipped(ratios, advantages, low=rules.low, high=rules.high)
        losses = losses if weights is None else losses * weights
        return GroupTerms(losses=losses, ratios=ratios.detach(), clipped=clipped, kl=_detached(kl))
    spread_ratios = ratios if rules.ratio == "token" else ratios[owners]
    spread_advantages = advantages[owners]
    losses = rl.clipped_policy_losses(spread_ratios, spread_advantages, low=rules.low, high=rules.high)
    clipped = rl.is_clipped(spread_ratios.detach(), spread_advantages, low=rules.low, high=rules.high)
    if rules.correction:
        losses = losses * torch.exp(old_logps - sampler).clamp(max=rules.correction)
    if rules.beta and kl is not None:
        losses = losses + rules.beta * kl
    if rules.average == "answer":
        losses = losses / rl.counts(owners, num_answers)[owners]
    if weights is not None:
        losses = losses * weights[owners]
    return GroupTerms(losses=losses, ratios=spread_ratios.detach(), clipped=clipped, kl=_detached(kl))


def _detached(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach()
