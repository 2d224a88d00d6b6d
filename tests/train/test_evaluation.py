"""What an evaluation reports: names, and rates over rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.train.test_feed import VIEWS, feed_of, table

from llamafactory.train import evaluation
from llamafactory.train.evaluation import evaluate


@pytest.fixture
def clock(monkeypatch) -> None:
    """Each evaluation set takes two seconds; its loss is 1 over 7 tokens."""
    times = iter(range(0, 1000, 2))
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(evaluation.steps, "evaluation_loss", lambda *args: ({"loss": 1.0}, 7))


def job_of(feeds: dict[str, Any], predictions: Any = None) -> Any:
    accelerator = SimpleNamespace(process_index=0)
    return SimpleNamespace(evaluation=feeds, accelerator=accelerator, module=None, predictions=predictions)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("view", sorted(VIEWS))
def test_rates_count_rows_as_training_does(view):
    feed = feed_of(table([3, 5, 2, 8, 1], VIEWS[view]), view)
    found = evaluate(job_of({"eval": feed}))
    per_epoch = feed.schedule.windows_per_epoch
    assert found == {
        "eval_loss": 1.0, "eval_runtime": 2, "eval_samples_per_second": 5 / 2,
        "eval_steps_per_second": per_epoch / 2, "eval_supervised_tokens": 7.0,
    }  # fmt: skip
    assert sum(feed.window(step, 0).num_rows for step in range(per_epoch)) == 5


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("in_evaluation", "generates", "is_scored"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_answers_are_scored_where_that_is_asked_for(in_evaluation, generates, is_scored):
    predictions = SimpleNamespace(in_evaluation=in_evaluation, score=lambda: {"eval_rouge-1": 4.0})
    feeds = {"eval_a": feed_of(table([3]), "sft"), "eval_b": feed_of(table([4, 4]), "sft")}
    found = evaluate(job_of(feeds, predictions), generates=generates)
    assert ("eval_rouge-1" in found) is is_scored
    assert {"eval_a_loss", "eval_b_loss"} <= found.keys()
    assert evaluate(job_of({})) == {}
