"""The sentences about a run, on a curve as a good run has it, and on curves made for one rule."""

from __future__ import annotations

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


def test_facts_of_a_curve():
    history = rows(loss=[4.0, 3.0, 2.0, 1.0, 0.5, 0.7, 0.9, 1.1])
    assert fact_of("loss", "first", history) == 3.5
    assert fact_of("loss", "last", history) == 1.0
    assert fact_of("loss", "low", history) == 0.5
    assert fact_of("loss", "rise", history) == pytest.approx(0.6)
    assert fact_of("other", "last", history) is None
