"""The chunked loss equals plain cross-entropy over all logits, in value and in gradient."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from llamafactory.data.collate import collate_flat, collate_padded
from llamafactory.data.types import IGNORE_INDEX
from llamafactory.model import attention
from llamafactory.train.logprob import ChunkedCrossEntropy, supervised_nll


def plan(fused: bool = True, chunk: int = 5) -> SimpleNamespace:
    return SimpleNamespace(fused_head=fused, loss_chunk_rows=chunk)


def plain_loss(rows, weight, targets, row_weights):
    losses = F.cross_entropy(rows @ weight.T, targets, reduction="none")
    return (losses if row_weights is None else losses * row_weights).sum()


@given(
    count=st.integers(0, 40),
    chunk=st.integers(1, 50),
    weighted=st.booleans(),
    frozen=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_value_and_gradients_equal_the_plain_formula(count, chunk, weighted, frozen, seed):
    torch.manual_seed(seed)
    rows = torch.randn(count, 12, dtype=torch.float64)
    weight = torch.randn(17, 12, dtype=torch.float64)
    targets = torch.randint(0, 17, (count,))
    row_weights = torch.rand(count) if weighted else None
    found = []
    for compute in (lambda r, w: ChunkedCrossEntropy.apply(r, w, targets, row_weights, chunk),
                    lambda r, w: plain_loss(r, w, targets, row_weights)):  # fmt: skip
        r, w = rows.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        value = compute(r, w)
        (value * 0.37).backward()
        found.append((value.detach().double(), r.grad, w.grad))
    for ours, theirs in zip(*found, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_every_gradient_equal_transformers_own(fused, layout, tied, tiny_config, make_examples):
    attention.register()
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        tiny_config(tie_word_embeddings=tied), attn_implementation=attention.NAME, dtype=torch.float32
    )
    examples = make_examples((9, 14, 5))
    batch = collate_flat(examples) if layout == "flat" else collate_padded(examples, pad_id=0)
    supervised_nll(model, batch, plan(fused)).backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros(())
    for example in examples:
        ids = torch.tensor(example.input_ids, dtype=torch.long)[None]
        labels = torch.tensor(example.labels, dtype=torch.long)[None]
        total = total + model(input_ids=ids, labels=labels).loss * example.num_supervised
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            ours[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("fused", [True, False])
def test_a_batch_without_supervised_tokens_stays_attached_to_the_graph(fused, tiny_config, make_examples):
    attention.register()
    model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation=attention.NAME, dtype=torch.float32)
    example = make_examples((6,))[0]
    blank = dataclasses.replace(example, labels=np.full_like(example.labels, IGNORE_INDEX))
    loss = supervised_nll(model, collate_flat([blank]), plan(fused))
    loss.backward()
    assert loss.item() == 0.0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_weights_scale_the_loss_of_their_tokens(tiny_config, make_examples):
    attention.register()
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation=attention.NAME, dtype=torch.float32)
    example = make_examples((12,))[0]
    half = dataclasses.replace(example, weights=np.full(12, 0.5, dtype=np.float32))
    whole, halved = (supervised_nll(model, collate_flat([row]), plan()) for row in (example, half))
    torch.testing.assert_close(halved, whole * 0.5)
