"""On the bundled model: rows that share a forward pass give what each gives alone through stock attention.

The rows alone are computed in float64: in float32 stock attention itself is up to 7e-5 away from that, more than ours.
"""

from __future__ import annotations

from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory.data.answer_batch import AnswerGroup, collate_answers
from llamafactory.data.collate import collate_flat, collate_padded
from llamafactory.data.types import IGNORE_INDEX, Example
from llamafactory.model import attention
from llamafactory.model.adapters import lora
from llamafactory.train.logprob import supervised_nll, token_logprobs

TEXTS = [
    ("Name a river.", " The Danube runs through ten countries."),
    ("Name a river.", " The Nile."),
    ("What is 7 times 6?", " 42"),
]


def plan(*, fused_blocks=False, chunk=256):
    return SimpleNamespace(fused_head=True, loss_chunk_rows=chunk, fused_blocks=fused_blocks)


def trees(rows):
    """Neighbours that begin with the same token share their common prefix."""
    groups = [AnswerGroup(answers=tuple(group)) for _, group in groupby(rows, key=lambda row: row.input_ids[0])]
    return collate_answers(groups, "flat", 0)


PATHS = {
    "fused blocks": (collate_flat, plan(fused_blocks=True)),
    "segments": (collate_flat, plan()),
    "prefix trees": (trees, plan()),
    "prefix trees, fused blocks": (trees, plan(fused_blocks=True)),
    "padded": (lambda rows: collate_padded(rows, pad_id=0), plan()),
}
"""Every way in which a forward pass may hold several rows."""


@pytest.fixture(scope="module")
def rows(embedded_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir)
    found = []
    for question, answer in TEXTS:
        start, end = (tokenizer(text)["input_ids"] for text in (question, answer))
        ids = np.array([*start, *end], dtype=np.int32)
        labels = ids.copy()
        labels[: len(start)] = IGNORE_INDEX
        found.append(Example(input_ids=ids, labels=labels))
    return found


def _build(folder, implementation):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation, dtype=torch.float32)
    policy = lora.apply(model, lora.Options(), adapters=(), trainable=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:  # neither zero nor chance: both models get the same
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return policy


@pytest.fixture(scope="module")
def model(embedded_model_dir):
    return _build(embedded_model_dir, attention.register())


@pytest.fixture(scope="module")
def alone(embedded_model_dir, rows):
    """Log-probabilities of each row, and the gradient of the whole loss, from stock attention, row by row."""
    policy = _build(embedded_model_dir, "eager").double()
    logps = []
    for row in rows:
        ids = torch.tensor(row.input_ids, dtype=torch.long)[None]
        wanted = torch.from_numpy(row.labels[1:] != IGNORE_INDEX)
        logits = policy(input_ids=ids).logits[0, :-1][wanted]
        found = torch.log_softmax(logits, -1).gather(1, ids[0, 1:][wanted][:, None])[:, 0]
        (-found.sum()).backward()
        logps.append(found.detach())
    return logps, _gradient(policy)


def _gradient(policy):
    found = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


def _distance(found, expected):
    assert found.keys() == expected.keys()
    square = sum((found[name] - value).double().pow(2).sum() for name, value in expected.items())
    return float((square / sum(value.double().pow(2).sum() for value in expected.values())).sqrt())


@pytest.mark.parametrize("path", PATHS)
def test_together_equals_alone(path, model, alone, rows):
    collate, how = PATHS[path]
    batch, (logps, gradient) = collate(rows), alone
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(model, batch, how), torch.cat(logps).float(), rtol=1e-5, atol=2e-5)
    loss = supervised_nll(model, batch, how)
    loss.backward()
    assert loss.item() == pytest.approx(-float(torch.cat(logps).sum()), rel=1e-5)
    assert _distance(_gradient(model), gradient) < 1e-5


@pytest.mark.parametrize("path", ["fused blocks", "segments", "prefix trees", "prefix trees, fused blocks"])
def test_another_order_and_other_neighbours_change_nothing(path, model, rows):
    collate, how = PATHS[path]
    other = Example(input_ids=rows[2].input_ids[::-1].copy(), labels=rows[2].labels)
    sizes = [row.num_supervised for row in rows]
    with torch.no_grad():
        before = token_logprobs(model, collate(rows), how).split(sizes)
        turned = token_logprobs(model, collate([rows[1], rows[0], rows[2]]), how).split([sizes[1], sizes[0], sizes[2]])
        after = token_logprobs(model, collate([*rows[:2], other]), how).split(sizes)
    for one, same in zip(before, (turned[1], turned[0], turned[2]), strict=True):
        torch.testing.assert_close(one, same, rtol=0, atol=2e-5)
    for place in (0, 1):
        torch.testing.assert_close(before[place], after[place], rtol=0, atol=1e-6)
    assert (before[2] - after[2]).abs().max() > 1e-2


@pytest.mark.parametrize("path", PATHS)
def test_chunks_and_bins_do_not_change_the_gradient(path, model, rows):
    collate, how = PATHS[path]
    small = SimpleNamespace(**{**vars(how), "loss_chunk_rows": 3})
    found = []
    for bins, chosen in (([rows], how), ([rows], small), ([rows[2:], rows[:2]], how)):
        for part in bins:
            supervised_nll(model, collate(part), chosen).backward()
        found.append(_gradient(model))
    for other in found[1:]:
        assert _distance(other, found[0]) < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_nothing_supervised(path, model, rows):
    collate, how = PATHS[path]
    blank = [Example(input_ids=row.input_ids, labels=np.full_like(row.labels, IGNORE_INDEX)) for row in rows]
    loss = supervised_nll(model, collate(blank), how)
    loss.backward()
    assert loss.item() == 0
    assert not any(value.any() for value in _gradient(model).values())
