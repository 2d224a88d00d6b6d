"""Steps that are not finite, and losses that jump."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from llamafactory.train.guard import NotFiniteError, SpikeWatch, StepGuard, poison

ALONE = SimpleNamespace(scaler=None, num_processes=1, device=torch.device("cpu"))


def guard_of(max_skipped=0, accelerator=ALONE):
    parameter = torch.nn.Parameter(torch.ones(2))
    return StepGuard(accelerator, torch.optim.AdamW([parameter]), max_skipped=max_skipped)


def value(number):
    return torch.tensor(float(number))


@pytest.mark.parametrize(("loss", "norm"), [("nan", 1), (1, "inf"), ("-inf", 1), (1, "nan")])
def test_a_bad_step_is_refused_and_a_good_one_is_not(loss, norm):
    guard = guard_of()
    assert guard.admits(0, value(1), value(2), torch.nn.Linear(1, 1))
    with pytest.raises(NotFiniteError) as caught:
        guard.admits(1, value(loss), value(norm), torch.nn.Linear(1, 1))
    assert caught.value.step == 1


def test_as_many_as_allowed_are_left_out():
    guard = guard_of(max_skipped=2)
    module = torch.nn.Linear(1, 1)
    assert [guard.admits(step, value("nan" if step % 2 else 1), value(1), module) for step in range(4)] == [
        True, False, True, False,
    ]  # fmt: skip
    assert guard.num_skipped == 2
    with pytest.raises(NotFiniteError):
        guard.admits(4, value("nan"), value(1), module)
    assert guard.num_skipped == 2  # the step that stops the run was not left out


def test_without_clipping_the_norm_is_computed():
    module = torch.nn.Linear(2, 2)
    module(torch.ones(1, 2)).sum().backward()
    assert guard_of().admits(0, value(1), None, module)
    poison(module)
    with pytest.raises(NotFiniteError):
        guard_of().admits(0, value(1), None, module)


def test_with_loss_scaling_only_the_loss_counts():
    scaled = SimpleNamespace(scaler=object(), num_processes=1, device=torch.device("cpu"))
    assert guard_of(accelerator=scaled).admits(0, value(1), value("inf"), torch.nn.Linear(1, 1))


def test_with_several_ranks_only_the_shared_norm_counts():
    ranks = SimpleNamespace(scaler=None, num_processes=2, device=torch.device("cpu"))
    assert guard_of(accelerator=ranks).admits(0, value("nan"), value(1), torch.nn.Linear(1, 1))


def test_a_jump_is_noticed_and_noise_is_not():
    rng = random.Random(0)
    watch = SpikeWatch()
    losses = [(step, 3.0 * 0.99**step + rng.gauss(0, 0.05)) for step in range(200)]
    losses[150] = (150, 9.0)
    found = [jump for start in range(0, 200, 10) for jump in watch.look(losses[start : start + 10])]
    assert [(step, loss) for step, loss, _ in found] == [(150, 9.0)]
    assert found[0][2] == pytest.approx(1.0, abs=0.5)


def test_nothing_is_said_before_enough_was_seen():
    assert SpikeWatch(least=16).look([(step, 1.0 if step < 15 else 100.0) for step in range(16)]) == []
