"""PPO: answers of the policy itself, a reward at their end, a KL at each token, and a value head (arXiv 1707.06347).

As in RLHF (arXiv 1909.08593, 2203.02155): the coefficient of the KL is steered towards a target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from llamafactory.hparams.section import option
from llamafactory.train.rewards.options import RewardOptions
from llamafactory.train.stage import LossOutput, Models, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from llamafactory.model.valuehead import ModelWithValueHead
    from llamafactory.train.experience import Experience, ExperienceBatch
    from llamafactory.train.rollout_rules import Judged, Played, RolloutRules

_GROUP = "PPO"
CLIP = 0.2
VALUE_WEIGHT = 0.1
LAMBDA = 0.95


class Options(RewardOptions):
    """The keys of stage ppo."""

    ppo_buffer_size: int = option(1, "Optimizer steps that a pass over a rollout is split into.", group=_GROUP, ge=1)
    ppo_epochs: int = option(4, "Passes over each rollout.", group=_GROUP, ge=1)
    ppo_score_norm: bool = option(False, "Scores are centred and scaled by their running moments.", group=_GROUP)
    ppo_target: float = option(6.0, "KL of an answer, in nats, that the KL coefficient steers to.", group=_GROUP, gt=0)
    ppo_whiten_rewards: bool = option(False, "Rewards of tokens are scaled to unit variance.", group=_GROUP)
    ppo_kl_coefficient: float = option(0.2, "KL coefficient before the first rollout.", group=_GROUP, ge=0)
    rollout_batch_size: int = option(64, "Answers that are generated at once.", group=_GROUP, ge=1)
    ref_model: str | None = option(
        None, "Reference model; null takes the model as it is before training.", group=_GROUP
    )
    ref_model_adapters: tuple[str, ...] = option((), "Adapters that are merged into ref_model.", group=_GROUP)


def loss(models: Models, batch: ExperienceBatch, options: Options) -> LossOutput:
    """Sum of the policy's and the value's clipped losses over tokens (divided later by the step's tokens)."""
    import torch

    from llamafactory.train import rl
    from llamafactory.train.answers import averaged
    from llamafactory.train.logprob import state_logprobs, target_states, token_logprobs, unwrap_peft
    from llamafactory.train.spread import spread_of

    policy = cast("ModelWithValueHead", models.policy)
    base = unwrap_peft(policy.pretrained_model)
    states = target_states(base, batch, models.plan)
    values = policy.v_head(states)
    logps = state_logprobs(base, states, batch, models.plan, temperature=models.temperature)
    if logps is None:
        logps = token_logprobs(policy.pretrained_model, batch, models.plan, temperature=models.temperature)
    if batch.old is None or batch.advantages is None or batch.values is None or batch.returns is None:
        raise ValueError("a batch of stage ppo needs advantages, values and returns")
    weights = batch.weights[batch.owners]
    ratios = torch.exp(logps - batch.old)
    policy_losses = rl.clipped_policy_losses(ratios, batch.advantages, low=CLIP, high=CLIP)
    value_losses = rl.clipped_value_losses(values, batch.values, batch.returns, clip=CLIP)
    clipped = rl.is_clipped(ratios.detach(), batch.advantages, low=CLIP, high=CLIP)
    gap = (batch.old - batch.sampler).abs()
    metrics = {
        "policy_loss": averaged(policy_losses, weights),
        "value_loss": averaged(value_losses, weights),
        "ratio": averaged(ratios, weights),
        "ratio_off": averaged((ratios - 1).abs(), weights),
        "clipped": averaged(clipped.float(), weights),
        "logp_gap/mean": averaged(gap, weights),
        "logp_gap/over_0.1": averaged((gap > 0.1).float(), weights),
    }
    moved = {name: pair.to(logps.device) for name, pair in batch.rollout_metrics.items()}
    total = ((policy_losses + VALUE_WEIGHT * value_losses) * weights).sum()
    return LossOutput(
        loss_sum=total,
        num_units=batch.num_targets,
        metrics={**metrics, **moved},
        spreads={"logp_gap": spread_of(gap, weights)},
    )


def rollout(options: Options) -> RolloutRules:
    """How rollouts are made."""
    from llamafactory.train.rollout_rules import RolloutRules

    return RolloutRules(
        group_size=1,
        num_epochs=options.ppo_epochs,
        num_parts=options.ppo_buffer_size,
        needs_old=True,
        needs_reference=True,
        num_units=lambda answers, tokens, limit: tokens,
        judge=partial(judge, options),
        state={"kl_coefficient": options.ppo_kl_coefficient, "scores": [0.0, 0.0, 0.0]},
    )


def judge(
    options: Options,
    played: Played,
    experiences: Sequence[Experience],
    state: Mapping[str, Any],
    total: Callable[[Tensor], Tensor],
) -> Judged:
    """Advantages and returns of each token; all moments are over all ranks."""
    import numpy as np
    import torch

    from llamafactory.train import rl
    from llamafactory.train.rollout_rules import Judged, as_metric

    scores = torch.from_numpy(played.rewards[:, 0]).clone()
    seen = torch.tensor(state["scores"], dtype=torch.float64) + rl.moments(scores)
    if options.ppo_score_norm:
        scores = rl.whiten(scores, seen)
    coefficient = float(state["kl_coefficient"])
    owners = torch.tensor([number for number, one in enumerate(experiences) for _ in one.sampler], dtype=torch.long)
    old, reference, values = (_joined(experiences, name) for name in ("old", "reference", "values"))
    rewards = -coefficient * (old - reference)
    if len(experiences):
        ends = torch.tensor([len(one.sampler) for one in experiences]).cumsum(0) - 1
        rewards[ends] += torch.stack([scores[one.place] for one in experiences]).float()
    if options.ppo_whiten_rewards:
        rewards = rl.whiten(rewards, total(rl.moments(rewards)), shift_mean=False)
    advantages = rl.discounted_advantages(rewards, values, owners, gamma=1.0, lam=LAMBDA)
    returns = advantages + values
    advantages = rl.whiten(advantages, total(rl.moments(advantages)))
    num_answers = len(played.rewards)
    kl = float(total((old - reference).double().sum().reshape(1))) / num_answers
    control = rl.KLControl(coefficient=coefficient, target=options.ppo_target)
    sizes = [len(one.sampler) for one in experiences]
    judged = [
        replace(one, advantages=own.numpy(), returns=goal.numpy())
        for one, own, goal in zip(experiences, advantages.split(sizes), returns.split(sizes), strict=True)
    ]
    return Judged(
        experiences=judged,
        weights=np.ones(played.rewards.shape),
        metrics={"kl": as_metric(np.array([kl])), "kl_coefficient": as_metric(np.array([coefficient]))},
        state={"kl_coefficient": control.after(kl, num_answers), "scores": seen.tolist()},
    )


def _joined(experiences: Sequence[Experience], name: str) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *(getattr(one, name) for one in experiences)]))


STAGE = Stage(
    name="ppo", view="prompts", loss=loss, needs_reference=lambda options: True, has_value_head=True, rollout=rollout
)
