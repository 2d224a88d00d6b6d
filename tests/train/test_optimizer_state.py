"""Optimizers and schedules that come back from a checkpoint take the steps that they would have taken."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from tests.train.optimizer_steps import take_steps

from llamafactory.hparams.train import LrScheduler, TrainConfig
from llamafactory.train.checkpoint.tensors import load_optimizer, optimizer_state
from llamafactory.train.loop import _plain
from llamafactory.train.optim import build_optimizer
from llamafactory.train.schedule import build_schedule, go_on

OPTIMIZERS = get_args(TrainConfig.model_fields["optim"].annotation)


@pytest.mark.parametrize(
    ("optim", "kind", "dtype"),
    [(optim, kind, torch.float32) for optim in OPTIMIZERS for kind in get_args(LrScheduler)]
    + [(optim, "linear", torch.bfloat16) for optim in OPTIMIZERS],
)
def test_each_optimizer_and_schedule_goes_on_as_if_nothing_had_been(optim, kind, dtype):
    kwargs = {"min_lr_rate": 0.1} if "min_lr" in kind else {"num_cycles": 3} if "restarts" in kind else None
    cfg = TrainConfig(
        optim=optim, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, warmup_steps=2, weight_decay=0.1,
        learning_rate=0.02,
    )  # fmt: skip

    def begin():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3).to(dtype)
        optimizer = build_optimizer(model, cfg, device="cpu")
        return model, optimizer, build_schedule(optimizer, cfg, total_steps=12)

    def train(model, optimizer, schedule, count):
        for _ in range(count):
            take_steps(optimizer, 1)
            schedule.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    whole = begin()
    train(*whole, 5)
    saved, rates = optimizer_state(whole[1]), _plain(whole[2].state_dict())
    weights, state = [parameter.detach().clone() for parameter in whole[0].parameters()], torch.get_rng_state()
    expected = train(*whole, 5)
    again = begin()
    for parameter, value in zip(again[0].parameters(), weights, strict=True):
        parameter.data = value
    load_optimizer(again[1], saved)
    go_on(again[2], rates)
    torch.set_rng_state(state)
    assert all(torch.equal(found, wanted) for found, wanted in zip(train(*again, 5), expected, strict=True))


def test_changed_options_of_the_optimizer_count_and_the_schedule_keeps_its_step():
    def begin(**options):
        cfg = TrainConfig(optim="adamw_torch", **options)
        optimizer = build_optimizer(torch.nn.Linear(4, 3), cfg, device="cpu")
        return optimizer, build_schedule(optimizer, cfg, total_steps=10)

    old, rates = begin(learning_rate=1.0, weight_decay=0.1)
    for _ in range(4):
        old.step()
        rates.step()
    new, schedule = begin(learning_rate=0.1, weight_decay=0.3)
    load_optimizer(new, optimizer_state(old))
    go_on(schedule, _plain(rates.state_dict()))
    assert [group["weight_decay"] for group in new.param_groups] == [0.3, 0.0]
    assert [group["lr"] for group in new.param_groups] == schedule.get_last_lr() == [0.1 * 0.6] * 2
    new.step()
    schedule.step()
    assert schedule.get_last_lr() == [0.1 * 0.5] * 2
