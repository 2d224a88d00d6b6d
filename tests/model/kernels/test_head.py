"""The chunked head equals plain cross-entropy over all logits, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from llamafactory.model.kernels.head import ChunkedCrossEntropy, ChunkedLogProbs
from llamafactory.model.kernels.product import times, times_transposed


def capped_logits(rows, weight, cap):
    logits = rows @ weight.T
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain_loss(rows, weight, targets, row_weights, cap):
    losses = F.cross_entropy(capped_logits(rows, weight, cap), targets, reduction="none")
    return (losses if row_weights is None else losses * row_weights).sum()


def plain_logprobs(rows, weight, targets, cap):
    return torch.log_softmax(capped_logits(rows, weight, cap), -1).gather(1, targets[:, None]).squeeze(1)


def with_gradients(compute, rows, weight, frozen, upstream):
    rows, weight = rows.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    value = compute(rows, weight)
    (value * upstream).sum().backward()
    return value.detach().double(), rows.grad, weight.grad


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one.double(), other.double(), rtol=2e-6, atol=2e-6)


CASES = {
    "count": st.integers(0, 40),
    "chunk": st.integers(1, 50),
    "frozen": st.booleans(),
    "cap": st.sampled_from([None, 1.5]),
    "seed": st.integers(0, 2**16),
}


@given(weighted=st.booleans(), **CASES)
@settings(max_examples=60)
def test_sum_and_gradients_equal_the_plain_formula(count, chunk, weighted, frozen, cap, seed):
    torch.manual_seed(seed)
    rows, weight = torch.randn(count, 6, dtype=torch.float64), torch.randn(17, 6, dtype=torch.float64)
    targets = torch.randint(0, 17, (count,))
    row_weights = torch.rand(count) if weighted else None
    ours = with_gradients(
        lambda r, w: ChunkedCrossEntropy.apply(r, w, targets, row_weights, chunk, cap), rows, weight, frozen, 0.37
    )
    theirs = with_gradients(lambda r, w: plain_loss(r, w, targets, row_weights, cap), rows, weight, frozen, 0.37)
    assert_same(ours, theirs)


@given(**CASES)
@settings(max_examples=60)
def test_log_probabilities_and_gradients_equal_the_plain_formula(count, chunk, frozen, cap, seed):
    torch.manual_seed(seed)
    rows, weight = torch.randn(count, 6, dtype=torch.float64), torch.randn(17, 6, dtype=torch.float64)
    targets, upstream = torch.randint(0, 17, (count,)), torch.randn(count)
    ours = with_gradients(
        lambda r, w: ChunkedLogProbs.apply(r, w, targets, chunk, cap), rows, weight, frozen, upstream
    )
    theirs = with_gradients(lambda r, w: plain_logprobs(r, w, targets, cap), rows, weight, frozen, upstream)
    assert_same(ours, theirs)


def test_large_logits_do_not_overflow():
    rows, weight = torch.full((2, 1), 100.0), torch.tensor([[3.0], [-3.0]])
    targets = torch.tensor([0, 1])
    found = ChunkedLogProbs.apply(rows, weight, targets, 256)
    torch.testing.assert_close(found, torch.tensor([0.0, -600.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_are_those_of_torch(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(33, 20).to(dtype), torch.randn(47, 20).to(dtype)
    torch.testing.assert_close(times_transposed(x, weight), x @ weight.T)
    torch.testing.assert_close(times(x @ weight.T, weight), x @ weight.T @ weight)
