"""Choosing the next token: temperature, top-k and top-p, with randomness that belongs to a row and not to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How completions are made.

    Attributes:
        max_new_tokens: tokens of a completion at most, its stop among them.
        stop_ids: token ids that end a completion.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample from this many likeliest tokens; 0 for all.
        top_p: sample from the fewest likeliest tokens that have this probability together.
    """

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The next token of each row.

    Attributes:
        ids: int64 `[rows]`.
        logps: float32 `[rows]`, log-probability of the token at the sampling temperature among *all* tokens, before
            top-k and top-p: the one that training computes.
        entropies: float32 `[rows]`, of that distribution, in nats.
    """

    ids: Tensor
    logps: Tensor
    entropies: Tensor


def choose_tokens(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Choice:
    """Chooses a token for each row.

    Args:
        logits: `[rows, vocab]`.
        uniform: `[rows]` in [0, 1), the only randomness; not read at temperature 0.
        sampling: see there.
    """
    is_greedy = sampling.temperature == 0
    scaled = logits.float() if is_greedy else logits.float() / sampling.temperature
    logps = torch.log_softmax(scaled, dim=-1)
    probabilities = logps.exp()
    entropies = -(probabilities * logps).nan_to_num(0.0).sum(dim=-1)
    if is_greedy:
        ids = scaled.argmax(dim=-1)
    else:
        kept = keep_likeliest(scaled, top_k=sampling.top_k, top_p=sampling.top_p)
        ids = _inverse_of_cumulative(probabilities if kept is None else probabilities * kept, uniform)
    return Choice(ids=ids, logps=logps.gather(1, ids[:, None]).squeeze(1), entropies=entropies)


def keep_likeliest(logits: Tensor, *, top_k: int, top_p: float) -> Tensor | None:
    """Which tokens may be sampled, by the rules of transformers: bool `[rows, vocab]`, or None for all of them."""
    kept: Tensor | None = None
    if 0 < top_k < logits.shape[-1]:
        kept = logits >= logits.topk(top_k, dim=-1).values[:, -1:]
    if top_p < 1:
        allowed = logits if kept is None else logits.masked_fill(~kept, -torch.inf)
        ordered, places = torch.sort(allowed, dim=-1)
        is_cut = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        is_cut[:, -1] = False
        inside = torch.zeros_like(is_cut).scatter_(1, places, ~is_cut)
        kept = inside if kept is None else inside & kept
    return kept


def _inverse_of_cumulative(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token at which the cumulative weight passes a share of the total."""
    cumulative = weights.to(torch.float32 if weights.device.type == "mps" else torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:]
    wanted = torch.minimum(uniform.to(cumulative)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1)


def row_seed(*parts: int) -> int:
    """A 64-bit seed of a row from what it is: seed of the run, step, prompt, number of the completion."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0])


def uniforms(seeds: Sequence[int] | NDArray[np.uint64], place: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each row at token `place`, from seed and place alone (SplitMix64)."""
    with np.errstate(over="ignore"):
        state = np.asarray(seeds, dtype=np.uint64) + np.uint64(place + 1) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
