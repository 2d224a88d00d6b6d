"""Preference losses as pure functions of sequence log-probabilities: one number a pair, nothing summed.

All log-probabilities are natural, float32 `[pairs]` (or `[answers]` in `kto_losses`). A *ratio* is the log-probability
under the policy minus that under the reference. What this file never does: run a model, divide by a batch size, or
estimate a statistic over a batch; such statistics come in as arguments, so that a micro-batch cannot change a loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What is known about one side of each pair.

    Attributes:
        logps: sum of the answer's token log-probabilities, `[pairs]`.
        lengths: supervised tokens, float32 `[pairs]`; 0 only where an answer is empty.
        ref_logps: as `logps`, under the reference; None where there is no reference.
    """

    logps: Tensor
    lengths: Tensor
    ref_logps: Tensor | None = None

    @property
    def mean_logps(self) -> Tensor:
        """Log-probability per token; 0 for an empty answer."""
        return self.logps / self.lengths.clamp(min=1)

    @property
    def ratios(self) -> Tensor:
        """Log of policy over reference probability; without a reference, the policy's own."""
        return self.logps if self.ref_logps is None else self.logps - self.ref_logps


def sigmoid_losses(chosen: Answers, rejected: Answers, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7), conservative where labels may be wrong with probability `label_smoothing`."""
    margins = beta * (chosen.ratios - rejected.ratios)
    return -F.logsigmoid(margins) * (1 - label_smoothing) - F.logsigmoid(-margins) * label_smoothing


def hinge_losses(chosen: Answers, rejected: Answers, *, beta: float) -> Tensor:
    """SLiC's hinge on DPO's margin (arXiv 2305.10425)."""
    return torch.relu(1 - beta * (chosen.ratios - rejected.ratios))


def ipo_losses(chosen: Answers, rejected: Answers, *, beta: float) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17, `beta` is tau), on ratios per token, as its authors do."""
    margins = chosen.ratios / chosen.lengths.clamp(min=1) - rejected.ratios / rejected.lengths.clamp(min=1)
    return (margins - 1 / (2 * beta)) ** 2


def orpo_losses(chosen: Answers, rejected: Answers, *, beta: float) -> Tensor:
    """ORPO (arXiv 2403.07691, eqs. 6 and 7, `beta` is lambda): NLL per token and the log odds ratio."""
    return -chosen.mean_logps - beta * F.logsigmoid(log_odds(chosen, rejected))


def log_odds(chosen: Answers, rejected: Answers) -> Tensor:
    """Log of the odds ratio of mean token probabilities."""
    better, worse = chosen.mean_logps, rejected.mean_logps
    return (better - worse) - (_log1mexp(better) - _log1mexp(worse))


def simpo_losses(chosen: Answers, rejected: Answers, *, beta: float, gamma: float) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6): log-probabilities per token, a target margin, no reference."""
    return -F.logsigmoid(beta * (chosen.mean_logps - rejected.mean_logps) - gamma)


def kto_losses(
    ratios: Tensor, is_desirable: Tensor, *, beta: float, kl: Tensor, weights: tuple[float, float]
) -> Tensor:
    """KTO (arXiv 2402.01306, eq. 7).

    Args:
        ratios: log ratios of the answers, `[answers]`.
        is_desirable: bool `[answers]`.
        beta: risk aversion.
        kl: scalar reference point `z0 >= 0`; no gradient flows through it.
        weights: of desirable and undesirable answers.
    """
    kl = kl.detach()
    gains = 1 - torch.sigmoid(beta * (ratios - kl))
    losses = 1 - torch.sigmoid(beta * (kl - ratios))
    return torch.where(is_desirable, weights[0] * gains, weights[1] * losses)


def kto_pair_losses(chosen: Answers, rejected: Answers, *, beta: float, kl: Tensor) -> Tensor:
    """KTO on pairs: each side's reference point is the mean ratio of the other side.

    Args:
        chosen: the preferred answers.
        rejected: the others.
        beta: risk aversion.
        kl: float32 `[2]`, mean ratio of all chosen and of all rejected answers of the step; clamped at 0 here.
    """
    kl = kl.detach().clamp(min=0)
    gains = 1 - torch.sigmoid(beta * (chosen.ratios - kl[1]))
    losses = 1 - torch.sigmoid(beta * (kl[0] - rejected.ratios))
    return (gains + losses) / 2


def bco_losses(chosen: Answers, rejected: Answers, *, beta: float, delta: Tensor) -> Tensor:
    """BCO (arXiv 2404.04656, eq. 8).

    Args:
        chosen: the preferred answers.
        rejected: the others.
        beta: scale of the rewards.
        delta: scalar reward shift, the mean reward so far.
    """
    delta = delta.detach()
    return -F.logsigmoid(beta * chosen.ratios - delta) - F.logsigmoid(-(beta * rejected.ratios - delta))


def shorten_tails(logps: Tensor, owners: Tensor, places: Tensor, lengths: Tensor, *, alpha: float) -> Tensor:
    """LD-DPO (arXiv 2409.06411): tokens past the length of a pair's shorter answer count `alpha`.

    Args:
        logps: float32 `[tokens]`.
        owners: int64 `[tokens]`, the answer of each token; answers 2k and 2k + 1 are a pair.
        places: int64 `[tokens]`, place of the token among its answer's supervised tokens, from 0.
        lengths: supervised tokens of each answer, `[2 * pairs]`.
        alpha: between 0 (tails are ignored) and 1 (DPO).

    Returns:
        Weighted log-probabilities, `[tokens]`.
    """
    shared = lengths.view(-1, 2).amin(dim=1).repeat_interleave(2)
    return torch.where(places < shared[owners], logps, alpha * logps)


def _log1mexp(x: Tensor) -> Tensor:
    """`log(1 - exp(x))` for `x <= 0`, accurate near both ends (Maechler 2012); x is kept off exactly 0."""
    x = x.clamp(max=-1e-7)
    near_zero = x > -0.6931471805599453
    low = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    high = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, low, high)
