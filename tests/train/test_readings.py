"""The sentences about a run, on a curve as a good run has it, and on curves made for one rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamafactory.train.readings import fact_of, read_run


def rows(**curves):
    length = max(len(values) for values in curves.values())
    return [
        {"current_steps": step + 1, **{key: values[step] for key, values in curves.items() if step < len(values)}}
        for step in range(length)
    ]


HEALTHY = {
    "loss": [0.693, 0.68, 0.62, 0.55, 0.48, 0.41, 0.33, 0.28],
    "rewards/margins": [0.0, 0.03, 0.17, 0.35, 0.56, 0.8, 1.1, 1.3],
    "rewards/accuracies": [0.0, 0.62, 0.75, 0.75, 0.87, 0.87, 0.93, 0.93],
    "change_per_token/chosen": [0.0, 0.002, 0.01, 0.0, -0.01, -0.02, -0.04, -0.05],
    "change_per_token/rejected": [0.0, -0.003, -0.02, -0.05, -0.1, -0.13, -0.17, -0.2],
    "eval_rewards/accuracies": [0.0, 0.75],
    "eval_loss": [0.693, 0.66],
    "length_gap": [12.0] * 8,
}


def test_a_healthy_run_gets_no_remark():
    assert read_run(rows(**HEALTHY)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"change_per_token/chosen": [0, -0.1, -0.3, -0.4]}, "Chosen answers changed by -0.40 nat per token"),
        ({"rewards/margins": [0.5, 0.6, 0.7]}, "not the model that training started from"),
        ({"rewards/margins": [0.0, 0.001, 0.002]}, "hardly tells the answers apart"),
        ({"rewards/accuracies": [1.0], "eval_rewards/accuracies": [0.5]}, "learned by heart"),
        ({"rewards/accuracies": [1.0], "loss": [0.02]}, "more steps teach little"),
        ({"length_gap": [80.0]}, "80 tokens longer"),
        ({"eval_loss": [0.69, 0.5, 0.62]}, "ends 0.120 above its lowest value"),
        ({"change_per_token/rejected": [0.0, 0.3]}, "Rejected answers gained 0.30"),
        ({"kl": [0.0, 0.0], "rewards/chosen": [0.0, 0.4]}, "reference point of KTO does nothing"),
    ],
)
def test_each_rule_speaks_on_its_curve_and_no_other(changes, words):
    said = read_run(rows(**(HEALTHY | changes)))
    assert len(said) == 1
    assert words in said[0]


def test_a_plain_fine_tuning_gets_no_remark():
    assert read_run(rows(loss=[3.0, 2.0, 1.5], eval_loss=[2.5, 1.9])) == []


RISING = {
    "loss": [0.0, -0.01, 0.01, 0.0, -0.01, 0.0, 0.01, 0.0],
    "reward": [0.29, 0.35, 0.52, 0.66, 0.78, 0.85, 0.9, 0.92],
    "reward_std": [0.44, 0.45, 0.48, 0.45, 0.4, 0.33, 0.28, 0.25],
    "rewards/json": [0.29, 0.35, 0.52, 0.66, 0.78, 0.85, 0.9, 0.92],
    "gold/parses": [0.2, 0.25, 0.4, 0.5, 0.6, 0.62, 0.7, 0.71],
    "flat_groups": [0.1, 0.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5],
    "entropy": [1.6, 1.5, 1.4, 1.2, 1.0, 0.9, 0.8, 0.7],
    "completion_length": [60.0, 61.0, 58.0, 62.0, 60.0, 64.0, 66.0, 65.0],
    "completions_cut": [0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1],
    "kl": [0.0, 0.001, 0.004, 0.01, 0.02, 0.03, 0.05, 0.06],
    "clipped": [0.0, 0.0, 0.01, 0.02, 0.02, 0.03, 0.02, 0.02],
    "ratio_off": [0.0, 0.01, 0.02, 0.02, 0.03, 0.03, 0.03, 0.03],
    "logp_gap/p95": [1e-6] * 8,
    "logp_gap/max": [1e-5] * 8,
}


def test_a_rising_reward_gets_no_remark():
    assert read_run(rows(**RISING)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": [0.3, 0.31, 0.29, 0.3, 0.3]}, "The reward went from 0.30 to 0.30 over 5 rollouts"),
        ({"reward": [0.3, 0.31, 0.29, 0.3, 0.1], "reward_std": [], "value_loss": [0.1]}, "smaller ppo_kl_coefficient"),
        ({"flat_groups": [0.9, 1.0]}, "all answers to 100% of the prompts earn the same (reward 0.91)"),
        ({"entropy": [2.0, 1.0, 0.2, 0.1]}, "The entropy fell from 2.00 to 0.10 nats a token"),
        ({"logp_gap/p95": [0.01, 0.2], "logp_gap/max": [0.1, 3.0]}, "differ by 0.20 nats or more (at most 3.0)"),
        ({"completions_cut": [0.1, 0.9]}, "90% of the answers are cut"),
        ({"completion_length": [20.0, 30.0, 45.0, 60.0]}, "3.0 times as long (60 tokens)"),
        ({"kl": [0.0, 1.5]}, "1.5 nats a token away"),
        ({"kl": [0.0, 45.0], "kl_coefficient": [0.2], "flat_groups": []}, "45 nats away from where the model began"),
        ({"clipped": [0.0, 0.45], "ratio_off": [0.0, 0.3]}, "45% of the tokens are clipped"),
        ({"gold/parses": [0.5, 0.4, 0.3, 0.1]}, "rose by 0.59 while the gold checker went by -0.40"),
        ({"rewards/json/faults": [0.0, 0.03]}, "could not score 3.0% of the answers"),
    ],
)
def test_each_rule_of_rewards_speaks_on_its_curve_and_no_other(changes, words):
    said = read_run(rows(**(RISING | changes)))
    assert len(said) == 1
    assert words in said[0]


def test_facts_of_a_curve():
    history = rows(loss=[4.0, 3.0, 2.0, 1.0, 0.5, 0.7, 0.9, 1.1])
    assert fact_of("loss", "first", history) == 3.5
    assert fact_of("loss", "last", history) == 1.0
    assert fact_of("loss", "low", history) == 0.5
    assert fact_of("loss", "rise", history) == pytest.approx(0.6)
    assert fact_of("loss", "range", history) == 3.5
    assert fact_of("loss", "ratio", history) == pytest.approx(1.0 / 3.5)
    assert fact_of("lo*", "high", history) == 4.0
    assert fact_of("other", "last", history) is None
    assert fact_of("other/*", "last", history) is None


RECORDED = {
    "ppo": [  # SmolLM2 learns in 21 steps to begin every answer with Yes (tests/e2e/test_rl_learning.py)
        "The entropy fell from 2.32 to 0.10 nats a token",
    ],
    "dpo": [],
}


@pytest.mark.parametrize("name", RECORDED)
def test_what_is_said_of_recorded_runs(name):
    lines = (Path(__file__).parent / "curves" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    said = read_run([json.loads(line) for line in lines])
    assert len(said) == len(RECORDED[name])
    for sentence, words in zip(said, RECORDED[name], strict=True):
        assert words in sentence
