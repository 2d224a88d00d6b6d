"""The arithmetic of reinforcement learning: advantages, ratios, clipped losses, KL. Functions of tensors alone.

Tokens of all answers lie end to end; `owners` says which answer a token belongs to. What this file never does: run a
model, sample, or divide a loss by a count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Baseline: TypeAlias = Literal["group", "others"]
Spread: TypeAlias = Literal["group", "step", "none"]
Estimator: TypeAlias = Literal["k1", "k2", "k3"]

STD_FLOOR = 1e-4
"""Added to a standard deviation that rewards are divided by, as in TRL."""


def group_advantages(rewards: Tensor, *, baseline: Baseline, spread: Spread, step_moments: Tensor) -> Tensor:
    """How much better each answer is than the others to the same prompt.

    Args:
        rewards: `[prompts, group]`.
        baseline: `group` subtracts the group's mean (arXiv 2402.03300, eq. in 4.1.2), `others` the mean of the other
            answers (RLOO, arXiv 2402.14740, eq. 6).
        spread: divides by the standard deviation of the group or of the step, or by nothing (arXiv 2503.20783).
        step_moments: `moments` of all rewards of the step, over all ranks.

    Returns:
        `[prompts, group]`. A group whose rewards are all equal gets zeros.
    """
    size = rewards.shape[1]
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if baseline == "others":
        centred = centred * (size / max(1, size - 1))  # r - mean of the others
    if spread == "none":
        return centred
    if spread == "group":
        deviation = rewards.std(dim=1, keepdim=True) if size > 1 else torch.zeros_like(rewards)
    else:
        deviation = variance(step_moments).sqrt().to(rewards.dtype)
    return centred / (deviation + STD_FLOOR)


def is_flat(rewards: Tensor) -> Tensor:
    """Which groups of `[prompts, group]` rewards teach nothing, all answers earning the same: bool `[prompts]`."""
    return (rewards.amax(dim=1) - rewards.amin(dim=1)) <= 1e-8


def overlong_penalty(lengths: Tensor, *, limit: int, buffer: int) -> Tensor:
    """DAPO's soft punishment of long answers (arXiv 2503.14476, eq. 13): 0, then falling to -1 at the limit.

    Args:
        lengths: tokens of each answer.
        limit: `max_new_tokens`.
        buffer: tokens before the limit in which the penalty grows.

    Returns:
        Values in [-1, 0], of the shape of `lengths`.
    """
    return ((limit - buffer - lengths) / buffer).clamp(min=-1.0, max=0.0)


def log_ratios(logps: Tensor, old_logps: Tensor, owners: Tensor, num_answers: int, *, level: str) -> Tensor:
    """Log of how much likelier the policy makes each token (or answer) than the policy that sampled it.

    Args:
        logps: `[targets]`, with gradient.
        old_logps: `[targets]`.
        owners: int64 `[targets]`.
        num_answers: answers there are.
        level: `token`; `mean` of an answer's tokens (GSPO, arXiv 2507.18071, eq. 7); `sum` over them (RLOO).

    Returns:
        `[targets]` for `token`, else `[answers]`.
    """
    ratios = logps - old_logps
    if level == "token":
        return ratios
    sums = ratios.new_zeros(num_answers).index_add(0, owners, ratios)
    if level == "sum":
        return sums
    return sums / counts(owners, num_answers).clamp(min=1)


def counts(owners: Tensor, num_answers: int) -> Tensor:
    """Tokens of each answer, float32 `[answers]`."""
    return torch.bincount(owners, minlength=num_answers).float()


def clipped_policy_losses(ratios: Tensor, advantages: Tensor, *, low: float, high: float) -> Tensor:
    """PPO's pessimistic surrogate (arXiv 1707.06347, eq. 7), with DAPO's two bounds: `1 - low` and `1 + high`."""
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)


def is_clipped(ratios: Tensor, advantages: Tensor, *, low: float, high: float) -> Tensor:
    """Where the bound is active, so that no gradient flows: bool, of the shape of `ratios`."""
    return ((ratios < 1 - low) & (advantages < 0)) | ((ratios > 1 + high) & (advantages > 0))


def clipped_value_losses(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """Half the squared error of the value, or of the value held within `clip` of the old one, whichever is larger."""
    held = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2)


def kl_estimates(logps: Tensor, reference: Tensor, *, estimator: Estimator) -> Tensor:
    """KL of policy and reference at sampled tokens (Schulman, joschu.net/blog/kl-approx.html).

    `k1` is unbiased and of either sign, `k2` half its square, `k3` unbiased and never negative.
    """
    difference = logps - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    return torch.exp(-difference) - 1 + difference


def discounted_advantages(rewards: Tensor, values: Tensor, owners: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), each answer a trajectory that ends.

    Args:
        rewards: `[targets]`.
        values: `[targets]`, of the state that each token was chosen in.
        owners: int64 `[targets]`; the tokens of an answer are neighbours.
        gamma: discount.
        lam: lambda.

    Returns:
        `[targets]`; returns are these plus the values.
    """
    if not len(rewards):
        return rewards
    num_answers = int(owners[-1]) + 1
    lengths = torch.bincount(owners, minlength=num_answers)
    starts = lengths.cumsum(0) - lengths
    places = torch.arange(len(owners), device=owners.device) - starts[owners]
    width = int(lengths.max())
    table = rewards.new_zeros(2, num_answers, width + 1)
    table[0, owners, places] = rewards
    table[1, owners, places] = values
    advantages = torch.zeros_like(table[0])
    for place in reversed(range(width)):
        delta = table[0, :, place] + gamma * table[1, :, place + 1] - table[1, :, place]
        advantages[:, place] = delta + gamma * lam * advantages[:, place + 1]
    return advantages[owners, places]


def moments(values: Tensor) -> Tensor:
    """Number, sum and sum of squares, float64 `[3]`: these add up over ranks."""
    wide = values.detach().double()
    return torch.stack([wide.new_tensor(wide.numel()), wide.sum(), (wide**2).sum()])


def variance(sums: Tensor) -> Tensor:
    """Unbiased variance from `moments`; 0 below two values."""
    count, total, squares = sums
    return ((squares - total**2 / count.clamp(min=1)) / (count - 1).clamp(min=1)).clamp(min=0)


def whiten(values: Tensor, sums: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Brings values to unit variance, and to mean zero unless the mean is to stay.

    Args:
        values: any shape.
        sums: `moments` of what is whitened together, over all ranks.
        shift_mean: False keeps the mean.
    """
    mean = (sums[1] / sums[0].clamp(min=1)).to(values.dtype)
    scaled = (values - mean) * torch.rsqrt(variance(sums) + 1e-8).to(values.dtype)
    return scaled if shift_mean else scaled + mean


@dataclass(frozen=True, kw_only=True, slots=True)
class KLControl:
    """Proportional controller of the KL coefficient (arXiv 1909.08593, 2.2).

    Attributes:
        coefficient: now.
        target: KL of an answer that is steered to, in nats.
        horizon: answers over which the coefficient may change by a fifth.
    """

    coefficient: float
    target: float
    horizon: float = 10_000.0

    def after(self, kl: float, num_answers: int) -> float:
        """The coefficient after a step whose answers had `kl` nats each on average."""
        error = min(0.2, max(-0.2, kl / self.target - 1.0))
        return self.coefficient * (1 + error * num_answers / self.horizon)
