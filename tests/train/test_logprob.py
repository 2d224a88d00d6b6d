"""Losses and log-probabilities through a model equal those of transformers, in value and in gradient."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llamafactory.data.collate import collate_flat, collate_padded
from llamafactory.data.types import IGNORE_INDEX
from llamafactory.model import attention
from llamafactory.train.logprob import supervised_nll, token_logprobs


def plan(fused: bool = True, chunk: int = 5) -> SimpleNamespace:
    return SimpleNamespace(fused_head=fused, loss_chunk_rows=chunk, fused_blocks=True)


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


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_token_logprobs_sum_to_the_loss_and_carry_its_gradient(fused, layout, tiny_config, make_examples):
    attention.register()
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation=attention.NAME, dtype=torch.float32)
    examples = make_examples((9, 14, 5))
    batch = collate_flat(examples) if layout == "flat" else collate_padded(examples, pad_id=0)
    found = []
    for total in (supervised_nll(model, batch, plan(fused)), -token_logprobs(model, batch, plan(fused)).sum()):
        model.zero_grad()
        total.backward()
        found.append([total.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_token_logprobs_of_nothing_stay_attached_to_the_graph(tiny_config, make_examples):
    attention.register()
    model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation=attention.NAME, dtype=torch.float32)
    example = make_examples((6,))[0]
    blank = dataclasses.replace(example, labels=np.full_like(example.labels, IGNORE_INDEX))
    found = token_logprobs(model, collate_flat([blank]), plan())
    assert found.shape == (0,)
    found.sum().backward()
