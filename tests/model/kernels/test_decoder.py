"""The fused decoder gives the numbers of the model's own forward, or steps aside."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from llamafactory.data.answer_batch import AnswerGroup, collate_answers
from llamafactory.data.collate import collate_flat, collate_padded
from llamafactory.data.types import IGNORE_INDEX, Example
from llamafactory.model import attention
from llamafactory.model.family import FAMILIES
from llamafactory.model.kernels.decoder import decode
from llamafactory.model.patches.peft_future_warning import without_future_warning
from llamafactory.model.reference import without_dropout
from llamafactory.train.logprob import hidden_states, supervised_nll, unwrap_peft

LENGTHS = (7, 1, 23, 7, 12)
TREES = ((9, (5, 3)), (0, (4, 6, 1)), (12, (0, 0)), (8, (1, 1, 0, 11)), (6, (7,)))
"""Tokens of a prompt and of the answers to it: usual ones, no prompt, equal answers, one token each, one answer."""
PLANS = {fused: SimpleNamespace(fused_head=True, loss_chunk_rows=7, fused_blocks=fused) for fused in (False, True)}
FUSED_TYPES = sorted(name for name, family in FAMILIES.items() if family.prenorm_blocks)


def wrap(model, **lora):
    options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"} | lora
    with without_future_warning():
        return get_peft_model(model, LoraConfig(**options))


def build(config, lora=None):
    torch.manual_seed(0)
    attention.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float32)
    for name, parameter in model.named_parameters():  # norm weights of one and biases of zero would hide mistakes
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 0.8, std=0.1)
    if lora is None:
        return model.train()
    model = wrap(model, **lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def loss_and_gradients(model, batch, fused):
    model.zero_grad()
    loss = supervised_nll(model, batch, PLANS[fused])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def decoded(model, batch):
    return decode(unwrap_peft(model), batch, batch.target_rows)


@pytest.fixture
def trees(make_examples):
    """One batch of prefix trees; the last token of each prompt is a target of every answer."""
    groups = []
    for number, (prompt, answers) in enumerate(TREES):
        parts = make_examples((prompt, *answers), seed=number, supervised=1.0)
        answers = []
        for part in parts[1:]:
            ids, labels = (
                np.concatenate([getattr(parts[0], name), getattr(part, name)]) for name in ("input_ids", "labels")
            )
            labels[: max(1, prompt // 2)] = IGNORE_INDEX
            answers.append(Example(input_ids=ids, labels=labels))
        groups.append(AnswerGroup(answers=tuple(answers)))
    return collate_answers(groups, "flat", 0)


def assert_same(model, batch):
    assert decoded(model, batch) is not None
    stock, fused = (loss_and_gradients(model, batch, choice) for choice in (False, True))
    torch.testing.assert_close(fused[0], stock[0], rtol=1e-5, atol=0)
    assert fused[1].keys() == stock[1].keys()
    for name, expected in stock[1].items():
        difference = (fused[1][name] - expected).norm() / expected.norm().clamp_min(1e-8)
        assert difference < 1e-5, f"{name}: {difference:.2e}"


@pytest.mark.parametrize("model_type", FUSED_TYPES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_loss_and_gradients_equal_the_stock_forward(model_type, method, tiny_config, make_examples):
    model = build(tiny_config(model_type), {} if method == "lora" else None)
    assert_same(model, collate_flat(make_examples(LENGTHS)))


@pytest.mark.parametrize("model_type", FUSED_TYPES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_prefix_trees_equal_the_stock_forward(model_type, method, tiny_config, trees):
    tied = {"tie_word_embeddings": True}
    assert_same(build(tiny_config(model_type, **tied), {} if method == "lora" else None), trees)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("shape", ["rows", "trees"])
def test_sliding_windows(model_type, shape, tiny_config, make_examples, trees):
    config = tiny_config(model_type, sliding_window=5, use_sliding_window=True, max_window_layers=1)
    assert_same(build(config, {}), trees if shape == "trees" else collate_flat(make_examples(LENGTHS)))


def test_rows_may_be_wanted_in_any_order_and_more_than_once(tiny_config, trees):
    model = build(tiny_config(), {})
    rows = torch.tensor([8, 3, 8, 0, trees.input_ids.shape[1] - 1])
    base = unwrap_peft(model)
    wanted = hidden_states(base, trees)[0].index_select(0, rows)
    torch.testing.assert_close(decode(base, trees, rows), wanted, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_where_no_gradient_is_wanted(tiny_config, trees):
    model = build(tiny_config(), {})
    with torch.no_grad(), model.disable_adapter():
        states = decoded(model, trees)
    assert states is not None
    assert states.grad_fn is None
    size = (trees.num_tokens, model.config.hidden_size)
    assert not [one for one in gc.get_objects() if type(one) is torch.Tensor and one.shape == size]


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"num_key_value_heads": 4}, {"head_dim": 16}])
def test_other_shapes(changes, tiny_config, make_examples):
    assert_same(build(tiny_config("llama", **changes), {}), collate_flat(make_examples(LENGTHS)))


def test_rslora_on_some_layers(tiny_config, make_examples):
    lora = {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}
    assert_same(build(tiny_config(), lora), collate_flat(make_examples(LENGTHS)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, tiny_config, make_examples, trees):
    model = build(tiny_config(), {})
    base = unwrap_peft(model)
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        base.enable_input_require_grads()
    assert_same(model, collate_flat(make_examples(LENGTHS)))
    assert_same(model, trees)


def test_disabled_adapters_give_the_base_model(tiny_config, make_examples):
    model, batch = build(tiny_config(), {}), collate_flat(make_examples(LENGTHS))
    with torch.no_grad(), model.disable_adapter():
        found = [supervised_nll(model, batch, PLANS[fused]) for fused in (False, True)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)
    assert (supervised_nll(model, batch, PLANS[True]) - found[1]).abs() > 1e-3


def test_it_steps_aside_for_what_it_does_not_know(tiny_config, make_examples):
    flat, padded = collate_flat(make_examples(LENGTHS)), collate_padded(make_examples(LENGTHS), pad_id=0)
    plain = build(tiny_config())
    assert decoded(plain, padded) is None
    assert decoded(plain.to(torch.bfloat16), flat) is None
    assert decoded(build(tiny_config(hidden_act="gelu")), flat) is None
    assert decoded(build(tiny_config(attention_dropout=0.1)), flat) is None
    for lora in ({"lora_dropout": 0.1}, {"use_dora": True}):
        assert decoded(build(tiny_config(), lora), flat) is None
    dropping = build(tiny_config(), {"lora_dropout": 0.1}).eval()
    assert decoded(dropping, flat) is not None
    two = build(tiny_config(), {})
    two.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    two.base_model.set_adapter(["default", "second"])
    assert decoded(two, flat) is None


def test_dropout_of_zero_drops_nothing(tiny_config, make_examples):
    model = without_dropout(build(tiny_config(attention_dropout=0.1), {"lora_dropout": 0.1}))
    assert model.training
    assert model.config.attention_dropout == 0.1
    assert_same(model, collate_flat(make_examples(LENGTHS)))


def test_nothing_supervised(tiny_config, make_examples):
    model = build(tiny_config(), {})
    batch = collate_flat(make_examples((5, 9), supervised=0.0))
    loss, grads = loss_and_gradients(model, batch, True)
    assert loss == 0
    assert not any(grad.any() for grad in grads.values())
