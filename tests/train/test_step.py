"""However a step is split into micro-batches and accumulation, its loss and gradient are the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from llamafactory.model import attention
from llamafactory.model.adapters import lora
from llamafactory.train.feed import Feed
from llamafactory.train.stage import Models
from llamafactory.train.stages.sft import STAGE, Options
from llamafactory.train.step import StageModule, accumulate, apply_gradient, evaluation_loss
from llamafactory.train.windows import Schedule, packed_items, single_items

LENGTHS = (9, 31, 4, 17, 22, 6, 12, 28)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def module(tiny_config):
    attention.register()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation=attention.NAME, dtype=torch.float32)
    policy = lora.apply(base, lora.Options(lora_rank=4), adapters=(), trainable=True)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # not zero, so that the A matrices get a gradient too
            torch.nn.init.normal_(parameter, std=0.05)
    return StageModule(
        STAGE,
        Models(policy=policy, plan=SimpleNamespace(fused_head=True, loss_chunk_rows=7, fused_blocks=True)),
        Options(),
    )


def feed(examples, *, per_device, accumulation, layout="flat", tokens=None, items=None):
    items = items or single_items(len(examples))
    schedule = Schedule(
        items=items,
        lengths=[sum(len(examples[index]) for index in item) for item in items],
        items_per_device=per_device,
        accumulation=accumulation,
        num_ranks=1,
        micro_batch_tokens=tokens,
        seed=3,
    )
    return Feed(examples=examples, schedule=schedule, layout=layout, pad_id=0)


def loss_and_gradient(accelerator, module, source, step=0):
    module.zero_grad()
    window = source.window(step, 0)
    loss = accumulate(accelerator, module, window).loss / window.num_units
    flat = torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad])
    return float(loss), flat.clone()


SPLITS = {
    "8x1": {"per_device": 8, "accumulation": 1},
    "4x2": {"per_device": 4, "accumulation": 2},
    "1x8": {"per_device": 1, "accumulation": 8},
    "8x1 padded": {"per_device": 8, "accumulation": 1, "layout": "padded"},
    "2x4 padded": {"per_device": 2, "accumulation": 4, "layout": "padded"},
    "40 tokens a pass": {"per_device": 8, "accumulation": 1, "tokens": 40},
}


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_of_a_step_gives_one_loss_and_gradient(name, accelerator, module, make_examples):
    examples = make_examples(LENGTHS)
    reference = loss_and_gradient(accelerator, module, feed(examples, per_device=8, accumulation=1))
    found = loss_and_gradient(accelerator, module, feed(examples, **SPLITS[name]))
    assert found[0] == pytest.approx(reference[0], rel=1e-5)
    assert float((found[1] - reference[1]).norm() / reference[1].norm()) < 1e-5


def test_a_ragged_last_window_is_divided_by_its_own_tokens(accelerator, module, make_examples):
    examples = make_examples((*LENGTHS, 13, 5, 19))  # 11 rows: the second window holds 3
    split = feed(examples, per_device=2, accumulation=4)
    whole = feed(examples, per_device=8, accumulation=1)
    assert split.schedule.windows_per_epoch == 2
    found = loss_and_gradient(accelerator, module, split, step=1)
    reference = loss_and_gradient(accelerator, module, whole, step=1)
    assert found[0] == pytest.approx(reference[0], rel=1e-5)
    assert float((found[1] - reference[1]).norm() / reference[1].norm()) < 1e-5
    rows = [index for item in (item for group in split.schedule.window(1)[0] for item in group) for index in item]
    supervised = sum(examples[index].num_supervised for index in rows)
    assert split.window(1, 0).num_units == supervised
    alone = [
        loss_and_gradient(accelerator, module, feed([examples[index]], per_device=1, accumulation=1))[0]
        for index in rows
    ]
    mean = sum(loss * examples[index].num_supervised for loss, index in zip(alone, rows, strict=True)) / supervised
    assert found[0] == pytest.approx(mean, rel=1e-5)


def test_packed_bins_give_the_loss_of_their_rows(accelerator, module, make_examples):
    examples = make_examples(LENGTHS)
    bins = packed_items(LENGTHS, capacity=64)
    packed = feed(examples, per_device=len(bins), accumulation=1, items=bins)
    reference = loss_and_gradient(accelerator, module, feed(examples, per_device=8, accumulation=1))
    found = loss_and_gradient(accelerator, module, packed)
    assert len(bins) < len(LENGTHS)
    assert found[0] == pytest.approx(reference[0], rel=1e-5)
    assert float((found[1] - reference[1]).norm() / reference[1].norm()) < 1e-5


def test_the_evaluation_loss_is_the_mean_over_tokens(accelerator, module, make_examples):
    examples = make_examples(LENGTHS)
    batched = feed(examples, per_device=3, accumulation=1)
    averages, units = evaluation_loss(accelerator, module, batched.one_pass(0))
    expected, _ = loss_and_gradient(accelerator, module, feed(examples, per_device=8, accumulation=1))
    assert averages["loss"] == pytest.approx(expected, rel=1e-5)
    assert units == sum(example.num_supervised for example in examples)
    assert module.training


def test_a_step_clips_to_the_given_norm_and_clears_the_gradient(accelerator, module, make_examples):
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    source = feed(make_examples(LENGTHS), per_device=8, accumulation=1)
    before = torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])
    accumulate(accelerator, module, source.window(0, 0))
    norm, is_taken = apply_gradient(accelerator, module, optimizer, 0.01)
    after = torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])
    assert float(norm) > 0.01
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-3)
    assert all(p.grad is None for p in module.parameters())
