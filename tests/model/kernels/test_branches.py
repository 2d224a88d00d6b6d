"""Attention over sequences and prefix trees is that of every path by itself, for values and gradients, in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from llamafactory.model.kernels.branches import Rules, attend, attend_back

HEADS, KV_HEADS, WIDTH, SCALING = 4, 2, 8, 0.3
SIZE = st.integers(0, 9)
PARTS = st.lists(st.integers(1, 9) | st.tuples(SIZE, SIZE, SIZE, SIZE) | st.tuples(SIZE, SIZE), min_size=1, max_size=4)


def paths_of(parts):
    """Places of the tokens of every path through the parts, and which of them belong to that path first."""
    start = 0
    for part in parts:
        prefix, *branches = (0, part) if isinstance(part, int) else part
        stem, end = list(range(start, start + prefix)), start + prefix
        for number, size in enumerate(branches):
            yield [*stem, *range(end, end + size)], prefix if number else 0
            end += size
        start = end


def one_by_one(states, parts, window):
    """Every path alone, its prefix computed again, with plain matrix products."""
    q, k, v = states
    mixed = torch.zeros_like(q)
    norms = q.new_zeros(q.shape[:2])
    for path, first in paths_of(parts):
        own = [state[path].transpose(0, 1) for state in (q, k, v)]
        queries, keys, values = own[0], *(state.repeat_interleave(HEADS // KV_HEADS, 0) for state in own[1:])
        places = torch.arange(len(path))
        distance = places[:, None] - places
        hidden = (distance < 0) | (distance >= (window or len(path) + 1))
        scores = (queries @ keys.transpose(1, 2) * SCALING).masked_fill(hidden, float("-inf"))
        new = path[first:]
        mixed = mixed.index_put(
            (torch.tensor(new, dtype=torch.long),), (F.softmax(scores, -1) @ values)[:, first:].transpose(0, 1)
        )
        norms[new] = scores.logsumexp(-1).T[first:].detach()
    return mixed.flatten(1), norms


@settings(deadline=None, max_examples=60)
@given(parts=PARTS, window=st.none() | st.integers(1, 12), seed=st.integers(0, 999))
def test_values_and_gradients_are_those_of_each_path_alone(parts, window, seed):
    time = sum(part if isinstance(part, int) else sum(part) for part in parts)
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(time, *shape, generator=generator, dtype=torch.float64)

    states = tuple(drawn(heads, WIDTH).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS))
    grad = drawn(HEADS * WIDTH)
    rules = Rules(parts=parts, scaling=SCALING, window=window)
    with torch.no_grad():
        mixed, norms = attend(*states, rules)
        found = attend_back(grad, states, mixed, norms, rules)
    expected, normalisers = one_by_one(states, parts, window)
    torch.testing.assert_close(mixed, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norms, normalisers, rtol=1e-10, atol=1e-12)
    if time:
        for ours, theirs in zip(found, torch.autograd.grad(expected, states, grad), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
