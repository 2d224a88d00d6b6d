"""Warm-up keys, and the shapes that come from transformers."""

from __future__ import annotations

import pytest
import torch

from llamafactory.hparams.train import TrainConfig
from llamafactory.train.optim import build_optimizer
from llamafactory.train.schedule import build_schedule, warmup_steps


def rates(total=10, **options):
    cfg = TrainConfig(learning_rate=1.0, **options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, cfg, total_steps=total)
    found = []
    for _ in range(total):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, 0), ({"warmup_steps": 3}, 3), ({"warmup_steps": 0.2}, 4), ({"warmup_ratio": 0.1}, 2),
     ({"warmup_steps": 3, "warmup_ratio": 0.5}, 3)],
)  # fmt: skip
def test_warm_up_is_given_in_steps_or_as_a_share(options, steps):
    assert warmup_steps(TrainConfig(**options), 20) == steps


def test_linear_goes_up_and_then_to_zero():
    assert rates(warmup_steps=2) == pytest.approx([0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_a_shape_gets_its_own_options():
    found = rates(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 0.25})
    assert found[0] == 1.0
    assert min(found) > 0.25


def test_warmup_stable_decay_has_a_default_split():
    found = rates(total=12, lr_scheduler_type="warmup_stable_decay", warmup_steps=3)
    assert found[3:6] == [1.0, 1.0, 1.0]
    assert found[-1] < found[6]


def test_biases_and_norms_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.1), device="cpu")
    decayed, rest = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 3)]
    assert [tuple(p.shape) for p in rest["params"]] == [(3,), (3,), (3,)]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_every_optimizer_takes_a_step(name):
    model = torch.nn.Linear(3, 3)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, TrainConfig(optim=name, learning_rate=0.1), device="cpu")
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not model.weight.equal(before)
