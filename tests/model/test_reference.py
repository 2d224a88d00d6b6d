"""The reference is the model before training, and looking at it changes nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from llamafactory.model.adapters import lora
from llamafactory.model.reference import ADAPTER, Reference, freeze

IDS = torch.tensor([[5, 9, 2, 44, 17]])


@pytest.fixture
def base(tiny_config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.clone()


def move(policy, name="default"):
    torch.manual_seed(4)
    for key, parameter in policy.named_parameters():
        if f"lora_B.{name}" in key:
            torch.nn.init.normal_(parameter, std=0.3)


def state(policy):
    return {name: (p.requires_grad, p.detach().clone()) for name, p in policy.named_parameters()}


def same_state(policy, before):
    after = state(policy)
    return all(flag == after[name][0] and value.equal(after[name][1]) for name, (flag, value) in before.items())


def test_without_its_adapter_the_policy_is_its_base(base):
    before = logits(base)
    policy = lora.apply(base, lora.Options(lora_rank=4), adapters=(), trainable=True).train()
    move(policy)
    kept, own = state(policy), logits(policy)
    with Reference().of(policy) as model:
        assert not model.training
        torch.testing.assert_close(model(input_ids=IDS).logits, before)
    assert policy.training
    assert same_state(policy, kept)
    assert logits(policy).equal(own)
    assert not own.allclose(before)


def test_a_frozen_copy_of_the_adapter_stays_what_it_was(base, tmp_path):
    policy = lora.apply(base, lora.Options(lora_rank=4), adapters=(), trainable=True)
    move(policy)
    policy.save_pretrained(tmp_path)
    start = logits(policy)
    policy.load_adapter(str(tmp_path), adapter_name=ADAPTER, is_trainable=False)
    torch.manual_seed(9)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert f".{ADAPTER}." not in name
            torch.nn.init.normal_(parameter, std=0.2)
    kept, own = state(policy), logits(policy)
    with Reference(adapter=ADAPTER).of(policy) as model:
        torch.testing.assert_close(model(input_ids=IDS).logits, start)
    assert same_state(policy, kept)
    assert logits(policy).equal(own)


def test_a_model_of_its_own_is_frozen(base):
    other = freeze(base)
    assert not any(parameter.requires_grad for parameter in other.parameters())
    with Reference(model=other).of(torch.nn.Linear(1, 1)) as model:
        assert model is other
        assert not model(input_ids=IDS).logits.requires_grad
