"""Which evaluation is the best, and when there were enough that were not."""

from __future__ import annotations

import json
import math

import pytest

from llamafactory.extras.errors import ConfigError
from llamafactory.hparams.train import TrainConfig
from llamafactory.train.selection import greater_is_better, is_better, is_patience_over, judge, metric_name


def test_the_best_loss_is_kept_and_worse_ones_are_counted():
    best = {}
    for step, loss in enumerate([3.0, 2.0, 2.0, 2.5, 1.0], start=1):
        best = json.loads(json.dumps(judge(best, {"eval_loss": loss, "eval_acc": 1.0}, step, TrainConfig())))
        expected = {1: (1, 0), 2: (2, 0), 3: (2, 1), 4: (2, 2), 5: (5, 0)}[step]
        assert (best["step"], best["num_worse"]) == expected
    assert best["values"]["eval_acc"] == 1.0


@pytest.mark.parametrize(
    ("metric", "asked", "expected"),
    [("loss", None, False), ("eval_accuracy", None, True), ("accuracy", False, False), (None, None, False)],
)
def test_which_direction_is_better(metric, asked, expected):
    assert greater_is_better(TrainConfig(metric_for_best_model=metric, greater_is_better=asked)) is expected


def test_nan_is_never_better_and_anything_is_better_than_nan():
    assert not is_better(math.nan, 1.0, False)
    assert is_better(9.0, math.nan, False)


def test_a_metric_that_is_not_reported_is_named():
    with pytest.raises(ConfigError, match=r"bleu(.|\n)*eval_loss"):
        metric_name(TrainConfig(metric_for_best_model="bleu"), {"eval_loss": 1.0})


def test_several_evaluation_sets_without_a_choice_take_the_first_loss():
    assert metric_name(TrainConfig(), {"eval_b_loss": 1.0, "eval_a_loss": 1.0}) == "eval_a_loss"


def test_patience():
    assert not is_patience_over({}, 1)
    assert not is_patience_over({"num_worse": 2}, None)
    assert not is_patience_over({"num_worse": 2}, 3)
    assert is_patience_over({"num_worse": 3}, 3)
