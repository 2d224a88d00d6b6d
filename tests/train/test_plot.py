"""Curves: which are drawn, and how they are smoothed."""

from __future__ import annotations

import pytest

from llamafactory.train.plot import plot_curves, smooth


def test_every_loss_with_two_points_becomes_a_file(tmp_path):
    history = [
        {"current_steps": 1, "loss": 2.0},
        {"current_steps": 1, "eval_loss": 2.5},
        {"current_steps": 2, "loss": 1.0, "lr": 0.1},
        {"current_steps": 2, "eval_a_loss": 2.0},
        {"current_steps": 3, "eval_a_loss": 1.5},
    ]
    written = plot_curves(tmp_path, history)
    assert [path.name for path in written] == ["training_loss.png", "training_eval_a_loss.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    assert smooth([]) == []
    assert smooth([3.0, 3.0, 3.0]) == [3.0, 3.0, 3.0]
    assert smooth([4.0, 2.0]) == [4.0, pytest.approx(3.0)]
    assert smooth([1.0] * 100 + [2.0])[-1] < 1.2  # a tenth of a long curve


def test_a_reward_that_is_a_pattern_has_a_file_whose_name_any_system_takes(tmp_path):
    keys = ["reward", "rewards/regex:^$a\\s*{$", "rewards/regex:^$a\\s*[$", "rewards/length:24"]
    history = [{"current_steps": step, **dict.fromkeys(keys, 0.5)} for step in (1, 2)]
    written = plot_curves(tmp_path, history)
    assert [path.name for path in written] == [
        "training_reward.png", "training_rewards_regex_a_s_.png", "training_rewards_regex_a_s__2.png",
        "training_rewards_length_24.png",
    ]  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 4
